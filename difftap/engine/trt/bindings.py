"""The base class of the backends ``tensorrt`` and ``tensorrt-rtx``."""

from __future__ import annotations

import importlib
import logging
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, ClassVar

from difftap.artifacts.files import output_errors
from difftap.engine.backend import Backend, Calibration, Engine, Graph, Profile
from difftap.engine.trt.engine import GpuMemory, TrtEngine, refit
from difftap.engine.trt.gpu import find_gpu
from difftap.engine.trt.plans import BuildSettings, TrtLog, build_plan, make_log
from difftap.errors import BackendError, first_line

if TYPE_CHECKING:
    from tensorrt import ICudaEngine, IExecutionContext

__all__ = ["TrtBackend", "slug"]

_LOG = logging.getLogger("difftap")
WHOLE, STRIPPED = "plan", "stripped.plan"
"""File names of a plan with its weights inside, and of a plan whose weights stay in the graph's own weight file."""


def slug(text: str) -> str:
    """Turn a text into a part of a file name: all but letters, digits and dots become hyphens."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-")


class TrtBackend(Backend):
    """TensorRT, or TensorRT for RTX.

    Attributes:
        module: name of the Python module.
        extra: the difftap extra that installs it.
        cuda_graphs: whether difftap captures small batches as CUDA graphs; one of the libraries does so itself.
    """

    module: ClassVar[str]
    extra: ClassVar[str]
    cuda_graphs: ClassVar[bool] = False

    def bindings(self) -> ModuleType:
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
        # Casts around the softmax would keep TensorRT from fusing attention into one kernel. That kernel sums in
        # float32 anyway.
        return f"{profile.precision}-half" if profile.precision in ("fp16", "bf16") else "fp32"

    def settings(self, device: str, strip: bool, cache: Path) -> BuildSettings:
        """Say how to build for a device.

        Args:
            device: one of `devices`.
            strip: leave the weights out of the plan.
            cache: a folder for files that make later builds faster.
        """
        return BuildSettings(strip)

    def build(
        self, graph: Graph, profile: Profile, device: str, folder: Path, calibration: Calibration | None = None
    ) -> Mapping[str, object]:
        began = time.perf_counter()
        # Stripped plans share one copy of the weights, which are gigabytes. But building one runs a few kernels and so
        # needs a GPU; without a GPU the weights go into the plan.
        strip = find_gpu() is not None
        size = self._write(graph, profile, device, folder, strip)
        if strip:
            try:  # not every plan takes its weights back
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

    def _deserialise(self, graph: Graph, folder: Path, log: TrtLog) -> ICudaEngine:
        """Open the engine in a built folder, and put its weights back if the plan is stripped.

        Raises:
            BackendError: the plan cannot be opened, or its weights cannot be put back.
        """
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
        """Make the memory for an engine's buffers."""
        return GpuMemory()

    def context(self, engine: ICudaEngine, built: Path) -> tuple[IExecutionContext | None, Callable[[], None]]:
        """Make an execution context, and a function to call when the engine is closed.

        Args:
            engine: the opened engine.
            built: its folder; files kept for later openings go beside it.
        """
        return engine.create_execution_context(), lambda: None
