"""Mutual neighbours against a loop over all pairs, as vectors, as points and as self-found matches."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from difftap.coords import Geometry
from difftap.errors import InputError
from difftap.featuremap import FeatureMap
from difftap.matching import match_points, mutual_matches, mutual_nearest, nearest
from difftap.matching.interpolate import unit
from difftap.recipe import Matcher


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), count=st.integers(0, 12), size=st.integers(0, 12), block=st.integers(1, 40))
def test_both_ways_equal_loops(seed, count, size, block):
    rng = np.random.default_rng(seed)
    queries, bank = unit(rng.integers(-2, 3, (count, 3))), unit(rng.integers(-2, 3, (size, 3)))  # ties are common
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("difftap.matching.mutual._BLOCK_VALUES", block)
        indices, scores, reverse = nearest(queries, bank)
        pairs, pair_scores = mutual_nearest(queries, bank)
    table = [[round(float(q @ b), 9) for b in bank] for q in queries]
    ahead = [max(range(size), key=lambda m: row[m]) if size else -1 for row in table]  # max takes the first of equals
    back = [max(range(count), key=lambda n: table[n][m]) if count else -1 for m in range(size)]
    assert indices.tolist() == [[m] for m in ahead]
    assert reverse.tolist() == [[n] for n in back]
    assert pairs.tolist() == [[m] if size and back[m] == n else [-1] for n, m in enumerate(ahead)]
    for n, m in enumerate(ahead):
        assert scores[n, 0] == (pytest.approx(table[n][m], abs=1e-8) if size else -np.inf)
        assert pair_scores[n, 0] == (pytest.approx(table[n][m], abs=1e-8) if pairs[n, 0] >= 0 else -np.inf)


def pair(seed=0, image=(80, 60), other=(40, 90)):
    rng = np.random.default_rng(seed)
    source, target = (rng.standard_normal((6, 6, 8)).astype(np.float32) for _ in range(2))
    return FeatureMap(source, Geometry.stretch(image, (64, 48))), FeatureMap(target, Geometry.stretch(other, (64, 48)))


def slow_neighbours(source, target):
    """Nearest cell both ways by a loop: {cell: cell}, cells as (x, y)."""
    (_, h, w), (_, h2, w2) = source.data.shape, target.data.shape
    table = {}
    for y in range(h):
        for x in range(w):
            for y2 in range(h2):
                for x2 in range(w2):
                    a, b = source.data[:, y, x].astype(float), target.data[:, y2, x2].astype(float)
                    table[x, y, x2, y2] = a @ b / np.sqrt((a @ a) * (b @ b))
    cells, others = {k[:2] for k in table}, {k[2:] for k in table}
    ahead = {c: max(others, key=lambda o: table[*c, *o]) for c in cells}
    back = {o: max(cells, key=lambda c: table[*c, *o]) for o in others}
    return table, ahead, back


def test_self_found_equals_loop():
    source, target = pair()
    table, ahead, back = slow_neighbours(source, target)
    expected = sorted(((table[*c, *o], c, o) for c, o in ahead.items() if back[o] == c), reverse=True)
    matches = mutual_matches(source, target, Matcher("mutual"))
    assert 0 < len(matches) == len(expected) < 48
    for k, (score, (x, y), (x2, y2)) in enumerate(expected):
        assert matches.score[k] == pytest.approx(score)
        np.testing.assert_allclose(matches.source[k], [(x + 0.5) * 10 - 0.5, (y + 0.5) * 10 - 0.5])
        np.testing.assert_allclose(matches.target[k], [(x2 + 0.5) * 5 - 0.5, (y2 + 0.5) * 15 - 0.5])
        far = [table[x, y, *o] for o in back if np.hypot(o[0] - x2, o[1] - y2) > 2]
        assert matches.margin[k] == pytest.approx(score - max(far))
    assert (matches.cycle_error == 0).all()


def test_as_matcher_equals_loop():
    source, target = pair(3)
    table, ahead, back = slow_neighbours(source, target)
    cells = sorted(ahead)
    offset = np.random.default_rng(0).uniform(-4.9, 4.9, (len(cells), 2))  # anywhere in the cell
    points = (np.array(cells) + 0.5) * 10 - 0.5 + offset
    matches = match_points(source, target, points, Matcher("mutual"))
    refused = 0
    for k, cell in enumerate(cells):
        x2, y2 = ahead[cell]
        if back[x2, y2] != cell:
            refused += 1
            assert np.isnan(matches.target[k]).all()
            assert np.isnan([matches.score[k], matches.margin[k], matches.cycle_error[k]]).all()
            continue
        np.testing.assert_allclose(matches.target[k], [(x2 + 0.5) * 5 - 0.5, (y2 + 0.5) * 15 - 0.5])
        assert matches.score[k] == pytest.approx(table[*cell, x2, y2])
        assert matches.cycle_error[k] == pytest.approx(np.hypot(*offset[k]))
    assert 0 < refused < len(cells)


def test_identity_matches_every_cell_to_itself():
    source, _ = pair()
    matches = mutual_matches(source, source, Matcher("dense"))
    assert len(matches) == 48
    assert matches.source.tolist() == matches.target.tolist()
    assert (np.diff(matches.score) <= 0).all()
    np.testing.assert_allclose(matches.score, 1.0)
    # Dense leads back to a whole pixel beside the cell's centre, which lies between four. Beyond the outermost centres
    # the enlarged map is constant, so there the tie goes to the first of the border's pixels.
    inner = ((matches.source > 5) & (matches.source < [74, 54])).all(axis=1)
    assert inner.sum() == 24
    np.testing.assert_allclose(matches.cycle_error[inner], np.hypot(0.5, 0.5))


def test_padding_takes_no_part_and_centres_stay_inside():
    rng = np.random.default_rng(1)
    data = rng.standard_normal((5, 8, 8)).astype(np.float32)
    boxed = FeatureMap(data, Geometry.letterbox((3, 40), (64, 64)))  # content: 5 of 64 columns, within one or two cells
    matches = mutual_matches(boxed, boxed, Matcher("mutual"))
    assert 8 <= len(matches) <= 16
    for points in (matches.source, matches.target):
        assert (points >= 0).all()
        assert (points <= [2, 39]).all()


def test_errors():
    source, _ = pair()
    other = FeatureMap(np.ones((2, 3, 3), np.float32), source.geometry)
    with pytest.raises(InputError, match=r"6 channels .* 2;"):
        mutual_matches(source, other, Matcher("mutual"))
    broken = FeatureMap(np.full((6, 3, 3), np.inf, np.float32), source.geometry)
    with pytest.raises(InputError, match="NaN or infinity"):
        mutual_matches(source, broken, Matcher("mutual"))
