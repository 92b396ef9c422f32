"""The NVIDIA GPU of this machine, as torch sees it.

Torch is the engines' way to device memory, streams and CUDA graphs: every machine that runs a diffusion network on a
GPU has it, and its tensors go from one engine to the next without a copy. A GPU that torch cannot use counts as none.
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
        """For messages and manifests: ``NVIDIA L4 (8.9)``."""
        return f"{self.name} ({capability_text(self.capability)})"


def capability_text(capability: tuple[int, int]) -> str:
    """Write a compute capability as NVIDIA writes it."""
    return f"{capability[0]}.{capability[1]}"


@cache
def find_gpu() -> Gpu | None:
    """Find the first GPU; None if there is none, or torch is missing or was built without CUDA."""
    if not cuda_driver():  # then importing torch, which takes seconds, is vain
        return None
    try:
        import torch
    except (OSError, ImportError):
        return None
    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability(0)
    return Gpu(torch.cuda.get_device_name(0), (int(major), int(minor)))
