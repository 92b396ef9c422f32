"""One annotated image pair: what every point-matching data set yields and every protocol scores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from difftap.coords import Size
from difftap.errors import InputError

__all__ = ["Box", "Sample"]

Box = tuple[float, float, float, float]
"""``(x1, y1, x2, y2)`` in pixels of the original image, as annotated; it may reach beyond the image."""


@dataclass(frozen=True, eq=False)
class Sample:
    """One annotated pair, in pixels of the original images.

    Attributes:
        name: unique within its data set, stable across runs.
        source: the source image's file.
        target: the target image's file.
        category: the class both objects belong to.
        source_points: ``(N, 2)``, the keypoints that are annotated in both images.
        target_points: ``(N, 2)``, where they are in the target.
        keypoint_ids: N names of those keypoints, shared by all pairs of the class.
        target_visible: ``(M, 2)``, every keypoint annotated in the target, in both images or not: PCK-dagger's rivals.
        target_ids: M names of those.
        source_size: ``(W, H)`` of the source image.
        target_size: ``(W, H)`` of the target image.
        source_box: the source object's box, if annotated.
        target_box: the target object's box, if annotated.
        flags: what the annotation says of the pair's difficulty (SPair-71k: ``viewpoint_variation``,
            ``scale_variation``, ``truncation``, ``occlusion``), as integers.
        mirrored: the target is to be flipped left to right before use; points and box are those of the flipped image.
    """

    name: str
    source: Path
    target: Path
    category: str
    source_points: NDArray[np.float64]
    target_points: NDArray[np.float64]
    keypoint_ids: tuple[str, ...]
    target_visible: NDArray[np.float64]
    target_ids: tuple[str, ...]
    source_size: Size
    target_size: Size
    source_box: Box | None = None
    target_box: Box | None = None
    flags: Mapping[str, int] = field(default_factory=dict)
    mirrored: bool = False

    def __post_init__(self) -> None:
        count = len(self.keypoint_ids)
        if self.source_points.shape != (count, 2) or self.target_points.shape != (count, 2):
            raise InputError(
                f"pair '{self.name}' has points {self.source_points.shape} and {self.target_points.shape} for {count} "
                "keypoint names; allowed: (N, 2) both"
            )
        if self.target_visible.shape != (len(self.target_ids), 2):
            raise InputError(
                f"pair '{self.name}' has {len(self.target_ids)} names for {self.target_visible.shape} points; "
                "allowed: (M, 2), one name a point"
            )
        if not (np.isfinite(self.source_points).all() and np.isfinite(self.target_points).all()):
            raise InputError(f"pair '{self.name}' has keypoints that are not finite; absent ones must be left out")
