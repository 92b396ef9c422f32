"""The bootstrap over images, against copies of the distances written out one by one."""

import math

import numpy as np
import pytest

from difftap.errors import InputError
from difftap.study.statistics import DistanceSet, bootstrap_effect, bootstrap_means

pytest.importorskip("scipy")


def study(images=12, seed=0, shift=1.0):
    """A few objects an image; distances within images and, further off, between them."""
    rng = np.random.default_rng(seed)
    levels = rng.normal(0, 0.3, images)
    near, far = [], []
    for i in range(images):
        near += [(rng.normal(2 + levels[i], 0.1), i, i) for _ in range(3)]
        far += [(rng.normal(2 + shift + levels[i] + levels[j], 0.1), i, j) for j in range(i + 1, images)]
    return DistanceSet(*map(np.array, zip(*near, strict=True))), DistanceSet(*map(np.array, zip(*far, strict=True)))


def draws_of(images, draws, seed):
    rng = np.random.default_rng(seed)
    return [np.bincount(rng.integers(0, images, images), minlength=images) for _ in range(draws)]


def copies(one, weights):
    """The values as often as the drawn images bring them."""
    values = []
    for value, i, j in zip(one.values, one.left, one.right, strict=True):
        values += [value] * int(weights[i] if i == j else weights[i] * weights[j])
    return np.array(values)


def test_means_against_copies_written_out():
    near, far = study()
    found = bootstrap_means({"near": near, "far": far}, draws=40, seed=3)
    slow = {name: [] for name in ("near", "far")}
    for weights in draws_of(12, 40, 3):
        slow["near"].append(copies(near, weights).mean())
        slow["far"].append(copies(far, weights).mean())
    for name, one in (("near", near), ("far", far)):
        interval = found.means[name]
        assert interval.value == pytest.approx(one.values.mean())
        assert (interval.low, interval.high) == pytest.approx(tuple(np.quantile(slow[name], [0.025, 0.975])))
        assert interval.draws == 40
    gap = np.array(slow["far"]) - np.array(slow["near"])
    difference = found.differences["near", "far"]
    assert (difference.low, difference.high) == pytest.approx(tuple(np.quantile(gap, [0.025, 0.975])))
    assert found.trend == (gap > 0).mean()
    assert (found.images, found.draws, found.level) == (12, 40, 0.95)


def test_effect_against_copies_written_out():
    from difftap.study.statistics import kruskal_wallis

    near, far = study(8, shift=0.2)
    near = DistanceSet(np.round(near.values, 1), near.left, near.right)  # ties
    far = DistanceSet(np.round(far.values, 1), far.left, far.right)
    found = bootstrap_effect(near, far, draws=20, seed=5)
    slow = [kruskal_wallis(copies(near, w), copies(far, w)).epsilon_squared for w in draws_of(8, 20, 5)]
    assert found.value == pytest.approx(kruskal_wallis(near.values, far.values).epsilon_squared)
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(slow, [0.025, 0.975])))


def test_shared_images_make_the_interval_wider_than_independent_pairs_would():
    _, far = study(20)
    spread = bootstrap_means({"far": far}, draws=400).means["far"]
    naive = 2 * 1.96 * far.values.std() / math.sqrt(len(far))
    assert spread.high - spread.low > 2 * naive


def test_the_same_seed_gives_the_same_and_another_does_not():
    near, far = study()
    first = bootstrap_means({"near": near, "far": far}, draws=20)
    assert first == bootstrap_means({"near": near, "far": far}, draws=20)
    assert first != bootstrap_means({"near": near, "far": far}, draws=20, seed=1)


def test_images_without_distances_are_not_drawn():
    one = DistanceSet([1.0, 3.0], [5, 9], [5, 9])
    found = bootstrap_means({"one": one}, draws=200)
    assert found.images == 2
    assert found.means["one"].draws == 200
    assert (found.means["one"].low, found.means["one"].high) == (1, 3)


def test_empty_sets_have_no_value():
    empty = DistanceSet([], [], [])
    one = DistanceSet([1.0], [0], [1])
    found = bootstrap_means({"one": one, "empty": empty}, draws=10)
    assert math.isnan(found.means["empty"].value)
    assert found.means["empty"].draws == 0
    assert math.isnan(found.trend)
    assert math.isnan(bootstrap_effect(one, empty, draws=5).value)
    assert math.isnan(bootstrap_effect(empty, empty, draws=5).low)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: DistanceSet([1.0], [0, 1], [0]), "shapes"),
        (lambda: DistanceSet([math.nan], [0], [0]), "finite"),
        (lambda: DistanceSet([1.0], [-1], [0]), "below 0"),
        (lambda: bootstrap_means({}), "no set"),
        (lambda: bootstrap_means({"a": DistanceSet([1.0], [0], [0])}, draws=0), "draws is 0"),
        (lambda: bootstrap_means({"a": DistanceSet([1.0], [0], [0])}, level=1.0), "level is 1.0"),
    ],
)
def test_what_is_not_allowed(call, words):
    with pytest.raises(InputError, match=words):
        call()


def test_effect_by_hand():
    """Three images with a distance each (1, 2, 3), and one of 10 between the first two.

    All images once: the ranks 1 2 3 and 4, less their mean 2.5, give (-1.5)^2 (1/3 + 1) / 5 = 0.6. Where the
    first is drawn twice and the second once (or the other way round) the 10 counts twice: the three near ranks sum to
    -3 around the mean, their squares with the far ones' to 9, and (-3)^2 (1/3 + 1/2) / 9 = 0.8333. In all other draws
    one set is empty. Of numpy's first 60 draws with seed 0, 11 are of the first kind and 7 of the second.
    """
    near, far = DistanceSet([1, 2, 3], [0, 1, 2], [0, 1, 2]), DistanceSet([10], [0], [1])
    found = bootstrap_effect(near, far, draws=60, seed=0)
    assert found.draws == 11 + 7
    assert (found.value, found.low, found.high) == pytest.approx((0.6, 0.6, 5 / 6))
    means = bootstrap_means({"near": near, "far": far}, draws=60, seed=0)
    assert means.differences["near", "far"].value == 8.0  # the second less the first
    assert (means.means["far"].draws, means.means["near"].draws) == (18, 60)
