"""The description of one tensor that goes into a network or comes out of it."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["TensorSpec"]


@dataclass(frozen=True)
class TensorSpec:
    """Name, dtype and shape of one input or output; a shape's letter is an axis that the profile or the feeds fix."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]
