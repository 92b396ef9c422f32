"""The half-pixel rule: its inverse, its fixed points, and the sampling grid that torch uses for the same rule."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from difftap.coords import CornerGeometry, Geometry, rescale
from difftap.errors import DifftapError

sides = st.integers(1, 3000)
sizes = st.tuples(sides, sides)
kinds = st.sampled_from([Geometry.stretch, Geometry.letterbox])
points = st.lists(st.tuples(st.floats(-1e4, 1e4), st.floats(-1e4, 1e4)), max_size=5)


@given(kinds, sizes, sizes, st.tuples(st.integers(1, 200), st.integers(1, 200)), points)
def test_cells_and_back(kind, image, net, grid, xy):
    geometry = kind(image=image, input=net)
    back = geometry.to_pixels(geometry.to_cells(xy, grid), grid)
    assert np.allclose(back, np.reshape(np.array(xy, float), (-1, 2)), atol=1e-6)


@given(kinds, sizes, sizes, st.tuples(st.integers(1, 200), st.integers(1, 200)))
def test_outer_corners_of_the_content_are_the_images(kind, image, net, grid):
    geometry = kind(image=image, input=net)
    x0, y0, x1, y1 = geometry.content
    cells = geometry.to_cells([[-0.5, -0.5], [image[0] - 0.5, image[1] - 0.5]], grid)
    scale = np.array(grid) / np.array(net)
    assert np.allclose(cells, np.array([[x0, y0], [x1, y1]]) * scale - 0.5, atol=1e-7)


@given(sizes, sizes, st.tuples(st.integers(1, 200), st.integers(1, 200)))
def test_the_centre_stays_the_centre_when_stretched(image, net, grid):
    centre = [[(image[0] - 1) / 2, (image[1] - 1) / 2]]
    cells = Geometry.stretch(image, net).to_cells(centre, grid)
    assert np.allclose(cells, [[(grid[0] - 1) / 2, (grid[1] - 1) / 2]])


@pytest.mark.parametrize(("cells", "pixels"), [(6, 24), (7, 50), (13, 13), (9, 4)])
def test_same_places_as_torch_interpolate_without_aligned_corners(cells, pixels):
    torch = pytest.importorskip("torch")
    # A ramp read linearly gives the position that was read, up to the border where torch clamps.
    ramp = torch.arange(cells, dtype=torch.float64)[None, None]
    want = torch.nn.functional.interpolate(ramp, size=pixels, mode="linear", align_corners=False)[0, 0].numpy()
    xy = np.stack([np.arange(pixels), np.zeros(pixels)], axis=1)
    got = Geometry.stretch((pixels, 1), (64, 64)).to_cells(xy, (cells, 1))[:, 0]
    assert np.allclose(np.clip(got, 0, cells - 1), want)


@given(sizes, sizes)
def test_letterbox_keeps_the_aspect_and_is_centred(image, net):
    geometry = Geometry.letterbox(image, net)
    x0, y0, x1, y1 = geometry.content
    assert (x1 - x0 == net[0]) or (y1 - y0 == net[1])  # it touches two sides
    assert abs(x0 - (net[0] - x1)) <= 1
    assert abs(y0 - (net[1] - y1)) <= 1
    scale = min(net[0] / image[0], net[1] / image[1])
    assert abs((x1 - x0) - max(1, image[0] * scale)) <= 0.5 + 1e-9
    assert abs((y1 - y0) - max(1, image[1] * scale)) <= 0.5 + 1e-9


@pytest.mark.parametrize("content", [(0, 0, 0, 4), (-1, 0, 4, 4), (0, 0, 9, 4), (3, 0, 2, 4)])
def test_impossible_geometry_is_refused(content):
    with pytest.raises(DifftapError, match="impossible geometry"):
        Geometry((5, 5), (8, 4), content)


def test_the_border_belongs_to_the_image_and_nan_does_not():
    geometry = Geometry.stretch((5, 3), (8, 8))
    inside = [[-0.5, -0.5], [4.5, 2.5], [2, 1]]
    outside = [[-0.51, 0], [4.51, 0], [0, 2.51], [np.nan, 0], [np.inf, 0]]
    assert geometry.contains(inside).all()
    assert not geometry.contains(outside).any()


@given(st.floats(-1e3, 1e3), st.floats(0.01, 100))
def test_rescale_inverts(position, scale):
    assert np.isclose(rescale(rescale(position, scale), 1 / scale), position, atol=1e-6)


@pytest.mark.parametrize("net", [(768, 768), (256, 256), (512, 384)])
def test_sd4matchs_cells_are_measured_in_its_frame_whatever_the_input(net):
    """x in the image -> 768 x / W in the frame -> times (w - 1) / 767."""
    geometry = CornerGeometry(image=(300, 200), input=net, content=(0, 0, *net))
    cells = geometry.to_cells([[150, 50], [0, 0]], (48, 32))
    assert np.allclose(cells, [[384 * 47 / 767, 192 * 31 / 767], [0, 0]])
    assert np.allclose(geometry.to_pixels(cells, (48, 32)), [[150, 50], [0, 0]])
