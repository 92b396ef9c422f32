"""The NVIDIA GPU of this machine, as torch sees it.

TensorRT's engines use torch for device memory, streams and CUDA graphs: machines that run diffusion networks on a GPU
have torch, and its tensors pass from one engine to the next without a copy. So a GPU that torch cannot use counts as
none.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from difftap.machine import cuda_driver

__all__ = ["Gpu", "find_gpu"]


@dataclass(frozen=True)
class Gpu:
    """A GPU.

    Attributes:
        name: as its driver calls it.
        capability: its compute capability, such as ``(8, 9)``.
    """

    name: str
    capability: tuple[int, int]

    @property
    def label(self) -> str:
        """Name and capability, for messages and manifests: ``NVIDIA L4 (8.9)``."""
        return f"{self.name} ({capability_text(self.capability)})"


def capability_text(capability: tuple[int, int]) -> str:
    """Write a compute capability as NVIDIA does: ``8.9``."""
    return f"{capability[0]}.{capability[1]}"


@cache
def find_gpu() -> Gpu | None:
    """Find the first GPU; None if there is none, or if torch is missing or was built without CUDA."""
    if not cuda_driver():  # without the driver there is nothing to find, and importing torch takes seconds
        return None
    try:
        import torch
    except (OSError, ImportError):
        return None
    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability(0)
    return Gpu(torch.cuda.get_device_name(0), (int(major), int(minor)))
