"""Score the predictions of a run under every protocol that applies: PCK with counts and intervals, by class and flag.

Axis letters: N points of a pair; P pairs; K thresholds; B bootstrap draws.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from difftap.artifacts.files import JsonObject
from difftap.artifacts.table import plain
from difftap.bench.pck import Tally, aggregate, box_side, draws, extent, intervals, rival, within
from difftap.bench.predictions import Prediction, Predictions
from difftap.bench.protocols import AGGREGATES, Protocol, alpha_key
from difftap.matching.confidence import CONFIDENCES, RECALLS, auc, expected_error, precision_at_recall, reliability

__all__ = ["CURVE", "SCHEMA", "MeasuredPair", "Resampling", "measure", "reason_against", "score"]

SCHEMA = "difftap.bench.pck/1"
CURVE = tuple(i / 200 for i in range(1, 41))
"""Alphas of the curve of PCK over alpha: 0.005 to 0.2."""


@dataclass(frozen=True)
class Resampling:
    """How results are resampled and calibrated.

    Attributes:
        draws: number of bootstrap resamplings of the pairs.
        seed: seed of the resampling.
        level: level of the intervals, 0 to 1.
        alphas: further thresholds to score, besides each protocol's own.
    """

    draws: int = 1000
    seed: int = 0
    level: float = 0.95
    alphas: tuple[float, ...] = ()


@dataclass(frozen=True)
class MeasuredPair:
    """The distances of one pair under one protocol, in pixels of the protocol's frame.

    Attributes:
        distance: ``(N,)``, from each target keypoint to the place found; infinite where nothing was found.
        rival: ``(N,)``, from the place found to the nearest other visible keypoint.
        length: the length that alpha is a share of.
    """

    distance: NDArray[np.float64]
    rival: NDArray[np.float64]
    length: float

    def hits(self, alphas: Sequence[float], strict: bool) -> NDArray[np.bool_]:
        """Tell which points are right at each alpha, ``(N, K)``."""
        return within(self.distance, self.length, alphas, strict)

    def dagger(self) -> NDArray[np.bool_]:
        """Tell whether no other visible keypoint is nearer to the place found, ``(N,)``; equally near is allowed."""
        return self.distance <= self.rival + 1e-9


def reason_against(pairs: Sequence[Prediction], protocol: Protocol, dataset: str) -> str | None:
    """Give the reason why a protocol does not apply to these pairs; None if it applies."""
    basis = protocol.basis(dataset)
    if basis is None:
        return f"it has no threshold for data set '{dataset}'"
    if basis == "box" and any(pair.target_box is None for pair in pairs):
        return "its threshold is a share of the target's box, and some pairs have none"
    return None


def measure(pair: Prediction, protocol: Protocol, dataset: str) -> MeasuredPair:
    """Measure the distances of one pair; the protocol must apply (`reason_against`)."""
    size = pair.target_size
    truth = protocol.to_frame(pair.target_points, size)
    basis = protocol.basis(dataset)
    if basis == "box":
        assert pair.target_box is not None  # noqa: S101 - else reason_against gives a reason
        corners = protocol.to_frame(np.reshape(np.array(pair.target_box, np.float64), (2, 2)), size)
        length = box_side(corners.ravel().tolist())
    elif basis == "image":
        length = float(protocol.to_frame(np.array([size], np.float64), size).max())
    else:
        length = extent(truth)
    truth = protocol.clipped(truth)
    found = protocol.to_frame(pair.found, size)
    distance = np.linalg.norm(found - truth, axis=1)
    others = protocol.clipped(protocol.to_frame(pair.target_visible, size))
    same = np.array([[one == other for other in pair.target_ids] for one in pair.keypoint_ids], bool)
    nearest = rival(found, others, same.reshape(len(truth), len(others)))
    return MeasuredPair(np.where(np.isfinite(distance), distance, np.inf), nearest, length)


def score(predictions: Predictions, protocols: Sequence[Protocol], settings: Resampling | None = None) -> JsonObject:
    """Score a run under some protocols; give plain data, which docs/benchmark.md describes.

    Pairs without a prediction (because an image was missing, for example) are left out of every mean and are listed.
    """
    settings = settings or Resampling()
    good = [pair for pair in predictions.pairs if pair.error is None]
    weights = draws(len(good), settings.draws, settings.seed)  # one set of draws, so that all figures can be compared
    applied: dict[str, JsonObject] = {}
    refused: dict[str, str] = {}
    hits: dict[str, dict[str, list[int]]] = {}
    dataset = predictions.dataset
    for protocol in protocols:
        reason = reason_against(good, protocol, dataset)
        if reason:
            refused[protocol.name] = reason
            continue
        measured = [measure(pair, protocol, dataset) for pair in good]
        applied[protocol.name], hits[protocol.name] = _under(protocol, dataset, good, measured, weights, settings)
    return {
        "schema": SCHEMA,
        "conditions": dict(predictions.conditions),
        "counts": _counts(predictions),
        "bootstrap": {"unit": "pair", "draws": settings.draws, "seed": settings.seed, "level": settings.level},
        "protocols": applied,
        "not_applied": refused,
        "pairs": {
            "names": [pair.name for pair in good],
            "classes": [pair.category for pair in good],
            "points": [len(pair.target_points) for pair in good],
            "digests": [_digest(pair) for pair in good],
            "hits": hits,
        },
    }


def _digest(pair: Prediction) -> str:
    """Compute 8 hexadecimal digits of a pair's annotation; only pairs with the same digits may be compared."""
    listing = [pair.category, pair.mirrored, pair.target_size, pair.target_box, pair.keypoint_ids, pair.target_ids]
    points = [pair.source_points.tolist(), pair.target_points.tolist(), pair.target_visible.tolist()]
    return hashlib.sha256(json.dumps([listing, points]).encode()).hexdigest()[:8]


