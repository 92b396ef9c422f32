"""What was found for each pair, with all that scoring needs: predictions outlive the images and the model.

Axis letters: N keypoints of a pair; M visible keypoints of its target.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

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
    """One pair's ground truth and what was found. Points in pixels of the original images.

    Attributes:
        index: the pair's place in the data set's list.
        name: the pair's name.
        category: its class.
        source: the source image's file.
        target: the target image's file.
        mirrored: the target was flipped left to right.
        flags: what the annotation says of its difficulty.
        source_points: ``(N, 2)``.
        target_points: ``(N, 2)``.
        keypoint_ids: N names.
        target_visible: ``(M, 2)``.
        target_ids: M names.
        target_size: ``(W, H)``.
        target_box: the target object's box, if annotated.
        found: ``(N, 2)``; NaN where the matcher refused.
        score: ``(N,)`` cosine; NaN where there is none.
        margin: ``(N,)``; NaN where there is none.
        cycle_error: ``(N,)`` pixels; NaN where there is none.
        clamped: source points that lay outside their image and were read at its border.
        error: why nothing was found for the whole pair; None if all went well.
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
        """Join a sample with what was found for it, or with the reason why nothing was."""
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

    def to_dict(self) -> dict[str, Any]:
        """Plain data for one line of JSON; NaN becomes None, nothing is rounded."""
        return {"type": "pair", **plain(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Prediction:
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


def _array(value: Any) -> NDArray[np.float64]:
    return np.array(value, np.float64)  # None becomes NaN


@dataclass(frozen=True)
class Predictions:
    """One run's predictions.

    Attributes:
        conditions: recipe, backend, versions, data set, matching; everything that decided them.
        pairs: in the data set's order.
    """

    conditions: Mapping[str, Any]
    pairs: tuple[Prediction, ...]

    @property
    def dataset(self) -> str:
        """The data set's name, by which protocols choose their basis."""
        return str(self.conditions["dataset"]["name"])


def load_predictions(path: Path) -> Predictions:
    """Read a run's predictions, also of one that is not finished; of a pair tried again, the last one.

    Raises:
        InputError: the file is no such run, or of another schema.
    """
    header, records = read_run(path, SCHEMA, "difftap bench pck")
    last = {pair.index: pair for pair in map(Prediction.from_dict, records)}
    pairs = [last[index] for index in sorted(last)]
    conditions = {key: value for key, value in header.items() if key not in ("type", "schema")}
    return Predictions(conditions, tuple(pairs))
