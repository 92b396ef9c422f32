"""`dense` against the slow way: enlarge both maps to image size, normalise every pixel, take the best cosine."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from difftap.coords import Geometry
from difftap.errors import InputError
from difftap.featuremap import FeatureMap
from difftap.matching import MatchRule, heat_map, match_points
from difftap.matching.confidence import RADIUS_CELLS
from difftap.matching.dense import TIE, DenseTarget
from difftap.matching.descriptors import describe
from difftap.recipe import Matcher

torch = pytest.importorskip("torch")
F = torch.nn.functional

INTERPOLATIONS = ("bilinear", "bicubic")


def feature_map(data, image, size=(64, 64), fit="stretch"):
    return FeatureMap(np.asarray(data, np.float32), getattr(Geometry, fit)(image=image, input=size))


def enlarged(features, interpolation, dtype=torch.float64):
    """The map at image size, (C, H, W), by torch."""
    width, height = features.image_size
    data = torch.from_numpy(features.data).to(dtype)
    return F.interpolate(data[None], size=(height, width), mode=interpolation, align_corners=False)[0]


def cosines(descriptor, pixels, cells):
    """Cosine (H, W) of a descriptor (C,) with (C, H, W); vectors that interpolation cancelled count as zero.

    cells (C, h, w) is the map that the pixels came from: beside its lengths one sees what was cancelled.
    """
    pixels, descriptor = np.asarray(pixels), np.asarray(descriptor)
    length = np.sqrt((pixels**2).sum(axis=0))
    possible = torch.from_numpy(np.sqrt((cells.astype(float) ** 2).sum(axis=0)))[None, None]
    possible = F.interpolate(possible, size=length.shape, mode="bilinear", align_corners=False)[0, 0].numpy()
    gone = (length <= 1e-6 * possible) | (length <= 1e-12 * possible.max())  # the latter: a trace beside a zero cell
    own = np.sqrt((descriptor**2).sum())
    if own < 1e-9:
        return np.zeros(length.shape)
    return np.where(gone, 0.0, np.einsum("c,cyx->yx", descriptor / own, pixels) / np.where(gone, 1.0, length))


def check_pixel(found, slow, tolerance=1e-8):
    """Nothing worse than the best is found, and of the best, the first."""
    x, y = (int(v) for v in found)
    assert [x, y] == list(found)
    best = slow.max()
    assert slow[y, x] >= best - tolerance
    undecided = (slow < best - TIE / 2) & (slow > best - tolerance)  # neither tied nor clearly apart
    if not undecided.any():
        assert y * slow.shape[1] + x == np.flatnonzero(slow.ravel() >= best - tolerance)[0]


@st.composite
def cases(draw, most_cells=9, most_pixels=40):
    """A pair of maps and images of unrelated shapes, and whole points on the source."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    channels = draw(st.integers(1, 6))
    kind = draw(st.sampled_from(["normal", "integers", "scales", "constant", "similar"]))

    def one():
        h, w = draw(st.integers(1, most_cells)), draw(st.integers(1, most_cells))
        image = draw(st.integers(1, most_pixels)), draw(st.integers(1, most_pixels))
        data = rng.standard_normal((channels, h, w))
        if kind == "integers":  # ties, zero cells, neighbours that cancel
            data = rng.integers(-1, 2, (channels, h, w))
        elif kind == "scales":  # lengths from 1e-3 to 1e3
            data = data * 10 ** rng.uniform(-3, 3, (1, h, w))
        elif kind == "constant":
            data = np.broadcast_to(rng.standard_normal((channels, 1, 1)), (channels, h, w))
        elif kind == "similar":  # a strong common mean, as real features have
            data = 0.05 * data + 3.0
        return feature_map(data, image)

    source, target = one(), one()
    count = draw(st.integers(1, 4))
    points = np.stack([rng.integers(0, n, count) for n in source.image_size], axis=1)
    return source, target, points


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@settings(max_examples=150, deadline=None)
@given(case=cases())
def test_same_pixel_as_the_slow_way(interpolation, case):
    source, target, points = case
    matches = match_points(source, target, points, Matcher("dense", interpolation), confidence=False)
    near, far = enlarged(source, interpolation).numpy(), enlarged(target, interpolation).numpy()
    for (x, y), found, score in zip(points, matches.target, matches.score, strict=True):
        slow = cosines(near[:, y, x], far, target.data)
        check_pixel(found, slow)
        assert score == pytest.approx(slow.max(), abs=1e-6)


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("image", [(500, 375), (333, 500), (37, 29)])
def test_same_pixel_as_dift_in_float32(interpolation, image):
    rng = np.random.default_rng(3)
    source, target = (feature_map(rng.standard_normal((32, 24, 24)), size) for size in (image, image[::-1]))
    points = np.stack([rng.integers(0, n, 8) for n in image], axis=1)
    matches = match_points(source, target, points, Matcher("dense", interpolation), confidence=False)
    near = enlarged(source, interpolation, torch.float32)
    far = F.normalize(enlarged(target, interpolation, torch.float32), dim=0)
    for (x, y), found in zip(points, matches.target.astype(int), strict=True):
        slow = torch.einsum("c,cyx->yx", F.normalize(near[:, y, x], dim=0), far).flatten()
        top = slow.topk(2)
        index = found[1] * target.image_size[0] + found[0]
        assert slow[index] >= top.values[0] - 1e-5
        if top.values[0] - top.values[1] > 1e-5:
            assert index == top.indices[0]


