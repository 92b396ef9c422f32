"""Figures from papers, shown beside ours; every such row is labelled as published, so that nobody takes it for ours.

Values are fractions. ``conditions`` names what a paper does not say (per image or per point, which threshold).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from difftap.artifacts.files import JsonObject

__all__ = ["PUBLISHED", "SPAIR_CLASSES", "SPAIR_TEST_PAIRS", "TEST_PAIRS", "PublishedRow", "comparable", "published"]

SPAIR_CLASSES = {
    "aeroplane": "aero",
    "bicycle": "bike",
    "bird": "bird",
    "boat": "boat",
    "bottle": "bottle",
    "bus": "bus",
    "car": "car",
    "cat": "cat",
    "chair": "chair",
    "cow": "cow",
    "dog": "dog",
    "horse": "horse",
    "motorbike": "motor",
    "person": "person",
    "pottedplant": "plant",
    "sheep": "sheep",
    "train": "train",
    "tvmonitor": "tv",
}
"""SPair-71k's classes in the poster's order, with the poster's short names for its columns."""

SPAIR_TEST_PAIRS = dict(
    zip(
        SPAIR_CLASSES,
        (690, 650, 702, 702, 870, 644, 564, 600, 646, 640, 600, 600, 702, 650, 862, 664, 756, 692),
        strict=True,
    )
)
"""Number of pairs of each class in SPair-71k's test split, 12,234 in all."""


@dataclass(frozen=True)
class PublishedRow:
    """One published result.

    Attributes:
        method: its name in the paper.
        dataset: the data set and split.
        alpha: the threshold.
        value: PCK over all pairs, a fraction.
        by: ``image`` or ``point``; None if the source does not say.
        protocols: the protocols of `difftap.bench.protocols` that it was measured under, or that agree with everything
            known about how it was measured.
        conditions: averaging and threshold, as the paper says or as they must have been.
        source: a short name of the source.
        classes: class -> PCK, if the paper gives it; fractions.
    """

    method: str
    dataset: str
    alpha: float
    value: float
    by: str | None
    protocols: tuple[str, ...]
    conditions: str
    source: str
    classes: Mapping[str, float] | None = None

    @property
    def pairs(self) -> int:
        """The number of pairs of the whole test set, over which the figure was measured."""
        return TEST_PAIRS[self.dataset]

    def label(self, comparable: bool, mark: str = "") -> str:
        """Write the row's name with its source; if it is not comparable with ours, add ``mark`` or the reason."""
        note = "" if comparable else mark or f"; not comparable: of {self.pairs:,} pairs"
        return f"{self.method} (published, {self.source}{note})"


TEST_PAIRS = {"spair-test": 12234, "pf-willow": 900, "pf-pascal": 299}
"""Number of pairs of the whole test sets."""

