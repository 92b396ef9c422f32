"""The backends by name. To add one, write one file in `difftap.engine.backends` and one line here."""

from __future__ import annotations

import importlib
from functools import cache

from difftap.engine.backend import Backend
from difftap.errors import BackendError, InputError

__all__ = ["BACKENDS", "check_precision", "choose_device", "get_backend"]

BACKENDS = {
    "ort": "difftap.engine.backends.ort:OrtBackend",
    "openvino": "difftap.engine.backends.openvino:OpenVinoBackend",
    "torch": "difftap.engine.backends.torch:TorchBackend",
    "tensorrt": "difftap.engine.backends.tensorrt:TensorRTBackend",
    "tensorrt-rtx": "difftap.engine.backends.tensorrt_rtx:TensorRTRTXBackend",
}


_REMOVED = {"torch-compile": "'difftap bench throughput --rivals dift-tuned' still measures compiled torch"}


@cache
def get_backend(name: str) -> Backend:
    """Get a backend by name. It may be unable to run here: `Backend.missing` tells.

    Raises:
        InputError: there is no such backend.
    """
    if name in _REMOVED:
        raise InputError(f"backend '{name}' is gone: {_REMOVED[name]}; allowed: {', '.join(BACKENDS)}")
    if name not in BACKENDS:
        raise InputError(f"no backend '{name}'; allowed: {', '.join(BACKENDS)}")
    module, kind = BACKENDS[name].split(":")
    backend: Backend = getattr(importlib.import_module(module), kind)()
    return backend


def choose_device(backend: Backend, device: str) -> str:
    """Choose a device: the backend's best one for ``auto``, else the one asked for.

    Raises:
        BackendError: the backend cannot be used here, or has no such device here.
    """
    lacking = backend.missing()
    if lacking:
        raise BackendError(lacking)
    present = backend.devices()
    if device == "auto":
        return present[0]
    if device not in present:
        raise BackendError(f"backend '{backend.name}' has no device '{device}' here; present: {', '.join(present)}")
    return device


def check_precision(backend: Backend, device: str, precision: str) -> None:
    """Make sure that a backend can compute in a precision on a device.

    Raises:
        BackendError: it cannot.
    """
    allowed = backend.precisions(device)
    if precision not in allowed:
        raise BackendError(
            f"backend '{backend.name}' has no precision '{precision}' on {device}; allowed: {', '.join(allowed)}"
        )
