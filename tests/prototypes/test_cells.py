import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from difftap.coords import Geometry
from difftap.errors import InputError
from difftap.featuremap import FeatureMap
from difftap.prototypes import cell_shares, keep_cells, prototypes
from difftap.prototypes.average import average, joined_grid

FITS = {"stretch": Geometry.stretch, "letterbox": Geometry.letterbox}


def slow_shares(mask, geometry, grid, fine=40):
    """Each cell's share by looking at fine x fine points within it."""
    shares = np.zeros((grid[1], grid[0]))
    height, width = mask.shape
    for y in range(grid[1]):
        for x in range(grid[0]):
            offsets = (np.arange(fine) + 0.5) / fine - 0.5
            points = np.stack(np.meshgrid(x + offsets, y + offsets), axis=2).reshape(-1, 2)
            pixels = np.floor(geometry.to_pixels(points, grid) + 0.5).astype(int)
            inside = ((pixels >= 0) & (pixels < [width, height])).all(axis=1)
            kept = pixels[inside]
            shares[y, x] = mask[kept[:, 1], kept[:, 0]].sum() / fine**2
    return shares


@pytest.mark.parametrize("fit", FITS)
@given(data=st.data())
@settings(max_examples=12, deadline=None)
def test_shares_are_areas(fit, data):
    size = data.draw(st.tuples(st.integers(3, 23), st.integers(3, 23)), label="image")
    grid = data.draw(st.tuples(st.integers(1, 6), st.integers(1, 6)), label="grid")
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    mask = rng.random(size[::-1]) < 0.5
    geometry = FITS[fit](size, (48, 32))
    found = cell_shares(mask[None], geometry, grid)[0]
    assert np.abs(found - slow_shares(mask, geometry, grid)).max() < 0.06
    assert ((found >= 0) & (found <= 1)).all()


@given(size=st.tuples(st.integers(1, 30), st.integers(1, 30)), side=st.integers(1, 9))
@settings(deadline=None)
def test_shares_keep_the_area(size, side):
    rng = np.random.default_rng(size[0])
    mask = rng.random(size[::-1]) < 0.4
    shares = cell_shares(mask[None], Geometry.stretch(size, (64, 64)), (side, side))
    assert shares.mean() == pytest.approx(mask.mean(), abs=1e-5)


def test_area_needs_more_than_half():
    mask = np.zeros((4, 8), np.bool_)
    mask[:2, :4] = True  # exactly half of the left cell
    geometry = Geometry.stretch((8, 4), (16, 8))
    kept = keep_cells(mask[None], geometry, (2, 1))
    assert kept.small.tolist() == [True]
    assert kept.kept[0].tolist() == [[True, False]]
    assert kept.coverage.tolist() == [0.5]
    mask[2, 0] = True
    kept = keep_cells(mask[None], geometry, (2, 1))
    assert (kept.small.tolist(), kept.counts.tolist()) == ([False], [1])


def test_nearest_reads_the_pixel_at_the_centre():
    mask = np.zeros((6, 6), np.bool_)
    mask[1, 4] = True  # the centre of the top right cell of 2 x 2
    kept = keep_cells(mask[None], Geometry.stretch((6, 6), (8, 8)), (2, 2), "nearest")
    assert kept.kept[0].tolist() == [[False, True], [False, False]]
    assert (kept.small.tolist(), round(float(kept.coverage[0]), 4)) == ([False], round(1 / 9, 4))
    assert keep_cells(mask[None], Geometry.stretch((6, 6), (8, 8)), (2, 2), "area").small.tolist() == [True]


@pytest.mark.parametrize("rule", ["area", "nearest"])
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_no_object_is_lost(rule, data):
    size = data.draw(st.tuples(st.integers(1, 20), st.integers(1, 20)))
    place = (data.draw(st.integers(0, size[1] - 1)), data.draw(st.integers(0, size[0] - 1)))
    mask = np.zeros((2, size[1], size[0]), np.bool_)
    mask[0][place] = True
    mask[1] = True
    fit = data.draw(st.sampled_from(sorted(FITS)))
    kept = keep_cells(mask, FITS[fit](size, (64, 32)), (4, 2), rule)
    assert (kept.counts >= 1).all()
    assert (kept.coverage > 0).all()
    assert kept.kept.sum(axis=(1, 2)).tolist() == kept.counts.tolist()
    small = kept.small[0]
    shares = cell_shares(mask, FITS[fit](size, (64, 32)), (4, 2))[0]
    if small:
        assert kept.counts[0] == 1
        assert shares[kept.kept[0]] == shares.max()


