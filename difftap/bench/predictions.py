"""Predictions: what was found for each pair, with everything that scoring needs, so that it needs no images or model.

Axis letters: N keypoints of a pair; M visible keypoints of its target.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from difftap.artifacts.files import JsonObject
from difftap.artifacts.run import read_run
from difftap.artifacts.table import plain
from difftap.coords import Size
from difftap.datasets.keypoints import Box, Sample
from difftap.errors import InputError
from difftap.matching import Matches

__all__ = ["SCHEMA", "Prediction", "Predictions", "load_predictions"]

SCHEMA = "difftap.bench.predictions/1"


@dataclass(frozen=True, eq=False)
class Prediction:
    """The ground truth of one pair and what was found. Points are x, y in pixels of the original images.

    Attributes:
        index: the pair's index in the data set's list.
        name: the pair's name.
        category: its class.
        source: the source image's file.
        target: the target image's file.
        mirrored: whether the target was flipped left to right.
        flags: the annotated difficulty of the pair.
        source_points: ``(N, 2)``, keypoints in the source.
        target_points: ``(N, 2)``, the same keypoints in the target.
        keypoint_ids: their N names.
        target_visible: ``(M, 2)``, all visible keypoints of the target.
        target_ids: their M names.
        target_size: ``(W, H)``.
        target_box: the target object's box, if annotated.
        found: ``(N, 2)``, the places found; NaN where the matcher found none.
        score: ``(N,)``, cosine; NaN if there is none.
        margin: ``(N,)``, best score minus the best one elsewhere; NaN if there is none.
        cycle_error: ``(N,)``, in pixels; NaN if there is none.
        clamped: number of source points outside their image, which were read at its border.
        error: why the whole pair could not be matched; None if it was.
    """

    index: int
    name: str
    category: str
    source: str
    target: str
    mirrored: bool
    flags: Mapping[str, int]
    source_points: NDArray[np.float64]
    target_points: NDArray[np.float64]
    keypoint_ids: tuple[str, ...]
    target_visible: NDArray[np.float64]
    target_ids: tuple[str, ...]
    target_size: Size
    target_box: Box | None
    found: NDArray[np.float64]
    score: NDArray[np.float64]
    margin: NDArray[np.float64]
    cycle_error: NDArray[np.float64]
    clamped: int = 0
    error: str | None = None

    @classmethod
    def of(cls, index: int, sample: Sample, found: Matches | None, clamped: int = 0, error: str = "") -> Prediction:
        """Join a sample with its matches, or with the reason why it has none."""
        count = len(sample.source_points)
        nothing = np.full(count, np.nan)
        return cls(
            index=index,
            name=sample.name,
            category=sample.category,
            source=str(sample.source),
            target=str(sample.target),
            mirrored=sample.mirrored,
            flags=dict(sample.flags),
            source_points=sample.source_points,
            target_points=sample.target_points,
            keypoint_ids=sample.keypoint_ids,
            target_visible=sample.target_visible,
            target_ids=sample.target_ids,
            target_size=sample.target_size,
            target_box=sample.target_box,
            found=np.full((count, 2), np.nan) if found is None else found.target,
            score=nothing if found is None else found.score,
            margin=nothing if found is None else found.margin,
            cycle_error=nothing if found is None else found.cycle_error,
            clamped=clamped,
            error=error or None,
        )

    def to_dict(self) -> JsonObject:
        """Give plain data for one line of JSON; NaN becomes None, and nothing is rounded."""
        return {"type": "pair", **plain(self)}

    @classmethod
    def from_dict(cls, data: JsonObject) -> Prediction:
        """Read what `to_dict` gave.

        Raises:
            InputError: a field is missing or has another shape.
        """
        try:
            values = {field.name: data[field.name] for field in dataclasses.fields(cls)}
            count = len(values["keypoint_ids"])
            for name in ("source_points", "target_points", "found"):
                values[name] = _array(values[name]).reshape(count, 2)
            values["target_visible"] = _array(values["target_visible"]).reshape(-1, 2)
            for name in ("score", "margin", "cycle_error"):
                values[name] = _array(values[name]).reshape(count)
            for name in ("keypoint_ids", "target_ids", "target_size"):
                values[name] = tuple(values[name])
            box = values["target_box"]
            values["target_box"] = None if box is None else tuple(box)
            return cls(**values)
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"a prediction lacks or misstates a field ({error}); make the predictions again"
            ) from error


def _array(value: object) -> NDArray[np.float64]:
    return np.array(value, np.float64)  # None becomes NaN


@dataclass(frozen=True)
class Predictions:
    """The predictions of one run.

    Attributes:
        conditions: everything that decided them: recipe, backend, versions, data set, matching.
        pairs: the predictions, in the data set's order.
    """

    conditions: JsonObject
    pairs: tuple[Prediction, ...]

    @property
    def dataset(self) -> str:
        """The data set's name, on which a protocol's basis depends."""
        return str(self.conditions["dataset"]["name"])


def load_predictions(path: Path) -> Predictions:
    """Read the predictions of a run, finished or not. Of a pair that was tried again, the last prediction counts.

    Raises:
        InputError: the file is no such run, or has another schema.
    """
    header, records = read_run(path, SCHEMA, "difftap bench pck")
    last = {pair.index: pair for pair in map(Prediction.from_dict, records)}
    pairs = [last[index] for index in sorted(last)]
    conditions = {key: value for key, value in header.items() if key not in ("type", "schema")}
    return Predictions(conditions, tuple(pairs))