def slow_read(data, x, y, interpolation):
    """The map (C, h, w) read at fractional cell (x, y): a loop over cells, with the textbook kernels."""

    def kernel(d):
        d = abs(d)
        if interpolation == "bilinear":
            return max(0.0, 1 - d)
        a = -0.75
        if d <= 1:
            return (a + 2) * d**3 - (a + 3) * d**2 + 1
        return a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a if d < 2 else 0.0

    _, h, w = data.shape
    total = np.zeros(len(data))
    for r in range(int(np.floor(y)) - 2, int(np.floor(y)) + 4):
        for c in range(int(np.floor(x)) - 2, int(np.floor(x)) + 4):
            total += kernel(x - c) * kernel(y - r) * data[:, min(max(r, 0), h - 1), min(max(c, 0), w - 1)]
    return total


def letterboxed_cell(point, image, size, grid):
    """Cell of a pixel, from the definition of the letterbox: scale, centre, count in cells."""
    scale = min(size[0] / image[0], size[1] / image[1])
    content = [max(1, round(n * scale)) for n in image]
    corner = [(s - n) // 2 for s, n in zip(size, content, strict=True)]
    inside = [c + (p + 0.5) * n / i for c, p, n, i in zip(corner, point, content, image, strict=True)]
    return [v * g / s - 0.5 for v, g, s in zip(inside, grid, size, strict=True)]


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    image=st.tuples(st.integers(1, 14), st.integers(1, 14)),
    grid=st.tuples(st.integers(1, 6), st.integers(1, 6)),
)
def test_letterbox_and_fractional_points(interpolation, seed, image, grid):
    rng = np.random.default_rng(seed)
    size = (48, 40)
    data = rng.standard_normal((3, grid[1], grid[0])).astype(np.float32)
    target = feature_map(data, image, size, "letterbox")
    source = feature_map(rng.standard_normal((3, 5, 4)), (21, 13), size, "letterbox")
    point = (rng.uniform(-0.5, 20.5), rng.uniform(-0.5, 12.5))
    found = match_points(source, target, [point], Matcher("dense", interpolation), confidence=False)
    vector = slow_read(source.data.astype(float), *letterboxed_cell(point, (21, 13), size, (4, 5)), interpolation)
    pixels = np.array(
        [
            [
                slow_read(data.astype(float), *letterboxed_cell((x, y), image, size, grid), interpolation)
                for x in range(image[0])
            ]
            for y in range(image[1])
        ]
    )  # (H, W, C)
    slow = cosines(vector, pixels.transpose(2, 0, 1), np.ones((3, 1, 1)))
    check_pixel(found.target[0], slow)
    assert found.score[0] == pytest.approx(slow.max(), abs=1e-9)


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@settings(max_examples=60, deadline=None)
@given(case=cases())
def test_norm_and_heat_map(interpolation, case):
    source, target, points = case
    far = enlarged(target, interpolation).numpy()
    length = np.sqrt((far**2).sum(axis=0))
    (inverse,) = DenseTarget(describe([target]), interpolation).inverse_norms
    assert inverse.shape == length.shape
    present = inverse > 0
    assert (length[~present] <= 1e-5 * np.sqrt((target.data.astype(float) ** 2).sum(axis=0)).max()).all()
    np.testing.assert_allclose(inverse[present] * length[present], 1.0, rtol=1e-6)
    x, y = points[0]
    heat = heat_map(source, target, points[0], Matcher("dense", interpolation))
    assert heat.dtype == np.float32
    slow = cosines(enlarged(source, interpolation).numpy()[:, y, x], far, target.data)
    np.testing.assert_allclose(heat[present], slow[present], atol=1e-6)


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@settings(max_examples=60, deadline=None)
@given(case=cases(), tile=st.integers(1, 300), small=st.sampled_from([1, 500, 1 << 18]))
def test_margin_and_cycle_error(interpolation, case, tile, small):
    source, target, points = case
    matcher = Matcher("dense", interpolation)
    with pytest.MonkeyPatch.context() as patch:  # several tiles, short runs and the large products, on small images
        patch.setattr("difftap.matching.dense._TILE_PIXELS", tile)
        patch.setattr("difftap.matching.dense.SMALL", small)
        patch.setattr("difftap.matching.norms._BLOCK_VALUES", small)
        matches = match_points(source, target, points, matcher)
    far = enlarged(target, interpolation).numpy()
    near = enlarged(source, interpolation).numpy()
    (width, height), (w, h) = target.image_size, target.grid
    for k, (x, y) in enumerate(points):
        slow = cosines(near[:, y, x], far, target.data)
        px, py = matches.target[k].astype(int)
        check_pixel(matches.target[k], slow)
        right = (np.arange(width) - px) * w / width
        down = (np.arange(height) - py) * h / height
        outside = slow[np.hypot(down[:, None], right) > RADIUS_CELLS + 1e-9]
        if outside.size:
            assert matches.margin[k] == pytest.approx(slow[py, px] - outside.max(), abs=1e-6)
            assert 0 <= matches.margin[k] <= 2
        else:
            assert np.isnan(matches.margin[k])
        back = match_points(target, source, matches.target[k : k + 1], matcher, confidence=False).target[0]
        assert matches.cycle_error[k] == pytest.approx(np.hypot(*(back - points[k])))


