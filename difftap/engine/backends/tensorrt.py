"""TensorRT, for all NVIDIA GPUs: engines are built on the GPU that runs them, or for others of its kind.

Devices: ``cuda`` builds for this model of GPU only, and is the fastest; ``cuda-same`` builds for all GPUs of its
compute capability; ``cuda-ampere`` builds for compute capability 8.0 and newer.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from difftap.artifacts.files import write_atomic
from difftap.engine.backend import Profile
from difftap.engine.trt.bindings import TrtBackend, slug
from difftap.engine.trt.gpu import capability_text, find_gpu
from difftap.engine.trt.plans import BuildSettings
from difftap.errors import DifftapError

if TYPE_CHECKING:
    from tensorrt import IBuilderConfig

_LOG = logging.getLogger("difftap")
_LEVELS = {"cuda": "NONE", "cuda-same": "SAME_COMPUTE_CAPABILITY", "cuda-ampere": "AMPERE_PLUS"}


class TensorRTBackend(TrtBackend):
    """TensorRT."""

    name = "tensorrt"
    module = "tensorrt"
    extra = "tensorrt"
    cuda_graphs = True

    def missing(self) -> str | None:
        lacking = super().missing()
        if lacking:
            return lacking
        if find_gpu() is None:
            return (
                "backend 'tensorrt' builds and runs on an NVIDIA GPU, and torch sees none here; "
                "backend 'tensorrt-rtx' builds without one, or use ort"
            )
        return None

    def precisions(self, device: str) -> tuple[str, ...]:
        gpu = find_gpu()
        return ("fp32", "fp16", "bf16") if gpu and gpu.capability >= (8, 0) else ("fp32", "fp16")

    def devices(self) -> tuple[str, ...]:
        gpu = find_gpu()
        return tuple(_LEVELS) if gpu and gpu.capability >= (8, 0) else ("cuda", "cuda-same")

    def identity(self, profile: Profile, device: str) -> Mapping[str, object]:
        gpu = find_gpu()
        if gpu is None:
            return {"gpu": None}
        made_for = {
            "cuda": gpu.label,
            "cuda-same": capability_text(gpu.capability),
            "cuda-ampere": "8.0 and newer",
        }
        return {"gpu": made_for[device]}

    def settings(self, device: str, strip: bool, cache: Path) -> BuildSettings:
        trt, gpu = self.bindings(), find_gpu()
        # A kernel is timed once and the result serves all resolutions and taps of the model. The file is named by
        # version and GPU, because timings of others do not apply.
        known = cache / f".{self.name}-{self.version()}.{slug(gpu.label if gpu else 'none')}.timings"

        def configure(config: IBuilderConfig) -> None:
            config.hardware_compatibility_level = getattr(trt.HardwareCompatibilityLevel, _LEVELS[device])
            content = known.read_bytes() if known.is_file() else b""
            timings = config.create_timing_cache(content)
            if content and not config.set_timing_cache(timings, False):  # of another driver, or damaged
                timings = config.create_timing_cache(b"")
            config.set_timing_cache(timings, False)

        def finish(config: IBuilderConfig) -> None:
            try:
                write_atomic(known, bytes(config.get_timing_cache().serialize()))
            except DifftapError as error:
                _LOG.warning("%s; the next build takes as long as this one", error)

        return BuildSettings(strip, configure, finish)
