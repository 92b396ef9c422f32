"""PCK's arithmetic: by hand, and by laws that hold for all inputs."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from difftap.bench.pck import Tally, aggregate, box_side, draws, extent, intervals, rival, within
from difftap.errors import InputError

distances = arrays(np.float64, st.integers(0, 12), elements=st.floats(0, 300))


def tally(points, hits, members=None, classes=("a", "b")):
    points = np.array(points, np.int64)
    hits = np.array(hits, np.int64).reshape(len(points), -1 if len(points) else 1)
    return Tally(classes, np.array(members if members is not None else np.zeros(len(points)), np.int64), points, hits)


@pytest.mark.parametrize(("strict", "expected"), [(False, [True, True, False]), (True, [True, False, False])])
@pytest.mark.parametrize(("length", "alpha"), [(70, 0.1), (60, 0.05), (140, 0.15), (300, 0.01), (37, 0.1)])
def test_on_the_threshold(strict, expected, length, alpha):
    """The threshold as a person would compute it, though 0.1 * 70 is 7.000000000000001 in binary."""
    exact = round(alpha * 1000) * length / 1000
    assert within([exact - 1e-3, exact, exact + 1e-3], length, [alpha], strict)[:, 0].tolist() == expected


def test_zero_threshold_takes_exact_hits_alone():
    assert within([0.0, 0.5], 0.0, [0.1], strict=False)[:, 0].tolist() == [True, False]
    assert within([0.0, 0.5], 0.0, [0.1], strict=True)[:, 0].tolist() == [False, False]


def test_what_was_not_found_is_never_right():
    assert not within([np.nan, np.inf], 1e9, [1.0], strict=False).any()
    assert within([], 10.0, [0.1, 0.2], strict=False).shape == (0, 2)


def test_extent():
    assert extent([[1, 2], [4, 9], [3, 3]]) == 7
    assert extent([[1, 2], [np.nan, np.nan], [5, 3], [np.inf, 0]]) == 4
    assert extent([[5, 6]]) == 0
    assert extent([]) == 0
    assert extent([[np.nan, np.nan]]) == 0


def test_box_side():
    assert box_side((-10.0, 5.0, 30.0, 25.0)) == 40  # also where it leaves the image
    assert box_side((5.0, 5.0, 5.0, 5.0)) == 0
    assert box_side((9.0, 9.0, 1.0, 1.0)) == 0


def test_rival_by_hand():
    found = np.array([[0.0, 0.0], [10.0, 0.0]])
    others = np.array([[0.0, 3.0], [10.0, 1.0], [np.nan, np.nan]])
    same = np.array([[True, False, False], [False, True, False]])
    np.testing.assert_allclose(rival(found, others, same), [np.hypot(10, 1), np.hypot(10, 3)])
    assert np.isinf(rival(found, np.zeros((0, 2)), np.zeros((2, 0), bool))).all()
    assert np.isinf(rival(found[:1], others[:1], same[:1, :1])).all()


def test_means_by_hand():
    """Pairs of 4, 1 and 2 points with 1, 1 and 0 right; a fourth has none."""
    counted = tally([4, 1, 2, 0], [1, 1, 0, 0], [0, 0, 1, 1])
    assert aggregate(counted, "image")[0] == pytest.approx((1 / 4 + 1 + 0) / 3)
    assert aggregate(counted, "point")[0] == pytest.approx(2 / 7)
    assert aggregate(counted, "class-image")[0] == pytest.approx(((1 / 4 + 1) / 2 + 0) / 2)
    assert aggregate(counted, "class-point")[0] == pytest.approx((2 / 5 + 0) / 2)


def test_empty_class_takes_no_part():
    counted = tally([2, 2], [1, 2], [0, 0], classes=("a", "empty"))
    assert aggregate(counted, "class-image")[0] == aggregate(counted, "image")[0]


def test_nothing_to_average():
    for by in ("image", "point", "class-image", "class-point"):
        assert np.isnan(aggregate(tally([], []).select(np.zeros(0, bool)), by)).all()
        assert np.isnan(aggregate(tally([0], [[0, 0]]), by)).all()
    low, _ = intervals(tally([0], [[0]]), "image", draws(1, 10))
    assert np.isnan(low).all()


def test_weights_are_repetitions():
    counted = tally([4, 1, 2], [[1], [1], [0]], [0, 1, 1])
    weights = np.array([[2, 0, 1], [0, 3, 0]])
    for by in ("image", "point", "class-image", "class-point"):
        for drawn, value in zip(weights, aggregate(counted, by, weights), strict=True):
            rows = np.repeat(np.arange(3), drawn)
            again = tally(counted.points[rows], counted.hits[rows], counted.members[rows])
            np.testing.assert_allclose(value, aggregate(again, by))


def test_draws_are_reproducible_and_sum_up():
    first = draws(30, 50, 7)
    np.testing.assert_array_equal(first, draws(30, 50, 7))
    assert (first.sum(axis=1) == 30).all()
    assert (first != draws(30, 50, 8)).any()
    assert draws(0, 3).shape == (3, 0)


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    rng = np.random.default_rng(0)
    weights = draws(60, 300)
    inside = 0
    for _ in range(100):
        low, high = intervals(tally(np.full(60, 5), rng.binomial(5, 0.4, (60, 1))), "image", weights)
        inside += bool(low[0] <= 0.4 <= high[0])
    assert 85 <= inside <= 100


@given(distances, st.floats(0, 500), st.booleans())
@settings(max_examples=60, deadline=None)
def test_monotone_in_alpha_and_equal_to_the_plain_rule(distance, length, strict):
    alphas = [0.01, 0.05, 0.1, 0.15, 0.5]
    right = within(distance, length, alphas, strict)
    assert (np.diff(right.astype(int), axis=1) >= 0).all()
    for k, alpha in enumerate(alphas):
        clear = np.abs(distance - alpha * length) > 1e-6
        plain = distance < alpha * length if strict else distance <= alpha * length
        assert (right[clear, k] == plain[clear]).all()


@st.composite
def tallies(draw):
    points = draw(arrays(np.int64, st.integers(1, 10), elements=st.integers(0, 9)))
    hits = np.array([draw(st.integers(0, int(n))) for n in points]).reshape(-1, 1)
    return tally(points, hits, draw(arrays(np.int64, len(points), elements=st.integers(0, 1))))


@given(tallies(), st.randoms())
@settings(max_examples=60, deadline=None)
def test_laws_of_means(counted, random):
    order = list(range(len(counted.points)))
    random.shuffle(order)
    for by in ("image", "point", "class-image", "class-point"):
        value = aggregate(counted, by)
        shuffled = Tally(counted.classes, counted.members[order], counted.points[order], counted.hits[order])
        np.testing.assert_allclose(value, aggregate(shuffled, by), equal_nan=True)
        assert np.isnan(value).all() or ((value >= 0).all() and (value <= 1).all())
    some = counted.points > 0
    if some.any():  # per point is per image weighted by points
        shares = counted.hits[some, 0] / counted.points[some]
        np.testing.assert_allclose(aggregate(counted, "point")[0], np.average(shares, weights=counted.points[some]))


def test_bad_values():
    with pytest.raises(InputError, match="aggregate is 'mean'"):
        aggregate(tally([1], [1]), "mean")
    with pytest.raises(InputError, match="more points right"):
        tally([1], [2])
    with pytest.raises(InputError, match="level is 1"):
        intervals(tally([1], [1]), "image", draws(1, 2), 1)