def _counts(predictions: Predictions) -> JsonObject:
    pairs = predictions.pairs
    failed = [pair for pair in pairs if pair.error is not None]
    good = [pair for pair in pairs if pair.error is None]
    listed = int(predictions.conditions.get("pairs", len(pairs)))
    return {
        "pairs_listed": listed,
        "pairs_pending": listed - len(pairs),
        "pairs_failed": len(failed),
        "pairs_without_points": sum(not len(pair.target_points) for pair in good),
        "pairs_scored": sum(len(pair.target_points) > 0 for pair in good),
        "points": sum(len(pair.target_points) for pair in good),
        "points_unmatched": sum(int((~np.isfinite(pair.found).all(axis=1)).sum()) for pair in good),
        "points_read_at_the_border": sum(pair.clamped for pair in good),
        "images": len({image for pair in good for image in (pair.source, pair.target)}),
        "failures": [{"pair": pair.name, "error": pair.error} for pair in failed],
    }


def _under(
    protocol: Protocol,
    dataset: str,
    pairs: Sequence[Prediction],
    measured: Sequence[MeasuredPair],
    weights: NDArray[np.uint16],
    settings: Resampling,
) -> tuple[JsonObject, dict[str, list[int]]]:
    """Score under one protocol; give the results, and the hits of each pair by alpha."""
    alphas = sorted({*protocol.thresholds(dataset), *settings.alphas})
    right = [one.hits(alphas, protocol.strict) for one in measured]
    dagger = [hit & one.dagger()[:, None] for hit, one in zip(right, measured, strict=True)]
    tally = _tally(pairs, right, len(alphas))
    strictly = _tally(pairs, dagger, len(alphas))
    curve = _tally(pairs, [one.hits(CURVE, protocol.strict) for one in measured], len(CURVE))
    flags = sorted({flag for pair in pairs for flag in pair.flags})
    everything = np.ones(len(pairs), bool)
    level = settings.level

    def cut(chosen: NDArray[np.bool_], which: Sequence[str]) -> JsonObject:
        return _figures(tally, chosen, weights, alphas, which, level)

    results = {
        "conditions": {
            **protocol.to_dict(),
            "alphas": list(protocol.thresholds(dataset)),
            "basis": protocol.basis(dataset),
        },
        "counts": {
            "pairs": int((tally.points > 0).sum()),
            "points": int(tally.points.sum()),
            "classes": len(tally.classes),
            "pairs_with_zero_threshold": sum(not one.length for one in measured),
        },
        "pck": cut(everything, AGGREGATES),
        "pck_dagger": _figures(strictly, everything, weights, alphas, AGGREGATES, level),
        "by_class": {name: cut(tally.members == k, ("image", "point")) for k, name in enumerate(tally.classes)},
        "by_flag": {
            flag: {
                str(value): cut(chosen, ("image", "point"))
                for value in sorted({pair.flags[flag] for pair in pairs if flag in pair.flags})
                for chosen in [np.array([pair.flags.get(flag) == value for pair in pairs], bool)]
            }
            for flag in flags
        },
        "curve": {
            "alphas": list(CURVE),
            **{by: plain(aggregate(curve, by)) for by in ("image", "point")},
        },
        "calibration": {
            alpha_key(alpha): calibrate(pairs, [hit[:, k] for hit in right], settings.seed)
            for k, alpha in enumerate(alphas)
        },
    }
    return results, {alpha_key(alpha): tally.hits[:, k].tolist() for k, alpha in enumerate(alphas)}


