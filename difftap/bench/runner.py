"""Make predictions from a recipe and annotated pairs, pair by pair and resumable; scoring comes afterwards.

Pairs are grouped by prompt (a prompt may hold ``{category}``) and are otherwise taken in the data set's order. Every
image goes through a branch once per prompt, and its maps stay in bounded memory as long as a pair needs them
(`difftap.features.keeper`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from difftap.artifacts.files import JsonObject
from difftap.artifacts.run import open_run
from difftap.bench.predictions import SCHEMA, Prediction
from difftap.datasets.keypoints import Sample
from difftap.errors import ImageError, InputError
from difftap.features.branchfiles import BranchFiles
from difftap.features.keeper import Generators, View
from difftap.features.requests import (
    MapRequest,
    MapSource,
    RequestedImage,
    match_requested,
    passes,
    request_pair,
)
from difftap.matching import MatchRule
from difftap.matching.rule import find
from difftap.pipeline.pipeline import Provider
from difftap.prompts import Prompt
from difftap.recipe import Recipe

__all__ = ["PredictRun", "finished", "order_of", "predict", "subset"]

_LOG = logging.getLogger("difftap")


@dataclass(frozen=True)
class PredictRun:
    """What a run did.

    Attributes:
        written: pairs that it wrote, including pairs that were tried again.
        failed: those of them that failed.
        skipped: pairs that an earlier run had written.
        images: images whose maps were prepared, counted once per set of prompts.
        passes: passes through the UNet: one for each image, branch and prompt that was not in the feature files.
        seconds: wall time of the run.
        served: images whose features came from a store.
        extracted: images that the store lacked; 0 without a store.
    """

    written: int
    failed: int
    skipped: int
    images: int
    passes: int
    seconds: float
    from_store: int = 0
    not_in_store: int = 0


def _requests(sample: Sample, recipe: Recipe) -> tuple[MapRequest, MapRequest]:
    return request_pair(recipe, View(sample.source), View(sample.target, sample.mirrored), sample.category)


def order_of(samples: Sequence[Sample], recipe: Recipe) -> list[int]:
    """Order pairs by the prompts of the recipe's branches: those of equal prompts together, as they first appear."""
    groups: dict[tuple[tuple[Prompt, ...], ...], list[int]] = {}
    for index, sample in enumerate(samples):
        groups.setdefault(tuple(request.prompts for request in _requests(sample, recipe)), []).append(index)
    return [index for indices in groups.values() for index in indices]


def count_passes(samples: Sequence[Sample], recipe: Recipe) -> int:
    """Count the different (image, branch, prompt): the passes through the UNet if no map is kept from earlier."""
    return len(passes([request for sample in samples for request in _requests(sample, recipe)]))


