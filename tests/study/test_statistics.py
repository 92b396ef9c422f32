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