def test_ties_take_the_first_pixel():
    flat = feature_map(np.ones((3, 4, 5)), (50, 40))
    matches = match_points(flat, flat, [[20, 30]], Matcher("dense"))
    assert matches.target.tolist() == [[0, 0]]
    assert matches.score == pytest.approx(1.0)
    assert matches.margin == pytest.approx(0.0)
    columns = np.zeros((2, 3, 6))
    columns[0], columns[1, :, 2], columns[1, :, 4] = 1.0, 1.0, 1.0  # two equal columns, both all the way down
    target = feature_map(columns, (6, 3))
    assert match_points(target, target, [[4, 2]], Matcher("dense")).target.tolist() == [[2, 0]]


def test_zero_and_cancelling_cells_score_zero():
    nothing = feature_map(np.zeros((3, 2, 2)), (8, 8))
    something = feature_map(np.ones((3, 2, 2)), (8, 8))
    for source, target in ((nothing, something), (something, nothing), (nothing, nothing)):
        matches = match_points(source, target, [[1, 1]], Matcher("dense"))
        assert matches.score.tolist() == [0.0]
        assert matches.target.tolist() == [[0, 0]]
    opposite = feature_map([[[1.0, -1.0]], [[2.0, -2.0]]], (3, 1))  # the middle pixel is half of each: nothing
    heat = heat_map(opposite, opposite, (0, 0), Matcher("dense"))
    np.testing.assert_allclose(heat, [[1.0, 0.0, -1.0]], atol=1e-6)


def test_long_cells_beside_short_ones_keep_their_precision():
    """Neighbours that nearly cancel: the norm is 1e-4 of the cells', where float32 products would be noise."""
    rng = np.random.default_rng(5)
    cell = rng.standard_normal(64)
    other = -cell + 1e-4 * rng.standard_normal(64)
    target = feature_map(np.stack([cell, other], axis=1)[:, None, :], (3, 1))
    middle = target.data[:, 0].astype(float).sum(axis=1) / 2
    source = feature_map(middle[:, None, None], (1, 1))
    match = match_points(source, target, [[0, 0]], Matcher("dense"))
    assert match.target.tolist() == [[1, 0]]
    assert match.score == pytest.approx(1.0, abs=1e-6)


