"""Cell matchers against loops written from protocols.md sections 2 and 4."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from difftap.coords import Geometry
from difftap.featuremap import FeatureMap
from difftap.matching import kernel_softargmax, match_points, nearest_cell, softargmax, window_softargmax
from difftap.matching.grid import content_cells
from difftap.recipe import Matcher

PADDING = -np.inf


def slow_expectation(scores, temperature):
    """Mean (x, y) under the softmax of a (h, w) list of scores; padding weighs nothing."""
    total = x_sum = y_sum = 0.0
    for y, row in enumerate(scores):
        for x, value in enumerate(row):
            weight = math.exp(value / temperature) if value != PADDING else 0.0
            total, x_sum, y_sum = total + weight, x_sum + weight * x, y_sum + weight * y
    return x_sum / total, y_sum / total


def slow_peak(scores):
    best = (0, 0)
    for y in range(scores.shape[0]):
        for x in range(scores.shape[1]):
            if scores[y, x] > scores[best]:
                best = (y, x)
    return best


@st.composite
def similarities(draw):
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = draw(st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 9)))
    scores = rng.uniform(-1, 1, shape)
    rows, columns = draw(st.integers(0, shape[1] - 1)), draw(st.integers(0, shape[2] - 1))
    if draw(st.booleans()):
        scores[:, :rows], scores[:, :, :columns] = PADDING, PADDING
    return scores


@settings(max_examples=60, deadline=None)
@given(scores=similarities(), temperature=st.sampled_from([0.02, 0.04, 0.5]))
def test_soft_matchers_equal_loops(scores, temperature):
    soft = softargmax(scores, temperature)
    kernel = kernel_softargmax(scores, temperature, 2.5)
    window = window_softargmax(scores, temperature, 5)
    hard = nearest_cell(scores)
    for n, one in enumerate(scores):
        y0, x0 = slow_peak(one)
        bent, cut = one.copy(), one.copy()
        for y in range(one.shape[0]):
            for x in range(one.shape[1]):
                if one[y, x] == PADDING:
                    continue
                bent[y, x] *= math.exp(-((x - x0) ** 2 + (y - y0) ** 2) / (2 * 2.5**2))
                if max(abs(x - x0), abs(y - y0)) > 2:
                    cut[y, x] = 0.0
        assert hard[n].tolist() == [x0, y0]
        np.testing.assert_allclose(soft[n], slow_expectation(one, temperature), atol=1e-9)
        np.testing.assert_allclose(kernel[n], slow_expectation(bent, temperature), atol=1e-9)
        np.testing.assert_allclose(window[n], slow_expectation(cut, temperature), atol=1e-9)


def test_window_zeroes_rather_than_removes():
    scores = np.full((1, 1, 9), -0.9)
    scores[0, 0, 0] = 0.0
    np.testing.assert_allclose(window_softargmax(scores, 1e-3, 1), [[4.0, 0.0]])  # zero outside ties with the peak


def test_narrow_kernel_beside_padding_is_finite():
    scores = np.full((1, 1, 200), 0.5)
    scores[0, 0, 0], scores[0, 0, -1] = 0.9, PADDING
    assert np.isfinite(kernel_softargmax(scores, 0.04, 0.5)).all()


def test_empty():
    nothing = np.zeros((0, 3, 4))
    for cells in (nearest_cell(nothing), softargmax(nothing, 1.0), kernel_softargmax(nothing, 1.0, 1.0)):
        assert cells.shape == (0, 2)
    assert window_softargmax(nothing, 1.0, 3).shape == (0, 2)


def test_content_cells_by_hand():
    wide = Geometry.letterbox((100, 50), (64, 64))  # content rows 16 to 48 of 64
    assert content_cells(wide, (4, 8)).any(axis=1).tolist() == [False] * 2 + [True] * 4 + [False] * 2
    assert content_cells(wide, (4, 3)).all()  # every row of cells shows some of the image
    oblong = Geometry.letterbox((50, 50), (128, 32))  # content columns 48 to 80 of 128: cells of 16, 3 and 4 of 8
    assert content_cells(oblong, (8, 2)).tolist() == [[False] * 3 + [True] * 2 + [False] * 3] * 2
    thin = Geometry.letterbox((1000, 1), (64, 64))
    assert content_cells(thin, (4, 4)).any()
    assert content_cells(Geometry.stretch((7, 5), (64, 64)), (16, 16)).all()


NAMES = ("nn", "softargmax", "kernel-softargmax", "window-softargmax")


@pytest.mark.parametrize("name", NAMES)
def test_a_planted_match_is_found_in_pixels(name):
    """Source cell (1, 2) is planted at target cell (4, 1); pixels by hand: (k + 0.5) * W / w - 0.5."""
    rng = np.random.default_rng(0)
    source, target = (rng.standard_normal((64, 5, 6)).astype(np.float32) for _ in range(2))
    target[:, 1, 4] = 3 * source[:, 2, 1]
    near = FeatureMap(source, Geometry.stretch((60, 100), (96, 96)))
    far = FeatureMap(target, Geometry.stretch((90, 35), (96, 96)))
    match = match_points(near, far, [[14.5, 49.5]], Matcher(name, temperature=0.02))
    np.testing.assert_allclose(match.target, [[67.0, 10.0]], atol=1e-3)
    np.testing.assert_allclose(match.score, [1.0], atol=1e-4)
    np.testing.assert_allclose(match.cycle_error, [0.0], atol=1e-2)
    cosines = np.einsum("c,cyx->yx", source[:, 2, 1], target) / (
        np.linalg.norm(source[:, 2, 1]) * np.linalg.norm(target, axis=0)
    )
    far_cells = [cosines[y, x] for y in range(5) for x in range(6) if math.hypot(y - 1, x - 4) > 2]
    np.testing.assert_allclose(match.margin, [1 - max(far_cells)], atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_score_is_the_cosine_at_the_place_found(name):
    rng = np.random.default_rng(6)
    source, target = (rng.standard_normal((4, 5, 7)).astype(np.float32) for _ in range(2))
    near = FeatureMap(source, Geometry.stretch((70, 50), (64, 64)))
    far = FeatureMap(target, Geometry.stretch((140, 25), (64, 64)))
    points = rng.uniform(5, 44, (6, 2))
    matches = match_points(near, far, points, Matcher(name, temperature=0.3))

    def read(data, x, y):
        """Four neighbours by the textbook; x and y in cells, away from the border's outer half."""
        x0, y0 = min(int(x), data.shape[2] - 2), min(int(y), data.shape[1] - 2)
        top = (1 - x + x0) * data[:, y0, x0] + (x - x0) * data[:, y0, x0 + 1]
        bottom = (1 - x + x0) * data[:, y0 + 1, x0] + (x - x0) * data[:, y0 + 1, x0 + 1]
        return (1 - y + y0) * top + (y - y0) * bottom

    for point, found, score in zip(points, matches.target, matches.score, strict=True):
        a = read(source.astype(float), (point[0] + 0.5) / 10 - 0.5, (point[1] + 0.5) / 10 - 0.5)
        b = read(target.astype(float), (found[0] + 0.5) / 20 - 0.5, (found[1] + 0.5) / 5 - 0.5)
        assert score == pytest.approx(a @ b / math.sqrt((a @ a) * (b @ b)), abs=1e-6)
    back = match_points(far, near, matches.target, Matcher(name, temperature=0.3))
    np.testing.assert_allclose(matches.cycle_error, np.hypot(*(back.target - points).T))
    assert (matches.cycle_error > 0).all()


