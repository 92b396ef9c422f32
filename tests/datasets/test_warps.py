import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from difftap.datasets.synthetic import KINDS, Homography, ThinPlate

SIZES = st.tuples(st.integers(16, 900), st.integers(16, 900))


def places(rng, size, count=40):
    return rng.uniform(0, 1, (count, 2)) * (np.array(size) - 1)


@pytest.mark.parametrize("kind", KINDS)
@given(seed=st.integers(0, 2**32), size=SIZES, strength=st.floats(0, 0.249))
@settings(max_examples=40, deadline=None)
def test_forward_undoes_backward(kind, seed, size, strength):
    rng = np.random.default_rng(seed)
    warp = KINDS[kind](rng, size, strength)
    target = places(rng, size)
    source = warp.backward(target)
    assert np.isfinite(source).all()
    np.testing.assert_allclose(warp.forward(source), target, atol=1e-6)  # one target to a source: nothing folds


@pytest.mark.parametrize("kind", KINDS)
def test_ground_truth_is_exact(kind):
    rng = np.random.default_rng(0)
    warp = KINDS[kind](rng, (500, 375), 0.2)
    source = places(rng, (500, 375))
    target = warp.forward(source)
    kept = np.isfinite(target).all(axis=1)
    assert kept.sum() > 30
    np.testing.assert_allclose(warp.backward(target[kept]), source[kept], atol=1e-8)


@pytest.mark.parametrize("kind", KINDS)
def test_no_strength_moves_nothing(kind):
    warp = KINDS[kind](np.random.default_rng(3), (60, 40), 0.0)
    points = np.array([[0.0, 0.0], [59.0, 39.0], [12.5, 7.0]])
    np.testing.assert_allclose(warp.forward(points), points, atol=1e-9)
    np.testing.assert_allclose(warp.backward(points), points, atol=1e-9)


def test_a_homography_by_hand():
    warp = Homography(np.array([[2.0, 0, 1], [0, 3, 2], [0, 0, 1]]))
    assert warp.forward(np.array([[1.0, 1]])).tolist() == [[3, 5]]
    np.testing.assert_allclose(warp.backward(np.array([[3.0, 5]])), [[1, 1]])


def test_what_lies_beyond_the_horizon_goes_nowhere():
    warp = Homography(np.array([[1.0, 0, 0], [0, 1, 0], [-0.1, 0, 1]]))
    assert np.isnan(warp.forward(np.array([[20.0, 1]]))).all()


def test_a_spline_passes_through_its_control_points_and_knows_its_slope():
    rng = np.random.default_rng(5)
    controls = np.stack(np.meshgrid([0.0, 50, 100], [0.0, 40, 80]), axis=2).reshape(-1, 2)
    offsets = rng.uniform(-5, 5, controls.shape)
    plate = ThinPlate.fit(controls, offsets, 100.0)
    np.testing.assert_allclose(plate.backward(controls), controls + offsets, atol=1e-9)
    points, step = places(rng, (101, 81)), 1e-5
    for axis in (0, 1):
        move = np.zeros(2)
        move[axis] = step
        slope = (plate.backward(points + move) - plate.backward(points - move)) / (2 * step)
        np.testing.assert_allclose(plate.jacobian(points)[:, :, axis], slope, atol=1e-6)
