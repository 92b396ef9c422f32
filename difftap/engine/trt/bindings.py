"""The backend that both TensorRTs are, but for what each has alone."""

from __future__ import annotations

import importlib
import logging
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from difftap.artifacts.files import output_errors
from difftap.engine.backend import Backend, Calibration, Engine, Graph, Profile
from difftap.engine.trt.engine import GpuMemory, TrtEngine, refit
from difftap.engine.trt.gpu import find_gpu
from difftap.engine.trt.plans import BuildSettings, TrtLog, build_plan, make_log
from difftap.errors import BackendError, first_line

__all__ = ["TrtBackend", "slug"]

_LOG = logging.getLogger("difftap")
WHOLE, STRIPPED = "plan", "stripped.plan"
"""Names of a plan with its weights inside, and of one whose weights stay in the graph's own weight file."""


def slug(text: str) -> str:
    """Write a text as part of a file name."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-")


class TrtBackend(Backend):
    """A TensorRT.

    Attributes:
        module: the Python module.
        extra: the difftap extra that installs it.
        cuda_graphs: whether small batches are captured as CUDA graphs by us.
    """

    module: ClassVar[str]
    extra: ClassVar[str]
    cuda_graphs: ClassVar[bool] = False

    def bindings(self) -> Any:
        """Import the Python module."""
        return importlib.import_module(self.module)

    def missing(self) -> str | None:
        try:
            self.bindings()
        except (ImportError, OSError, RuntimeError) as error:  # the wheels load their libraries when imported
            return (
                f"backend '{self.name}' needs the package '{self.module}', which cannot be imported here "
                f"({first_line(error)}); install it with: pip install 'difftap[{self.extra}]'"
            )
        return None

    def version(self) -> str:
        return str(self.bindings().__version__)

    def builds(self, profile: Profile, device: str) -> bool:
        return True

    def fused_attention(self, device: str) -> bool:
        return True

    def graph_precision(self, profile: Profile, device: str) -> str:
        # Casts around the softmax would keep attention from being fused into one kernel, which sums in float32.
        return f"{profile.precision}-half" if profile.precision in ("fp16", "bf16") else "fp32"

    def settings(self, device: str, strip: bool, cache: Path) -> BuildSettings:
        """How to build for a device; ``cache`` is a folder for what serves later builds."""
        return BuildSettings(strip)

    def build(
        self, graph: Graph, profile: Profile, device: str, folder: Path, calibration: Calibration | None = None
    ) -> Mapping[str, Any]:
        began = time.perf_counter()
        # Building a plan without weights runs a kernel or two, so it takes a GPU. Elsewhere they go in.
        strip = find_gpu() is not None
        size = self._write(graph, profile, device, folder, strip)
        if strip:
            try:
                self._deserialise(graph, folder, make_log(self.bindings()))
            except BackendError as error:
                _LOG.warning("%s; building it with its weights inside", error)
                (folder / STRIPPED).unlink()
                strip = False
                size = self._write(graph, profile, device, folder, strip)
        return {
            "weights": "in the model's own file" if strip else "inside",
            "plan_bytes": size,
            "seconds": round(time.perf_counter() - began, 1),
            "built_on": gpu.label if (gpu := find_gpu()) else "a machine with no NVIDIA GPU",
        }

    def _write(self, graph: Graph, profile: Profile, device: str, folder: Path, strip: bool) -> int:
        if graph.path is None:
            raise BackendError(f"{graph.name} has not been exported; backend '{self.name}' builds from the ONNX file")
        settings = self.settings(device, strip, folder.parent)
        plan = memoryview(build_plan(self.bindings(), graph, profile, graph.path, settings))
        path = folder / (STRIPPED if strip else WHOLE)
        with output_errors(path):
            path.write_bytes(plan)
        return plan.nbytes

    def _deserialise(self, graph: Graph, folder: Path, log: TrtLog) -> Any:
        """Open the engine of a built folder, its weights in place."""
        stripped = (folder / STRIPPED).is_file()
        path = folder / (STRIPPED if stripped else WHOLE)
        runtime = log.trt.Runtime(log.logger)
        try:
            content = path.read_bytes()
        except OSError as error:
            raise BackendError(f"{self.module} cannot open '{path}': {error.strerror}; build it again") from error
        engine = runtime.deserialize_cuda_engine(content)
        if engine is None:
            raise log.failure(f"cannot open '{path}'")
        if stripped:
            refit(log, engine, str(graph.path))
        return engine

    def open(
        self, graph: Graph, profile: Profile, device: str, threads: int | None, built: Path | None = None
    ) -> Engine:
        reason = self.cannot_run(device)
        if reason:
            raise BackendError(reason)
        if built is None:
            raise BackendError(f"backend '{self.name}' runs built engines; run 'difftap engines build' first")
        log = make_log(self.bindings())
        engine = self._deserialise(graph, built, log)
        context, closing = self.context(engine, built)
        if context is None:
            raise log.failure(f"cannot make {graph.name} ready for {profile.label}; try a smaller --batch")
        return TrtEngine(graph, profile, device, engine, context, self.memory(), log, self.cuda_graphs, closing)

    def memory(self) -> GpuMemory:
        """Where the engine's buffers are."""
        return GpuMemory()

    def context(self, engine: Any, built: Path) -> tuple[Any, Any]:
        """Make an execution context, and say what to do when it is closed."""
        return engine.create_execution_context(), lambda: None
