"""Statistics of distance sets against scipy and cases worked by hand."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from difftap.errors import InputError
from difftap.study.statistics import (
    SHAPIRO_LIMIT,
    DistanceSet,
    bootstrap_effect,
    bootstrap_means,
    box_figures,
    dunn_mean,
    dunn_minmax,
    kruskal_wallis,
    shapiro_wilk,
    trend_holds,
)

stats = pytest.importorskip("scipy.stats")

quarters = st.integers(-20, 20).map(lambda n: n / 4)
some = st.lists(quarters, min_size=1, max_size=12)


def test_box_by_hand():
    box = box_figures([7, 1, 2, 3, 4, 5, 30])
    assert (box.count, box.minimum, box.q1, box.median, box.q3, box.maximum) == (7, 1, 2.5, 4, 6, 30)
    assert (box.low, box.high, box.outliers) == (1, 7, 1)
    assert box.mean == pytest.approx(52 / 7)
    assert box.std == pytest.approx(np.std([7, 1, 2, 3, 4, 5, 30], ddof=1))


@settings(deadline=None)
@given(some)
def test_box_is_what_matplotlib_draws(values):
    cbook = pytest.importorskip("matplotlib.cbook")
    box, (drawn,) = box_figures(values), cbook.boxplot_stats(np.array(values))
    assert (box.q1, box.median, box.q3, box.low, box.high, box.outliers) == pytest.approx(
        (drawn["q1"], drawn["med"], drawn["q3"], drawn["whislo"], drawn["whishi"], len(drawn["fliers"]))
    )


def test_boxes_of_little():
    assert math.isnan(box_figures([]).mean)
    assert box_figures([]).count == 0
    assert math.isnan(box_figures([2.0]).std)
    assert box_figures([2.0]).high == 2


@settings(deadline=None)
@given(some, some)
def test_dunn_from_the_definition(a, b):
    between = [abs(x - y) for x, y in itertools.product(a, b)]
    within = [[abs(x - y) for x, y in itertools.combinations(one, 2)] or [0.0] for one in (a, b)]
    found = dunn_minmax(a, b)
    assert (found.apart, found.spread) == (min(between), max(map(max, within)))
    means = dunn_mean(a, b)
    assert means.apart == pytest.approx(abs(np.mean(a) - np.mean(b)))
    assert means.spread == pytest.approx(max(map(np.mean, within)), abs=1e-12)
    for one in (found, means):
        assert one.counts == (len(a), len(b))
        assert one.convention
        if one.spread > 1e-9:
            assert one.value == pytest.approx(one.apart / one.spread)


def test_dunn_without_spread_or_values():
    assert dunn_minmax([1.0], [3.0]).value == math.inf
    assert dunn_mean([1.0], [1.25]).value == math.inf  # however little lies between them
    assert math.isnan(dunn_minmax([1.0], [1.0]).value)
    assert math.isnan(dunn_mean([], [1.0]).value)
    assert math.isnan(dunn_minmax([1.0], []).value)


def test_overlap_leaves_nothing_of_minmax_and_much_of_mean():
    rng = np.random.default_rng(0)
    a, b = rng.normal(0, 1, 3000), rng.normal(1, 1, 3000)
    assert dunn_minmax(a, b).value < 0.001
    assert dunn_mean(a, b).value == pytest.approx(1 / (2 / math.sqrt(math.pi)), abs=0.1)  # mean |x - y| of normals


def test_shapiro_is_scipys():
    values = np.random.default_rng(0).exponential(1, 80)
    found, theirs = shapiro_wilk(values), stats.shapiro(values)
    assert (found.statistic, found.p) == (theirs.statistic, theirs.pvalue)
    assert (found.count, found.tested) == (80, 80)


def test_shapiro_of_many_tests_a_sample():
    values = np.random.default_rng(0).normal(0, 1, SHAPIRO_LIMIT + 1000)
    found = shapiro_wilk(values)
    assert (found.count, found.tested) == (SHAPIRO_LIMIT + 1000, SHAPIRO_LIMIT)
    assert found.p > 0.001
    assert found == shapiro_wilk(values)
    assert found != shapiro_wilk(values, seed=1)


def test_shapiro_where_there_is_nothing_to_test():
    for values in ([], [1.0, 2.0], [3.0] * 10):
        assert math.isnan(shapiro_wilk(values).p)
    with pytest.raises(InputError, match="limit is 6000"):
        shapiro_wilk([1.0, 2.0, 4.0], limit=6000)


@settings(deadline=None)
@given(st.lists(some, min_size=2, max_size=4))
def test_kruskal_is_scipys(sets):
    found = kruskal_wallis(*sets)
    if np.ptp(np.concatenate(sets)) == 0:
        assert math.isnan(found.p)
        return
    theirs = stats.kruskal(*sets)
    assert found.statistic == pytest.approx(theirs.statistic, abs=1e-9)
    assert found.p == pytest.approx(theirs.pvalue, abs=1e-9)
    assert found.epsilon_squared == pytest.approx(found.statistic / (sum(map(len, sets)) - 1))


def test_kruskal_by_hand():
    # Ranks 1 2 3 and 4 5 6: H = 12 / (6 * 7) * (6^2 / 3 + 15^2 / 3) - 3 * 7 = 27 / 7.
    found = kruskal_wallis([1, 2, 3], [10, 20, 30])
    assert found.statistic == pytest.approx(27 / 7)
    assert found.epsilon_squared == pytest.approx(27 / 35)
    assert found.counts == (3, 3)


def test_kruskal_with_empty_sets():
    assert math.isnan(kruskal_wallis([], [1.0]).p)
    assert kruskal_wallis([1, 2], [], [3, 4]).counts == (2, 0, 2)
    with pytest.raises(InputError, match="1 sets"):
        kruskal_wallis([1.0])


def test_trend():
    assert trend_holds({"scsi": 1, "scdi": 2, "dcsi": 3, "dcdi": 4})
    assert not trend_holds({"scsi": 1, "scdi": 3, "dcsi": 2, "dcdi": 4})
    assert trend_holds({"scsi": 1}) is None


@pytest.mark.parametrize("values", [[[1.0]], [math.nan], [math.inf]])
def test_what_is_no_set_of_distances(values):
    for function in (box_figures, shapiro_wilk, lambda v: dunn_mean(v, [1.0]), lambda v: kruskal_wallis([1.0], v)):
        with pytest.raises(InputError, match="finite"):
            function(values)


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
