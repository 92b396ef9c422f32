"""ONNX Runtime: CPU, and CUDA where onnxruntime-gpu finds a device. The default backend."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from difftap.engine.backend import Array, Backend, Engine, Graph, Profile
from difftap.errors import BackendError, first_line

_LOG = logging.getLogger("difftap")
_PROVIDERS = {"cuda": "CUDAExecutionProvider", "cpu": "CPUExecutionProvider"}
_QUIET = 3  # onnxruntime's log level for errors


class OrtEngine(Engine):
    """One ONNX Runtime session."""

    def __init__(self, graph: Graph, profile: Profile, device: str, session: Any) -> None:
        super().__init__(graph, profile, device)
        self._session: Any = session

    def _run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        if self._session is None:
            raise BackendError(f"the engine of {self.graph.name} is closed; open it again")
        # The exporter drops inputs that no tap depends on (a prompt, for a tap before the first attention).
        used = {value.name for value in self._session.get_inputs()}
        names = [spec.name for spec in self.outputs]
        try:
            values = self._session.run(names, {k: np.ascontiguousarray(v) for k, v in feeds.items() if k in used})
        except Exception as error:  # onnxruntime's exceptions share no base class
            raise BackendError(f"onnxruntime failed on {self.graph.name}: {first_line(error)}") from error
        return dict(zip(names, values, strict=True))

    def close(self) -> None:
        self._session = None


class OrtBackend(Backend):
    """ONNX Runtime."""

    name = "ort"

    def missing(self) -> str | None:
        try:
            import onnxruntime  # noqa: F401
        except ImportError as error:
            return (
                f"backend 'ort' needs onnxruntime, which cannot be imported ({error}); "
                "pip install onnxruntime (CPU) or onnxruntime-gpu (CUDA)"
            )
        return None

    def devices(self) -> tuple[str, ...]:
        import onnxruntime

        present = onnxruntime.get_available_providers()
        return tuple(device for device, provider in _PROVIDERS.items() if provider in present)

    def version(self) -> str:
        import onnxruntime

        return str(onnxruntime.__version__)

    def open(
        self, graph: Graph, profile: Profile, device: str, threads: int | None, built: Path | None = None
    ) -> Engine:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = _QUIET
        options.use_deterministic_compute = True
        options.intra_op_num_threads = threads or 0  # 0: one a physical core
        options.add_free_dimension_override_by_name("E", profile.ensemble)
        options.add_free_dimension_override_by_name("T", profile.tokens)
        stride = graph.model.latent_stride
        for letter, side in zip("WH", profile.size, strict=True):
            options.add_free_dimension_override_by_name(letter, side)
            options.add_free_dimension_override_by_name(letter.lower(), side // stride)
        wanted = _PROVIDERS[device]
        providers: list[Any] = [_PROVIDERS["cpu"]]
        if device == "cuda":
            # TF32 would be fp32 in name only, and an algorithm chosen by timing would differ from run to run.
            providers.insert(0, (wanted, {"use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"}))
        try:
            session = onnxruntime.InferenceSession(str(graph.path), options, providers=providers)
        except Exception as error:
            raise BackendError(f"onnxruntime cannot open '{graph.path}': {first_line(error)}") from error
        if wanted not in session.get_providers():
            device = "cpu"
            # onnxruntime falls back without a word when a CUDA library is missing or of another version.
            _LOG.warning(
                "onnxruntime could not use %s and fell back to %s; check that the CUDA and cuDNN libraries that this "
                "onnxruntime-gpu was built for are installed",
                wanted,
                ", ".join(session.get_providers()),
            )
        return OrtEngine(graph, profile, device, session)