def subset(samples: Sequence[Sample], limit: int | None = None, per_class: int | None = None) -> list[Sample]:
    """Choose some pairs, in the list's order.

    Args:
        samples: all pairs.
        limit: take the first so many of the chosen pairs.
        per_class: first choose so many evenly spaced pairs of each class.
    """
    chosen = list(range(len(samples)))
    if per_class is not None:
        members: dict[str, list[int]] = {}
        for index, sample in enumerate(samples):
            members.setdefault(sample.category, []).append(index)
        chosen = sorted(
            indices[k * len(indices) // min(per_class, len(indices))]
            for indices in members.values()
            for k in range(min(per_class, len(indices)))
        )
    return [samples[index] for index in chosen[:limit]]


def finished(records: Sequence[JsonObject]) -> set[int]:
    """Find the pairs whose last record has no error; the others must be matched (again)."""
    last = {record["index"]: record.get("error") is None for record in records if "index" in record}
    return {index for index, good in last.items() if good}


def predict(
    pipeline: Provider,
    samples: Sequence[Sample],
    recipe: Recipe,
    output: Path,
    *,
    dataset: Mapping[str, object],
    rule: MatchRule,
    confidence: bool = True,
    overwrite: bool = False,
    memory: int = 2 << 30,
    features: Path | None = None,
    generators: Generators | None = None,
    progress: Callable[[int], None] = lambda count: None,
) -> PredictRun:
    """Match the keypoints of every pair and write them to a file of JSON lines.

    A pair that cannot be used (an image is missing, or does not have the annotated size) is recorded with the reason,
    and a later run tries it again.

    Args:
        pipeline: the open pipeline.
        samples: the pairs.
        recipe: the recipe of the features; its prompts may hold ``{category}``.
        output: the file of JSON lines; an unfinished run with the same conditions is continued.
        dataset: name, split and what else tells which pairs these are; the protocols' basis depends on ``name``.
        rule: how maps are joined and matched.
        confidence: also compute margin and cycle error, which doubles the cost of matching.
        overwrite: start again instead of continuing.
        memory: bytes of maps and norms kept in memory; more go to a scratch folder.
        features: a folder that keeps the branches' maps for later runs; None to keep nothing.
        generators: functions that write images which do not exist yet, by file.
        progress: called with the number of pairs finished since the last call.

    Raises:
        InputError: there is no pair, or features would be kept that no other pair can use.
        OutputError: the file cannot be written, belongs to a run with other conditions, or is being written.
    """
    if not samples:
        raise InputError(f"data set '{dataset.get('name')}' holds no pair to match; check its root and split")
    began = time.perf_counter()
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="difftap-")))
        # First, because these may raise, and nothing must be written then.
        files = BranchFiles.lasting(features, pipeline) if features else None
        planned = order_of(samples, recipe)
        conditions = {
            "schema": SCHEMA,
            **pipeline.conditions,
            "recipe": recipe.to_dict(),
            "recipe_key": recipe.key(),
            "matching": {"combine": rule.combine, "reading": rule.reading, "confidence": confidence},
            "dataset": dict(dataset),
            "pairs": len(samples),
            "pairs_sha256": digest(samples),
        }
        run = stack.enter_context(open_run(output, conditions, overwrite=overwrite))
        done = finished(run.earlier)
        rest = [index for index in planned if index not in done]
        requested = [_requests(samples[index], recipe) for index in rest]
        source = MapSource(pipeline, rule, [one for both in requested for one in both], scratch, files, generators)

        def match(place: int, first: RequestedImage, second: RequestedImage) -> Prediction:
            return _predict(rest[place], samples[rest[place]], first, second, confidence)

        results = match_requested(source, rule, requested, match, scratch=scratch, memory=memory, batch=pipeline.batch)
        progress(len(done))
        failed = 0
        for index, result in zip(rest, results, strict=True):
            if isinstance(result, str):
                _LOG.warning("pair %s: %s", samples[index].name, result)
                result = Prediction.of(index, samples[index], None, error=result)
                failed += 1
            run.write(result.to_dict())
            progress(1)
        seconds = time.perf_counter() - began
        counted = (len(rest), failed, len(done), source.made, source.passes, seconds)
        return PredictRun(*counted, pipeline.from_store, pipeline.not_in_store)


def digest(samples: Sequence[Sample]) -> str:
    """Compute the SHA-256 of everything that decides predictions and their scores; the files' folders do not count."""
    total = hashlib.sha256()
    for sample in samples:
        listing = [sample.name, sample.category, sample.source.name, sample.target.name, sample.mirrored]
        points = [sample.source_points.tolist(), sample.target_points.tolist(), sample.target_visible.tolist()]
        names = [list(sample.keypoint_ids), list(sample.target_ids)]
        rest = [sample.source_size, sample.target_size, sample.target_box, dict(sample.flags)]
        total.update(json.dumps([listing, points, names, rest], sort_keys=True).encode())
    return total.hexdigest()


def _predict(
    index: int, sample: Sample, source: RequestedImage, target: RequestedImage, confidence: bool
) -> Prediction:
    """Match a pair's keypoints.

    Raises:
        ImageError: an image has another size than annotated.
    """
    for one, size in ((source, sample.source_size), (target, sample.target_size)):
        if one.maps.size != tuple(size):
            raise ImageError(
                f"'{one.view.path}' has {one.maps.size[0]} x {one.maps.size[1]} pixels, its annotation says "
                f"{size[0]} x {size[1]}; get the data set's own images"
            )
    found, clamped = find(source.prepared, target.prepared, sample.source_points, sample.source_size, confidence)
    return Prediction.of(index, sample, found, clamped)
