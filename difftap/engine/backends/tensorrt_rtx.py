"""TensorRT for RTX: engines are built ahead of time, on any machine, for GeForce and RTX GPUs.

A plan fits all GPUs that it was built for. When it is opened, kernels are compiled for the GPU of the machine, and are
kept in a runtime cache beside the plan. Devices: ``cuda`` is compute capability 8.0 and newer; ``cuda-turing`` is 7.5,
which needs its own plan and has no fp32 matrix products.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from difftap.artifacts.files import write_atomic
from difftap.engine.backend import Profile
from difftap.engine.trt.bindings import TrtBackend, slug
from difftap.engine.trt.gpu import capability_text, find_gpu
from difftap.engine.trt.plans import BuildSettings
from difftap.errors import BackendError, DifftapError

if TYPE_CHECKING:
    from tensorrt_rtx import IBuilderConfig, ICudaEngine, IExecutionContext

_LOG = logging.getLogger("difftap")
_TARGETS = {"cuda": ("8.0", "8.6", "8.9", "12.0", "12.1"), "cuda-turing": ("7.5",)}


class TensorRTRTXBackend(TrtBackend):
    """TensorRT for RTX."""

    name = "tensorrt-rtx"
    module = "tensorrt_rtx"
    extra = "tensorrt-rtx"

    def devices(self) -> tuple[str, ...]:
        gpu = find_gpu()
        return ("cuda-turing", "cuda") if gpu and gpu.capability == (7, 5) else ("cuda", "cuda-turing")

    def precisions(self, device: str) -> tuple[str, ...]:
        return ("fp32", "fp16", "bf16") if device == "cuda" else ("fp16",)

    def identity(self, profile: Profile, device: str) -> Mapping[str, object]:
        return {"compute_capabilities": list(_TARGETS[device])}

    def cannot_run(self, device: str) -> str | None:
        gpu = find_gpu()
        targets = ", ".join(_TARGETS[device])
        if gpu is None:
            return (
                f"engines of backend 'tensorrt-rtx' can be built here ('difftap engines build') but not run: torch "
                f"sees no NVIDIA GPU; they run on compute capability {targets}"
            )
        if capability_text(gpu.capability) in _TARGETS[device]:
            return None
        hint = "use backend 'tensorrt', or ort"
        if capability_text(gpu.capability) in (other := _TARGETS["cuda" if device == "cuda-turing" else "cuda-turing"]):
            hint = f"use --device {'cuda' if '8.0' in other else 'cuda-turing'}"
        elif gpu.capability == (9, 0):
            hint = "Hopper is not among the GPUs that TensorRT for RTX supports: use backend 'tensorrt'"
        return (
            f"engines of backend 'tensorrt-rtx' for {device} run on compute capability {targets}; here is {gpu.label}; "
            f"{hint}"
        )

    def settings(self, device: str, strip: bool, cache: Path) -> BuildSettings:
        trt = self.bindings()

        def configure(config: IBuilderConfig) -> None:
            wanted = [f"SM{capability.replace('.', '')}" for capability in _TARGETS[device]]
            config.num_compute_capabilities = len(wanted)
            for index, name in enumerate(wanted):
                known = getattr(trt.ComputeCapability, name, None)
                if known is None or not config.set_compute_capability(known, index):
                    raise BackendError(f"tensorrt_rtx {self.version()} cannot build for {name}; install a newer one")

        return BuildSettings(strip, configure)

    def context(self, engine: ICudaEngine, built: Path) -> tuple[IExecutionContext | None, Callable[[], None]]:
        trt, gpu = self.bindings(), find_gpu()
        config = engine.create_runtime_config()
        # Only few batch sizes occur, so kernels are compiled for each of them, and before the first run: by default
        # it would start with slower kernels while better ones are compiled in the background.
        config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
        config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        kernels = config.create_runtime_cache()
        path = built.with_name(f".{built.name}.{slug(gpu.label if gpu else 'none')}.kernels")
        before = path.read_bytes() if path.is_file() else b""
        if before and not kernels.deserialize(before):
            _LOG.debug("'%s' was made by another driver or version; compiling again", path)
        config.set_runtime_cache(kernels)

        def keep() -> None:
            try:
                after = bytes(kernels.serialize())
                if after != before:
                    write_atomic(path, after)
            except DifftapError as error:
                _LOG.warning("%s; opening this engine again will take as long", error)

        return engine.create_execution_context(config), keep
