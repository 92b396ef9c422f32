"""Axis weights against torch's interpolation and by hand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from difftap.coords import Geometry
from difftap.matching.interpolate import axis_matrix, axis_taps, pixel_cells, unit
from difftap.matching.interpolate import sample as sample_picked

torch = pytest.importorskip("torch")


def sample(data, cells, interpolation):
    """Read an array (C, h, w) at fractional cells (N, 2)."""
    return sample_picked(lambda x, y: data[:, y, x].T, data.shape[:0:-1], cells, interpolation)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    sizes=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    image=st.tuples(st.integers(1, 40), st.integers(1, 40)),
)
def test_matrices_equal_torch(interpolation, seed, sizes, image):
    (h, w), (height, width) = sizes, image
    data = np.random.default_rng(seed).standard_normal((2, h, w))
    columns, rows = pixel_cells(Geometry.stretch((width, height), (768, 512)), (w, h))
    ours = axis_matrix(rows, h, interpolation) @ data @ axis_matrix(columns, w, interpolation).T
    slow = torch.nn.functional.interpolate(
        torch.from_numpy(data)[None], size=(height, width), mode=interpolation, align_corners=False
    )[0].numpy()
    np.testing.assert_allclose(ours, slow, atol=1e-9)
    grid = np.stack(np.meshgrid(columns, rows), axis=-1).reshape(-1, 2)
    np.testing.assert_allclose(sample(data, grid, interpolation).T.reshape(slow.shape), slow, atol=1e-9)


def test_bilinear_by_hand():
    indices, weights = axis_taps(np.array([-0.5, 0.0, 1.25, 2.0, 2.5]), 3, "bilinear")
    np.testing.assert_array_equal(indices, [[0, 0], [0, 1], [1, 2], [2, 2], [2, 2]])
    np.testing.assert_allclose(weights, [[0.5, 0.5], [1, 0], [0.75, 0.25], [1, 0], [0.5, 0.5]])


def test_bicubic_by_hand():
    _, weights = axis_taps(np.array([4.0, 4.5]), 10, "bicubic")
    np.testing.assert_allclose(weights, [[0, 1, 0, 0], [-0.09375, 0.59375, 0.59375, -0.09375]], atol=1e-15)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_empty_and_single(interpolation):
    assert axis_matrix(np.zeros(0), 3, interpolation).shape == (0, 3)
    np.testing.assert_allclose(axis_matrix(np.array([-0.5, 0.3]), 1, interpolation), 1.0)
    assert sample(np.ones((5, 2, 2)), np.zeros((0, 2)), interpolation).shape == (0, 5)


def test_unit_keeps_zero():
    np.testing.assert_allclose(unit(np.array([[3.0, 4.0], [0.0, 0.0]])), [[0.6, 0.8], [0.0, 0.0]])