_POSTER = "poster"
"""Using Multiple Latent Layers in Stable Diffusion for Image Semantic Matching."""
_POSTER_CONDITIONS = "per image, <= alpha x box [inferred: All is weighted by pairs; the frame is not said]"
_POSTER_ROWS = {  # in the order of SPAIR_CLASSES, then All; percent, as printed
    "DIFT": "45.78 37.01 59.23 17.80 29.03 31.40 26.86 70.86 24.44 "
    "52.44 37.90 41.87 33.09 31.46 31.11 29.30 43.78 32.77 37.26",
    "DIFT bicubically upsampled": "46.67 40.04 63.09 18.44 29.86 32.42 27.62 72.31 26.99 "
    "54.80 39.75 42.26 34.30 33.51 34.89 29.53 46.17 35.85 39.09",
    "DIFT dual layer": "48.96 42.00 61.53 21.68 31.87 35.32 28.68 69.92 30.45 "
    "55.55 40.31 41.83 36.25 32.50 38.51 29.31 50.76 47.84 41.14",
    "SDMatch-Single": "61.04 47.34 62.65 41.72 42.09 61.55 57.47 71.96 48.91 "
    "64.36 51.58 55.44 46.88 56.64 44.13 36.64 65.58 56.41 53.64",
    "SDMatch-Class": "65.23 49.19 67.56 47.25 43.13 73.87 58.76 75.14 49.22 "
    "61.10 52.09 55.48 54.65 66.72 40.96 40.19 72.80 68.14 57.40",
    "SDMatch-CPM": "64.27 48.41 63.94 44.03 45.37 71.79 58.68 74.57 49.95 "
    "64.85 53.36 57.26 52.47 57.38 42.38 44.68 70.69 60.50 56.48",
    "dual Single": "65.82 54.59 68.64 48.70 42.10 76.43 69.96 76.99 61.55 "
    "72.34 60.25 60.14 58.54 65.33 51.19 48.57 75.24 73.38 62.18",
    "dual Class": "70.60 53.67 76.34 53.00 46.05 81.55 67.59 77.14 65.53 "
    "70.21 58.33 59.89 58.22 75.16 55.62 43.98 79.54 77.27 64.58",
    "dual CPM": "70.65 57.37 74.16 51.14 47.77 81.61 73.36 80.75 62.71 "
    "74.99 61.52 62.93 61.66 64.66 51.71 47.30 81.28 74.42 65.01",
}
_GEOAWARE = "per image, < alpha x box; table of GeoAware-SC (CVPR 2024)"
_WILLOW = "per point, alpha x the keypoints' extent"
_PASCAL = "alpha x image; image or point unstated"
_Figures = tuple[tuple[float, float], ...]
_OTHERS: tuple[tuple[str, str, str | None, str, str, _Figures], ...] = (
    ("DINOv2-B", "spair-test", "image", "geoaware", _GEOAWARE, ((0.01, 6.3), (0.05, 38.4), (0.10, 53.9))),
    ("DIFT", "spair-test", "image", "geoaware", _GEOAWARE, ((0.01, 7.2), (0.05, 39.7), (0.10, 52.9))),
    ("SD+DINO", "spair-test", "image", "geoaware", _GEOAWARE, ((0.01, 7.9), (0.05, 44.7), (0.10, 59.9))),
    ("GeoAware-SC zero-shot", "spair-test", "image", "geoaware", _GEOAWARE, ((0.01, 8.9), (0.05, 48.7), (0.10, 64.2))),
    (
        "GeoAware-SC supervised",
        "spair-test",
        "image",
        "geoaware",
        _GEOAWARE,
        ((0.01, 21.6), (0.05, 72.6), (0.10, 82.9)),
    ),
    ("DIFT", "pf-willow", "point", "distilldift", _WILLOW, ((0.10, 76.4),)),
    ("SD+DINO", "pf-willow", "point", "distilldift", _WILLOW, ((0.10, 74.8),)),
    ("DINOv2", "pf-willow", "point", "distilldift", _WILLOW, ((0.10, 67.4),)),
    ("DIFT", "pf-pascal", None, "geoaware", _PASCAL, ((0.05, 66.0), (0.10, 81.1), (0.15, 87.2))),
)
_SOURCES = {"geoaware": "GeoAware-SC", "distilldift": "DistillDIFT [source inferred]"}


def _rows() -> tuple[PublishedRow, ...]:
    rows = []
    for method, figures in _POSTER_ROWS.items():
        *classes, value = (float(figure) / 100 for figure in figures.split())
        by_class = dict(zip(SPAIR_CLASSES, classes, strict=True))
        rows.append(
            PublishedRow(
                method,
                "spair-test",
                0.05,
                value,
                "image",
                ("dift", "sd4match"),
                _POSTER_CONDITIONS,
                _POSTER,
                by_class,
            )
        )
    for method, dataset, by, protocol, conditions, values in _OTHERS:
        rows += [
            PublishedRow(method, dataset, alpha, percent / 100, by, (protocol,), conditions, _SOURCES[protocol])
            for alpha, percent in values
        ]
    return tuple(rows)


PUBLISHED = _rows()


def published(
    dataset: str, split: str, alpha: float, by: str | None = None, protocol: str | None = None
) -> list[PublishedRow]:
    """List the rows published for a split at a threshold.

    Args:
        dataset: the data set's name.
        split: the split.
        alpha: the threshold.
        by: keep rows with this averaging, and rows whose averaging is not known; None for all.
        protocol: keep rows measured under this protocol; None for all.
    """
    name = f"{dataset}-{split}" if dataset == "spair" else dataset
    return [
        row
        for row in PUBLISHED
        if row.dataset == name
        and split == "test"
        and abs(row.alpha - alpha) < 1e-9
        and (by is None or row.by in (by, None))
        and (protocol is None or protocol in row.protocols)
    ]


def comparable(results: Mapping[str, JsonObject], row: PublishedRow) -> bool:
    """Tell whether a run scored the whole test set, as the published figure did."""
    return int(results["counts"]["pairs_scored"]) == row.pairs
