"""Benchmark protocols as data: where distances are measured, which length a threshold is a share of, what is averaged.

The facts come from the public evaluation code of each system; ``inferred`` names what that code leaves open.
Predictions are in pixels of the original images, so one run can be scored under all protocols.

=============  =================================================================================
basis          the length that alpha is a share of
=============  =================================================================================
``box``        longer side of the target object's box as annotated, also where it leaves the image
``image``      longer side of the target image
``extent``     longer side of the box around the pair's target keypoints, finite ones only
=============  =================================================================================
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from difftap.coords import Size
from difftap.errors import InputError

__all__ = ["AGGREGATES", "BASES", "FRAMES", "PROTOCOLS", "Protocol", "alpha_key", "get_protocols"]

FRAMES = ("original", "square", "letterbox")
BASES = ("box", "image", "extent")
AGGREGATES = ("image", "point", "class-image", "class-point")
"""``image``: mean over pairs of each pair's share of right points; ``point``: share of all points; ``class-...``: mean
over classes of the same."""


@dataclass(frozen=True)
class Protocol:
    """How a benchmark scores.

    Attributes:
        name: its name in difftap.
        origin: the system whose evaluation it is.
        frame: where distances are measured: ``original`` pixels; ``square``: the image stretched to a square of
            ``side`` pixels; ``letterbox``: the image scaled so that its longer side has ``side`` pixels.
        side: side of the frame in pixels; 0 for ``original``.
        bases: data set's name -> basis; ``"*"`` stands for any other data set.
        strict: whether a point's distance must be below the threshold (``<``); otherwise it may be equal (``<=``).
        headline: the mean that the authors quote, one of `AGGREGATES`.
        alphas: the authors' thresholds, as shares of the basis.
        clip: target keypoints are moved into ``[clip, side - 1 - clip]`` of the frame; None does not move them.
        inferred: what the authors' code leaves open and is chosen here.
        own_alphas: data set's name -> the authors' thresholds, if they differ from ``alphas``.

    Raises:
        InputError: a value is not allowed.
    """

    name: str
    origin: str
    frame: str
    side: int
    bases: Mapping[str, str]
    strict: bool
    headline: str
    alphas: tuple[float, ...]
    clip: float | None = None
    inferred: tuple[str, ...] = ()
    own_alphas: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for what, got, allowed in (
            ("frame", self.frame, FRAMES),
            ("headline", self.headline, AGGREGATES),
            *(("basis", basis, BASES) for basis in self.bases.values()),
        ):
            if got not in allowed:
                raise InputError(f"protocol '{self.name}': {what} is {got!r}; allowed: {', '.join(allowed)}")
        if (self.side > 0) == (self.frame == "original"):
            raise InputError(f"protocol '{self.name}': side is {self.side}; allowed: 0 for original, else above 0")
        for alphas in (self.alphas, *self.own_alphas.values()):
            if not alphas or not all(0 < alpha < float("inf") for alpha in alphas):
                raise InputError(f"protocol '{self.name}': alphas are {alphas}; allowed: numbers above 0")

    def basis(self, dataset: str) -> str | None:
        """Give the basis on a data set; None if the protocol does not apply to it."""
        return self.bases.get(dataset, self.bases.get("*"))

    def thresholds(self, dataset: str) -> tuple[float, ...]:
        """Give the authors' alphas on a data set."""
        return self.own_alphas.get(dataset, self.alphas)

    def to_frame(self, points: NDArray[np.float64], size: Size) -> NDArray[np.float64]:
        """Scale points ``(N, 2)`` in original pixels of an image of ``(W, H)`` to the frame's pixels.

        Only differences between points are used, so the half-pixel shift and the letterbox's offset, which are the same
        for both points, are left out.
        """
        if self.frame == "original":
            return points
        scale = self.side / (np.array(size, np.float64) if self.frame == "square" else float(max(size)))
        return points * scale

    def clipped(self, points: NDArray[np.float64]) -> NDArray[np.float64]:
        """Move target keypoints ``(N, 2)`` into the frame, if the protocol does so."""
        return points if self.clip is None else np.clip(points, self.clip, self.side - 1 - self.clip)

    def to_dict(self) -> dict[str, object]:
        """Give every condition as plain data."""
        return {
            "name": self.name,
            "origin": self.origin,
            "frame": self.frame,
            "side": self.side,
            "bases": dict(self.bases),
            "comparison": "<" if self.strict else "<=",
            "headline": self.headline,
            "alphas": list(self.alphas),
            "clip": self.clip,
            "inferred": list(self.inferred),
        }


PROTOCOLS: Mapping[str, Protocol] = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            "dift",
            "DIFT (Tang et al., NeurIPS 2023), eval_spair.py",
            frame="original",
            side=0,
            bases={"spair": "box", "pf-pascal": "image", "pf-willow": "extent", "synthetic": "image", "*": "box"},
            strict=False,
            headline="image",
            alphas=(0.05, 0.10, 0.15),
            inferred=("its code covers SPair-71k at alpha 0.10 alone: other alphas, and the bases of other sets",),
        ),
        Protocol(
            "sd4match",
            "SD4Match (Li et al., CVPR 2024), utils/evaluator.py",
            frame="square",
            side=768,
            bases={"spair": "box", "pf-pascal": "image", "pf-willow": "extent", "synthetic": "image", "*": "box"},
            strict=False,
            headline="image",
            alphas=(0.05, 0.10, 0.15),
            clip=1e-4,
            inferred=("the basis of the synthetic set",),
        ),
        Protocol(
            "geoaware",
            "GeoAware-SC (Zhang et al., CVPR 2024), pck_train.py",
            frame="letterbox",
            side=960,
            bases={"spair": "box", "pf-pascal": "image", "pf-willow": "extent", "synthetic": "image", "*": "box"},
            strict=True,
            headline="image",
            alphas=(0.01, 0.05, 0.10),
            inferred=("the bases of PF-WILLOW and the synthetic set",),
            own_alphas={"pf-pascal": (0.05, 0.10, 0.15)},
        ),
        Protocol(
            "distilldift",
            "DistillDIFT (Fundel et al., WACV 2025), eval.py, PCK_bbox",
            frame="original",
            side=0,
            bases={"spair": "box", "pf-willow": "extent", "pf-pascal": "image", "synthetic": "image", "*": "box"},
            strict=False,
            headline="point",
            alphas=(0.05, 0.10),
            inferred=("alpha 0.05", "the bases of PF-PASCAL and the synthetic set"),
        ),
        Protocol(
            "distilldift-img",
            "DistillDIFT (Fundel et al., WACV 2025), eval.py, PCK_img",
            frame="original",
            side=0,
            bases={"*": "image"},
            strict=False,
            headline="point",
            alphas=(0.05, 0.10),
            inferred=("alpha 0.05",),
        ),
    )
}


def alpha_key(alpha: float) -> str:
    """Write a threshold as a key of the results: the shortest text that gives the same number.

    >>> alpha_key(0.10), alpha_key(0.1000001), alpha_key(1)
    ('0.1', '0.1000001', '1')
    """
    return repr(float(alpha)).removesuffix(".0")


def get_protocols(names: Sequence[str] = ()) -> list[Protocol]:
    """Find the protocols of these names; all protocols if none is given.

    Raises:
        InputError: there is no protocol of a name.
    """
    unknown = [name for name in names if name not in PROTOCOLS]
    if unknown:
        raise InputError(f"no protocol '{unknown[0]}'; allowed: {', '.join(PROTOCOLS)}")
    return [PROTOCOLS[name] for name in names] if names else list(PROTOCOLS.values())
