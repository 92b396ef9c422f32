"""The bootstrap's two laws worked out by hand, and its draws as version 0.1.0 made them."""

import numpy as np
import pytest

from difftap.bench.bootstrap import check_draws, draw_counts, percentile_interval
from difftap.bench.pck import draws
from difftap.errors import InputError


class Scripted:
    def integers(self, low, high, size):
        assert (low, high, size) == (0, 4, 4)
        return np.array([3, 0, 3, 3])


def test_as_many_units_are_drawn_as_there_are():
    assert draw_counts(Scripted(), 4).tolist() == [1, 0, 0, 3]
    assert draw_counts(np.random.default_rng(0), 0).tolist() == []


def test_the_interval_leaves_the_same_share_out_on_both_sides():
    drawn = np.stack([np.arange(101.0), np.arange(101.0)[::-1] / 100], axis=1)
    low, high = percentile_interval(np.vstack([drawn, [[np.nan, np.nan]]]), 0.9)  # a draw without value has no say
    assert low == pytest.approx([5, 0.05])
    assert high == pytest.approx([95, 0.95])
    assert np.isnan(percentile_interval(np.full((3, 2), np.nan), 0.9)).all()


def test_draws_stay_those_of_earlier_versions():
    """Results are compared over the same draws: a seed must go on giving them."""
    assert draws(4, 3, 0).tolist() == [[0, 1, 1, 2], [1, 3, 0, 0], [2, 1, 1, 0]]
    assert draws(4, 3, 1).tolist() == [[1, 0, 1, 2], [1, 1, 1, 1], [0, 2, 0, 2]]


@pytest.mark.parametrize(
    ("count", "level", "what"), [(0, 0.9, "draws is 0"), (1, 0, "level is 0"), (1, 1, "level is 1")]
)
def test_what_makes_no_sense_is_refused(count, level, what):
    with pytest.raises(InputError, match=what):
        check_draws(count, level)