def test_ties_hold_where_cells_cancel():
    """One channel from -1 to 1: every cosine right of the middle is 1, so the first pixel there wins, weak as it is."""
    target = feature_map([[[-1.0, 1.0]]], (100_002, 1))
    match = match_points(feature_map([[[1.0]]], (1, 1)), target, [[0, 0]], Matcher("dense"))
    assert match.target.tolist() == [[50_001, 0]]
    assert match.score == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_laws(interpolation):
    rng = np.random.default_rng(11)
    matcher = Matcher("dense", interpolation)
    source, target = (rng.standard_normal((16, 9, 12)).astype(np.float32) for _ in range(2))
    # Beyond the outermost cells' centres the enlarged map repeats itself and pixels tie, so stay within.
    points = np.stack([rng.integers(4, 86, 12), rng.integers(4, 66, 12)], axis=1)

    def found(a, b):
        return match_points(feature_map(a, (90, 70)), feature_map(b, (90, 70)), points, matcher)

    same = found(source, source)
    assert same.target.tolist() == points.tolist()
    np.testing.assert_allclose(same.score, 1.0)
    assert same.cycle_error.tolist() == [0.0] * 12
    plain = found(source, target)
    turn = np.linalg.qr(rng.standard_normal((16, 16)))[0]
    turned = found(*(np.einsum("dc,cyx->dyx", turn, m) for m in (source, target)))
    scaled = found(37.5 * source, 1e-3 * target)
    for other in (turned, scaled):
        assert other.target.tolist() == plain.target.tolist()
        np.testing.assert_allclose(other.score, plain.score, atol=1e-6)
        np.testing.assert_allclose(other.margin, plain.margin, atol=1e-6)
    mirrored = match_points(feature_map(source, (90, 70)), feature_map(target[:, :, ::-1], (90, 70)), points, matcher)
    np.testing.assert_allclose(mirrored.score, plain.score)  # a mirrored target mirrors the answer
    inner = (plain.target[:, 0] > 3) & (plain.target[:, 0] < 86)
    assert inner.any()
    np.testing.assert_allclose(89 - mirrored.target[inner, 0], plain.target[inner, 0])


def test_answer_does_not_depend_on_companions():
    rng = np.random.default_rng(2)
    source, target = (feature_map(rng.standard_normal((8, 7, 7)), (60, 60)) for _ in range(2))
    points = rng.uniform(0, 59, (300, 2))  # more than one block
    together = match_points(source, target, points, Matcher("dense"))
    rule = MatchRule(Matcher("dense"))
    first, second = rule.prepare([source]), rule.prepare([target])
    for k in (0, 255, 256, 299):
        alone = first.match(second, points[k : k + 1])
        assert alone.target.tolist() == together.target[k : k + 1].tolist()
        np.testing.assert_allclose(alone.margin, together.margin[k : k + 1])
        np.testing.assert_allclose(alone.cycle_error, together.cycle_error[k : k + 1])


def test_no_full_size_map_is_made():
    rng = np.random.default_rng(0)
    source, target = (feature_map(rng.standard_normal((256, 32, 32)), (500, 400)) for _ in range(2))
    tracemalloc.start()
    match_points(source, target, rng.integers(0, 400, (40, 2)), Matcher("dense"))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 256 * 500 * 400 * 4 / 8  # a full-size map would be 205 MB


def test_images_must_be_made_ready_alike():
    target = feature_map(np.ones((2, 3, 3)), (9, 9))
    ready = [MatchRule(Matcher("dense", interpolation)).prepare([target]) for interpolation in INTERPOLATIONS]
    with pytest.raises(InputError, match="prepared under different rules"):
        ready[0].match(ready[1], [[1, 1]])


def test_features_must_be_finite():
    bad = feature_map(np.full((2, 3, 3), np.nan), (9, 9))
    good = feature_map(np.ones((2, 3, 3)), (9, 9))
    for name in ("dense", "nn"):
        with pytest.raises(InputError, match="NaN or infinity"):
            match_points(good, bad, [[1, 1]], Matcher(name))
