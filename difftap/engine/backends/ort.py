"""ONNX Runtime, the default backend: CPU, and CUDA if onnxruntime-gpu is installed and finds a device."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from difftap.engine.backend import Array, Backend, DeviceArray, Engine, Graph, Profile, Value
from difftap.errors import BackendError, first_line
from difftap.machine import cuda_driver

if TYPE_CHECKING:
    from onnxruntime import InferenceSession, OrtValue

_LOG = logging.getLogger("difftap")
_PROVIDERS = {"cuda": "CUDAExecutionProvider", "cpu": "CPUExecutionProvider"}
_QUIET = 3  # onnxruntime's log level for errors


class OrtArray(DeviceArray):
    """An OrtValue, on the host or on a GPU."""

    def __init__(self, value: OrtValue) -> None:
        self.value = value
        self.shape = tuple(value.shape())
        self.dtype = np.dtype(np.float32)

    def numpy(self) -> Array:
        return np.asarray(self.value.numpy())


class OrtEngine(Engine):
    """One ONNX Runtime session. I/O binding lets values stay in the device's memory between engines."""

    chains = True

    def __init__(self, graph: Graph, profile: Profile, device: str, session: InferenceSession) -> None:
        super().__init__(graph, profile, device)
        self._session: InferenceSession | None = session

    def _bound_run(self, feeds: Mapping[str, Value], device: str) -> list[OrtValue]:
        """Run once, and give the outputs on ``device``, in the order of `outputs`."""
        if self._session is None:
            raise BackendError(f"the engine of {self.graph.name} is closed; open it again")
        # The exporter drops inputs that no tap depends on (a prompt, for a tap before the first attention).
        used = {value.name for value in self._session.get_inputs()}
        try:
            binding = self._session.io_binding()
            held = []  # a binding stores only the address of an array, so the arrays are kept alive here
            for name in used:
                value = feeds[name]
                if isinstance(value, OrtArray):
                    binding.bind_ortvalue_input(name, value.value)
                else:
                    held.append(np.ascontiguousarray(value.numpy() if isinstance(value, DeviceArray) else value))
                    binding.bind_cpu_input(name, held[-1])
            for spec in self.outputs:
                binding.bind_output(spec.name, device)
            self._session.run_with_iobinding(binding)
            return list(binding.get_outputs())
        except Exception as error:  # onnxruntime's exceptions share no base class
            raise BackendError(f"onnxruntime failed on {self.graph.name}: {first_line(error)}") from error

    def _run(self, feeds: Mapping[str, Value]) -> dict[str, Array]:
        values = self._bound_run(feeds, "cpu")
        return {spec.name: np.asarray(value.numpy()) for spec, value in zip(self.outputs, values, strict=True)}

    def _run_on_device(self, feeds: Mapping[str, Value]) -> dict[str, Value]:
        values = self._bound_run(feeds, self.device)
        return {spec.name: OrtArray(value) for spec, value in zip(self.outputs, values, strict=True)}

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

        present = onnxruntime.get_available_providers()  # what was compiled in, whatever the machine has
        found = (device for device, provider in _PROVIDERS.items() if provider in present)
        return tuple(device for device in found if device != "cuda" or cuda_driver())

    def version(self) -> str:
        import onnxruntime

        return str(onnxruntime.__version__)

    def precisions(self, device: str) -> tuple[str, ...]:
        return ("fp32", "fp16") if device == "cuda" else ("fp32",)

    def graph_precision(self, profile: Profile, device: str) -> str:
        return f"{profile.precision}-fused" if device == "cuda" else profile.precision

    def fused_attention(self, device: str) -> bool:
        return device == "cuda"

    def open(
        self, graph: Graph, profile: Profile, device: str, threads: int | None, built: Path | None = None
    ) -> Engine:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = _QUIET
        options.use_deterministic_compute = True  # the same input must give the same bytes
        options.intra_op_num_threads = threads or 0  # 0: one a physical core
        # With known lengths onnxruntime can fold the graph's arithmetic on shapes. The batch stays free.
        for letter, length in profile.axes(graph.model).items():
            options.add_free_dimension_override_by_name(letter, length)
        wanted = _PROVIDERS[device]
        providers: list[str | tuple[str, dict[str, str]]] = [_PROVIDERS["cpu"]]
        if device == "cuda":
            # TF32 would be fp32 only by name. An algorithm chosen by timing could differ from run to run, and with it
            # the features' last digits.
            providers.insert(0, (wanted, {"use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"}))
        try:
            session = onnxruntime.InferenceSession(str(graph.path), options, providers=providers)
        except Exception as error:
            raise BackendError(f"onnxruntime cannot open '{graph.path}': {first_line(error)}") from error
        if wanted not in session.get_providers():
            device = "cpu"
            # onnxruntime falls back silently if a CUDA library is missing or of another version.
            _LOG.warning(
                "onnxruntime could not use %s and fell back to %s; check that the CUDA and cuDNN libraries that this "
                "onnxruntime-gpu was built for are installed",
                wanted,
                ", ".join(session.get_providers()),
            )
        return OrtEngine(graph, profile, device, session)
