"""Calibration: by hand, against slow counting, and laws."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from difftap.bench.scoring import calibrate
from difftap.errors import InputError
from difftap.matching.confidence import (
    RECALLS,
    auc,
    expected_error,
    isotonic,
    precision_at_recall,
    reliability,
)
from tests.bench.pck_cases import prediction, random_pairs

matches = st.lists(st.tuples(st.integers(0, 8), st.booleans()), min_size=1, max_size=40)


def slow_auc(confidence, right):
    good = [c for c, r in zip(confidence, right, strict=True) if r]
    bad = [c for c, r in zip(confidence, right, strict=True) if not r]
    return sum(1.0 if g > b else 0.5 if g == b else 0.0 for g in good for b in bad) / (len(good) * len(bad))


@given(matches)
@settings(max_examples=80, deadline=None)
def test_auc_is_the_share_of_ordered_couples(drawn):
    confidence, right = [c for c, _ in drawn], [r for _, r in drawn]
    if all(right) or not any(right):
        assert math.isnan(auc(confidence, right))
    else:
        assert auc(confidence, right) == pytest.approx(slow_auc(confidence, right))
        assert auc([-c for c in confidence], right) == pytest.approx(1 - auc(confidence, right))


@given(matches, st.integers(1, 12))
@settings(max_examples=60, deadline=None)
def test_reliability_covers_every_match_once(drawn, bins):
    confidence, right = [c for c, _ in drawn], [r for _, r in drawn]
    curve = reliability(confidence, right, bins)
    assert sum(step["count"] for step in curve) == len(drawn)
    assert sum(step["count"] * step["right"] for step in curve) == pytest.approx(sum(right))
    assert all(a["high"] < b["low"] for a, b in itertools.pairwise(curve))
    assert len(curve) <= bins


def test_reliability_by_hand():
    curve = reliability([0.1, 0.2, 0.3, 0.4], [False, False, True, True], 2)
    assert [(s["count"], s["mean"], s["right"]) for s in curve] == [
        (2, pytest.approx(0.15), 0.0),
        (2, pytest.approx(0.35), 1.0),
    ]
    assert reliability([], []) == []
    # Ties stay together, and go where their middle lies: three of four matches, their middle at 1.5 of 4.
    tied = reliability([0.5, 0.5, 0.5, 0.9], [False, True, False, True], 2)
    assert [(s["count"], s["low"], s["high"], s["right"]) for s in tied] == [
        (3, 0.5, 0.5, pytest.approx(1 / 3)),
        (1, 0.9, 0.9, 1.0),
    ]


def test_precision_at_recall_by_hand():
    confidence, right = [0.9, 0.8, 0.7, 0.6, 0.5], [True, False, True, True, False]
    half = precision_at_recall(confidence, right, 0.5)
    assert half == {"threshold": 0.7, "precision": pytest.approx(2 / 3), "recall": pytest.approx(2 / 3), "kept": 0.6}
    assert precision_at_recall(confidence, right, 1 / 3)["precision"] == 1
    assert precision_at_recall(confidence, right, 1.0)["threshold"] == 0.6
    assert all(math.isnan(v) for v in precision_at_recall(confidence, [False] * 5, 0.5).values())
    tied = precision_at_recall([1.0, 1.0, 0.0], [True, False, True], 0.5)
    assert (tied["kept"], tied["precision"]) == (pytest.approx(2 / 3), 0.5)  # ties are kept together


@given(matches)
@settings(max_examples=60, deadline=None)
def test_precision_at_full_recall_keeps_all_that_is_right(drawn):
    confidence, right = np.array([c for c, _ in drawn]), np.array([r for _, r in drawn])
    if right.any():
        bar = precision_at_recall(confidence, right, 1.0)
        kept = confidence >= bar["threshold"]
        assert right[~kept].sum() == 0
        assert bar["precision"] == pytest.approx(right[kept].mean())
        assert bar["kept"] == pytest.approx(kept.mean())


@given(matches)
@settings(max_examples=60, deadline=None)
def test_isotonic_rises_and_keeps_the_mean(drawn):
    confidence, right = np.array([c for c, _ in drawn], float), np.array([r for _, r in drawn])
    edges, steps = isotonic(confidence, right)
    assert (np.diff(edges) > 0).all()
    assert (np.diff(steps) > 0).all()
    fitted = steps[np.searchsorted(edges, confidence, side="right") - 1]
    assert fitted.mean() == pytest.approx(right.mean())


def test_isotonic_by_hand():
    edges, steps = isotonic([1, 2, 3, 4], [False, True, False, True])
    assert edges.tolist() == [1, 2, 4]
    assert steps.tolist() == [0, 0.5, 1]


def test_calibration_error_is_small_where_confidence_is_a_probability_and_large_where_halves_disagree():
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0, 1, 4000)
    halves = np.arange(4000) % 2 == 0
    assert expected_error(confidence, rng.uniform(0, 1, 4000) < confidence, halves) < 0.05
    assert expected_error(confidence, halves, halves) > 0.9
    assert math.isnan(expected_error(confidence, halves, np.zeros(4000)))


def test_calibration_error_by_hand():
    """One half teaches 0 at 1 and 1 at 2, the other 1 at both: predicted are 1 1 and 0 1, right are 0 1 and 1 1.

    The bin around 0 holds one match, predicted 0 and right; the bin around 1 three, predicted 3 and right 2.
    """
    right, halves = [False, True, True, True], [False, False, True, True]
    assert expected_error([1, 2, 1, 2], right, halves) == pytest.approx((1 + 1) / 4)


def test_calibrate_by_figure():
    pairs = random_pairs(0, 30)
    right = [pair.score > 0.5 for pair in pairs]
    result = calibrate(pairs, right)
    assert set(result) == {"score", "margin", "cycle_error"}
    assert result["score"]["auc"] == 1
    assert result["score"]["calibration_error"] < 0.1
    assert set(result["score"]["precision_at_recall"]) == {f"{r:g}" for r in RECALLS}
    near = calibrate(pairs, [pair.cycle_error < 3 for pair in pairs])["cycle_error"]
    assert near["auc"] == 1  # lower is surer
    assert 2 < near["precision_at_recall"]["1"]["threshold"] < 3
    assert near["reliability"][0]["mean"] > near["reliability"][-1]["mean"] > 0
    assert calibrate(pairs, right) == result


def test_figures_that_are_missing_are_left_out_and_counted():
    pairs = [prediction([[1, 1], [2, 2]], [[1, 1], [2, 2]], score=np.array([0.5, np.nan]))]
    result = calibrate(pairs, [np.array([True, True])])
    assert set(result) == {"score"}
    assert (result["score"]["matches"], result["score"]["left_out"]) == (1, 1)
    assert result["score"]["auc"] is None
    assert calibrate([], []) == {}


def test_bad_values():
    with pytest.raises(InputError, match="finite"):
        auc([np.nan], [True])
    with pytest.raises(InputError, match="recall is 0"):
        precision_at_recall([1.0], [True], 0)
    with pytest.raises(InputError, match="bins is 0"):
        reliability([1.0], [True], 0)