def test_padding_is_never_kept():
    geometry = Geometry.letterbox((8, 4), (64, 64))  # a quarter of padding above and below
    for rule in ("area", "nearest"):
        kept = keep_cells(np.ones((1, 4, 8), np.bool_), geometry, (4, 4), rule).kept[0]
        assert kept.any(axis=1).tolist() == [False, True, True, False]


def test_what_cannot_be_kept_is_refused():
    geometry = Geometry.stretch((8, 4), (64, 64))
    with pytest.raises(InputError, match="rule is 'most'; allowed: area, nearest"):
        keep_cells(np.ones((1, 4, 8), np.bool_), geometry, (2, 2), "most")
    with pytest.raises(InputError, match="covers nothing"):
        keep_cells(np.zeros((1, 4, 8), np.bool_), geometry, (2, 2))
    with pytest.raises(InputError, match="as large as the image"):
        keep_cells(np.ones((1, 8, 4), np.bool_), geometry, (2, 2))
    assert keep_cells(np.zeros((0, 4, 8), np.bool_), geometry, (2, 2)).kept.shape == (0, 2, 2)


def slow_average(maps, kept):
    """Interpolate, concatenate, and only then take the mean: torch's own interpolation."""
    torch = pytest.importorskip("torch")
    grid = joined_grid(maps)
    scaled = [
        torch.nn.functional.interpolate(
            torch.from_numpy(m.data)[None].double(), size=grid[::-1], mode="bilinear", align_corners=False
        )[0].numpy()
        for m in maps
    ]
    joined = np.concatenate(scaled)
    return np.stack([joined[:, one].mean(axis=1) for one in kept])


@given(seed=st.integers(0, 50))
@settings(max_examples=15, deadline=None)
def test_the_average_is_that_of_the_interpolated_maps(seed):
    rng = np.random.default_rng(seed)
    geometry = Geometry.stretch((30, 20), (64, 64))
    grids = [(8, 8), (4, 4), (2, 8)][: rng.integers(1, 4)]
    maps = [
        FeatureMap(rng.standard_normal((int(rng.integers(1, 5)), h, w)).astype(np.float32), geometry) for w, h in grids
    ]
    masks = rng.random((3, 20, 30)) < np.array([0.9, 0.5, 0.02])[:, None, None]
    masks[:, 3, 3] = True
    found, cells = prototypes(maps, masks)
    assert found.dtype == np.float32
    assert found == pytest.approx(slow_average(maps, cells.kept), abs=2e-5)


def test_a_constant_map_gives_its_constant():
    geometry = Geometry.stretch((9, 9), (64, 64))
    maps = [
        FeatureMap(np.full((2, 8, 8), 3.0, np.float32), geometry),
        FeatureMap(np.ones((1, 3, 3), np.float32), geometry),
    ]
    mask = np.zeros((1, 9, 9), np.bool_)
    mask[0, 0, 0] = True
    assert prototypes(maps, mask)[0][0].tolist() == pytest.approx([3.0, 3.0, 1.0], rel=1e-6)


def test_maps_that_do_not_belong_together_are_refused():
    a = FeatureMap(np.ones((1, 2, 2), np.float32), Geometry.stretch((8, 8), (64, 64)))
    b = FeatureMap(np.ones((1, 2, 2), np.float32), Geometry.stretch((8, 9), (64, 64)))
    with pytest.raises(InputError, match="lie differently"):
        prototypes([a, b], np.ones((1, 8, 8), np.bool_))
    with pytest.raises(InputError, match="give at least one"):
        prototypes([], np.ones((1, 8, 8), np.bool_))
    empty = keep_cells(np.zeros((0, 8, 8), np.bool_), a.geometry, (2, 2))
    assert average([a], empty).shape == (0, 1)