@pytest.mark.parametrize("name", [*NAMES, "mutual"])
def test_laws(name):
    rng = np.random.default_rng(1)
    matcher = Matcher(name)
    source, target = (rng.standard_normal((12, 6, 8)).astype(np.float32) for _ in range(2))
    geometry = Geometry.stretch((80, 60), (64, 64))
    points = rng.uniform(0, 59, (20, 2))

    def found(a, b):
        return match_points(FeatureMap(a, geometry), FeatureMap(b, geometry), points, matcher)

    plain = found(source, target)
    order = rng.permutation(12)
    for other in (found(source[order], target[order]), found(5 * source, 0.01 * target)):
        np.testing.assert_allclose(other.target, plain.target, rtol=1e-4)
        np.testing.assert_allclose(other.score, plain.score, atol=1e-5)
        np.testing.assert_allclose(other.margin, plain.margin, atol=1e-5)
    maps = FeatureMap(source, geometry), FeatureMap(target, geometry)
    without = match_points(*maps, points, matcher, confidence=False)
    np.testing.assert_allclose(without.target, plain.target)
    assert np.isnan(without.margin).all()
    assert np.isnan(without.cycle_error).all()


@pytest.mark.parametrize("name", [*NAMES, "mutual"])
def test_padding_is_never_found(name):
    """The source vector sits in the target's padding, where it must not be found."""
    rng = np.random.default_rng(4)
    source, target = (rng.standard_normal((16, 8, 8)).astype(np.float32) for _ in range(2))
    target[:, 0, :] = source[:, 3, 3][:, None]
    near = FeatureMap(source, Geometry.stretch((64, 64), (64, 64)))
    far = FeatureMap(target, Geometry.letterbox((64, 16), (64, 64)))  # content: cell rows 3 and 4
    match = match_points(near, far, [[27.5, 27.5]], Matcher(name, temperature=0.01))
    if name == "mutual":
        assert np.isnan(match.target).all() or 0 <= match.target[0, 1] <= 15
    else:
        assert 0 <= match.target[0, 1] <= 15
        assert match.score[0] < 0.9


@pytest.mark.parametrize("name", NAMES)
def test_small_maps(name):
    single = FeatureMap(np.ones((3, 1, 1), np.float32), Geometry.stretch((1, 1), (8, 8)))
    match = match_points(single, single, [[0, 0]], Matcher(name))
    assert match.target.tolist() == [[0, 0]]
    assert match.cycle_error.tolist() == [0]
    assert np.isnan(match.margin).all()  # nothing lies farther away