def _tally(pairs: Sequence[Prediction], right: Sequence[NDArray[np.bool_]], alphas: int) -> Tally:
    classes = tuple(sorted({pair.category for pair in pairs}))
    number = {name: k for k, name in enumerate(classes)}
    return Tally(
        classes,
        np.array([number[pair.category] for pair in pairs], np.int64),
        np.array([len(pair.target_points) for pair in pairs], np.int64),
        np.array([hit.sum(axis=0) for hit in right], np.int64).reshape(len(pairs), alphas),
    )


def _figures(
    tally: Tally,
    chosen: NDArray[np.bool_],
    weights: NDArray[np.uint16],
    alphas: Sequence[float],
    which: Sequence[str],
    level: float,
) -> JsonObject:
    """Give the values and intervals of the chosen pairs, by alpha and mean, with their counts."""
    part, drawn = tally.select(chosen), weights[:, chosen]
    figures: JsonObject = {"pairs": int((part.points > 0).sum()), "points": int(part.points.sum())}
    spans = {by: (aggregate(part, by), *intervals(part, by, drawn, level)) for by in which}
    for k, alpha in enumerate(alphas):
        figures[alpha_key(alpha)] = {
            by: {"value": plain(value[k]), "low": plain(low[k]), "high": plain(high[k])}
            for by, (value, low, high) in spans.items()
        }
    return figures


def calibrate(pairs: Sequence[Prediction], right: Sequence[NDArray[np.bool_]], seed: int = 0) -> JsonObject:
    """Measure how well each confidence separates right matches from wrong ones; give plain data.

    Matches without the confidence (it was not asked for, or nothing was found) are left out and counted.

    Args:
        pairs: the predictions.
        right: the hits of each pair at one threshold.
        seed: seed of the split into halves for ``calibration_error``.
    """
    hits = np.concatenate([np.zeros(0, bool), *right])
    stream = np.random.Generator(np.random.Philox(key=np.array([seed, 1], np.uint64)))
    side = stream.permutation(len(pairs)) % 2 == 0  # by pair, so that the matches of a pair are in the same half
    halves = np.repeat(side, [len(one) for one in right])
    result: JsonObject = {}
    for name, sign in CONFIDENCES.items():
        values = np.concatenate([np.zeros(0), *(getattr(pair, name) for pair in pairs)])
        known = np.isfinite(values)
        if not known.any():
            continue
        sure, good = sign * values[known], hits[known]
        curve = reliability(sure, good)
        bars = {f"{recall:g}": precision_at_recall(sure, good, recall) for recall in RECALLS}
        if sign < 0:  # undo the change of sign, so that numbers are the confidence's own
            for step in curve:
                step["low"], step["high"], step["mean"] = -step["high"], -step["low"], -step["mean"]
            for bar in bars.values():
                bar["threshold"] = -bar["threshold"]
        result[name] = {
            "matches": int(known.sum()),
            "left_out": int((~known).sum()),
            "right": float(good.mean()),
            "higher_is_surer": sign > 0,
            "auc": plain(auc(sure, good)),
            "calibration_error": plain(expected_error(sure, good, halves[known])),
            "reliability": curve,
            "precision_at_recall": {recall: plain(bar) for recall, bar in bars.items()},
        }
    return result
