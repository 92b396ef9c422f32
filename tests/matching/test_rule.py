"""Matching as benchmarks need it: fused branches against the joined map, corners and centres against plain loops."""

import dataclasses
import tracemalloc

import numpy as np
import pytest

from difftap.coords import CornerGeometry, Geometry
from difftap.errors import InputError, PointError
from difftap.featuremap import FeatureMap
from difftap.matching.grid import content_cells
from difftap.matching.rule import MatchRule, find
from difftap.recipe import Branch, Matcher, Recipe
from tests.matching.test_interpolate import sample, unit

SIZE, INPUT = (50, 36), (96, 96)
MATCHERS = ("dense", "nn", "bilinear", "softargmax", "kernel-softargmax", "window-softargmax")


def maps(seed, shapes=((10, 6), (7, 12)), size=SIZE, geometry=None):
    """A map per branch; neighbouring cells are alike."""
    rng = np.random.default_rng(seed)
    made = []
    for channels, grid in shapes:
        data = rng.standard_normal((channels, grid, grid)).astype(np.float32)
        data[:, 1:] += 0.6 * data[:, :-1]
        data[:, :, 1:] += 0.6 * data[:, :, :-1]
        made.append(FeatureMap(data, geometry or Geometry.stretch(size, INPUT)))
    return made


def matched(rule, source, target, points, confidence=True):
    return find(rule.prepare(rule.fuse(source)), rule.prepare(rule.fuse(target)), points, SIZE, confidence)[0]


@pytest.mark.parametrize("weights", [(0.5, 0.5), (3.0, 1.0)])
@pytest.mark.parametrize("upsample", ["bilinear", "bicubic"])
@pytest.mark.parametrize("name", MATCHERS)
def test_score_sum_is_the_joined_map(name, upsample, weights):
    points = np.random.default_rng(2).uniform(0, 1, (9, 2)) * (SIZE[0] - 1, SIZE[1] - 1)
    for interpolation in ("bilinear", "bicubic") if name == "dense" else ("bilinear",):
        rule = MatchRule(Matcher(name, interpolation), weights, upsample)
        joined = matched(rule, maps(0), maps(1), points)
        fused = matched(dataclasses.replace(rule, combine="score-sum"), maps(0), maps(1), points)
        np.testing.assert_allclose(fused.score, joined.score, atol=2e-6)
        np.testing.assert_allclose(fused.target, joined.target, atol=1e-3)
        np.testing.assert_allclose(fused.margin, joined.margin, atol=2e-6)
        np.testing.assert_allclose(fused.cycle_error, joined.cycle_error, atol=1e-2)


def test_score_sum_of_the_same_grid_and_of_letterboxed_images():
    geometry = Geometry.letterbox(SIZE, INPUT)
    points = np.array([[3.0, 4.0], [40.0, 30.0], [22.5, 11.25]])
    for shapes in (((5, 8), (6, 8)), ((5, 4), (6, 8), (3, 16))):
        rule = MatchRule(Matcher("nn"), (1.0,) * len(shapes))
        both = maps(5, shapes, geometry=geometry), maps(6, shapes, geometry=geometry)
        joined = matched(rule, *both, points)
        fused = matched(dataclasses.replace(rule, combine="score-sum"), *both, points)
        np.testing.assert_allclose(fused.target, joined.target, atol=1e-9)


def test_score_sum_stores_no_joined_map():
    """Joined, the two images' maps would be 2 x 21 MB; here the peak stays below one of them."""
    shapes = ((256, 24), (64, 128))
    both = maps(0, shapes), maps(1, shapes)
    joined = (256 + 64) * 128 * 128 * 4
    rule = MatchRule(Matcher("dense"), (1.0, 1.0), combine="score-sum")
    tracemalloc.start()
    try:
        matched(rule, *both, np.array([[5.0, 6.0], [20.0, 30.0]]), confidence=False)
        assert tracemalloc.get_traced_memory()[1] < joined
    finally:
        tracemalloc.stop()


def cosine_field(source, target, point, interpolation="bilinear"):
    """Slow: cosine ``(H, W)`` of one source pixel with every target pixel, both maps enlarged."""
    width, height = target.image_size
    pixels = np.stack(np.meshgrid(np.arange(width), np.arange(height)), axis=-1).reshape(-1, 2).astype(float)
    query = unit(sample(source.data, source.to_cells(np.reshape(point, (1, 2))), interpolation))[0]
    return (unit(sample(target.data, target.to_cells(pixels), interpolation)) @ query).reshape(height, width)


def normal(features):
    """The same map with cells of length 1, as branches are joined."""
    lengths = np.linalg.norm(features.data, axis=0)
    return FeatureMap((features.data / lengths).astype(np.float32), features.geometry)


def test_score_product_is_the_geometric_mean_of_cosines():
    source, target = maps(0, ((10, 12), (7, 12))), maps(1, ((10, 12), (7, 12)))
    source, target = [normal(m) for m in source], [normal(m) for m in target]
    point = np.array([[21.0, 17.0]])
    found = matched(MatchRule(Matcher("dense"), (3.0, 1.0), combine="score-product"), source, target, point)
    fields = [np.clip(cosine_field(s, t, point), 0, 1) for s, t in zip(source, target, strict=True)]
    score = fields[0] ** 0.75 * fields[1] ** 0.25
    y, x = np.unravel_index(score.argmax(), score.shape)
    assert found.target.tolist() == [[x, y]]
    assert found.score[0] == pytest.approx(score.max(), abs=1e-6)


@pytest.mark.parametrize("name", MATCHERS)
def test_score_product_of_one_branch_twice_is_that_branch(name):
    one = [[normal(m) for m in maps(seed, ((10, 12),))] for seed in (3, 4)]
    points = np.array([[3.0, 4.0], [30.0, 20.0]])
    alone = matched(MatchRule(Matcher("nn"), (1.0,)), *one, points)
    twice = matched(
        MatchRule(Matcher(name), (1.0, 1.0), combine="score-product"), [*one[0], *one[0]], [*one[1], *one[1]], points
    )
    assert np.isfinite(twice.target).all()
    assert (twice.score >= 0).all()
    if name == "nn":
        np.testing.assert_allclose(twice.target, alone.target)
        np.testing.assert_allclose(twice.score, alone.score, atol=1e-6)


def loop_dift(source, target, points):
    """DIFT's way: enlarge both maps to image size, normalise, argmax; one keypoint at a time."""
    found = []
    for point in points:
        field = cosine_field(source, target, point)
        y, x = np.unravel_index(field.argmax(), field.shape)
        found.append([x, y])
    return np.array(found, float)


def test_dense_against_difts_loop():
    for seed in range(5):
        (source,), (target,) = maps(2 * seed, ((16, 6),)), maps(2 * seed + 1, ((16, 6),))
        points = np.floor(np.random.default_rng(seed).uniform(0, 1, (6, 2)) * SIZE)
        found = matched(MatchRule(Matcher("dense"), (1.0,)), [source], [target], points)
        assert found.target.tolist() == loop_dift(source, target, points).tolist()


def loop_sd4match(source, target, points, matcher, side=768):
    """SD4Match's way: keypoints into the square, aligned corners to the grid, match there, and back."""
    _, h, w = source.data.shape
    found = []
    for x, y in points * side / np.array(source.image_size):
        x, y = (1e-4 if v <= 0 else side - 1 - 1e-4 if v >= side - 1 else v for v in (x, y))
        gx, gy = x / (side - 1) * (w - 1), y / (side - 1) * (h - 1)
        x0, y0 = min(int(gx), w - 2), min(int(gy), h - 2)
        fx, fy = gx - x0, gy - y0
        query = (
            (1 - fx) * (1 - fy) * source.data[:, y0, x0]
            + fx * (1 - fy) * source.data[:, y0, x0 + 1]
            + (1 - fx) * fy * source.data[:, y0 + 1, x0]
            + fx * fy * source.data[:, y0 + 1, x0 + 1]
        ).astype(np.float64)
        query = query / (np.linalg.norm(query) + 1e-6)
        cells = target.data / (np.linalg.norm(target.data, axis=0) + 1e-6)
        scores = np.tensordot(query, cells, 1)
        by, bx = np.unravel_index(scores.argmax(), scores.shape)
        if matcher == "nn":
            cx, cy = bx, by
        elif matcher == "bilinear":
            cx = cy = 0.0
            for dx, dy, weight in (
                (0, 0, (1 - fx) * (1 - fy)),
                (1, 0, fx * (1 - fy)),
                (0, 1, (1 - fx) * fy),
                (1, 1, fx * fy),
            ):
                corner = np.tensordot(source.data[:, y0 + dy, x0 + dx].astype(np.float64), cells, 1)
                ny, nx = np.unravel_index(corner.argmax(), corner.shape)
                cx, cy = cx + weight * nx, cy + weight * ny
        else:
            ys, xs = np.mgrid[:h, :w]
            if matcher == "kernel-softargmax":
                scores = scores * np.exp(-((xs - bx) ** 2 + (ys - by) ** 2) / (2 * 7**2))
            weights = np.exp((scores - scores.max()) / 0.04)
            weights /= weights.sum()
            cx, cy = (weights * xs).sum(), (weights * ys).sum()
        found.append([cx / (w - 1) * (side - 1), cy / (h - 1) * (side - 1)])
    return np.array(found) * np.array(target.image_size) / side


@pytest.mark.parametrize("name", ["nn", "bilinear", "softargmax", "kernel-softargmax"])
def test_corners_against_sd4matchs_loop(name):
    rng = np.random.default_rng(1)
    for seed in range(5):
        (source,), (target,) = maps(2 * seed, ((16, 9),)), maps(2 * seed + 1, ((16, 9),))
        points = np.concatenate([np.floor(rng.uniform(0, 1, (5, 2)) * SIZE), [[0, 0], [49, 35], [49.4, 35.4]]])
        found = matched(MatchRule(Matcher(name), (1.0,), reading="corners"), [source], [target], points)
        np.testing.assert_allclose(found.target, loop_sd4match(source, target, points, name), atol=2e-3)


def test_bilinear_by_centres_mixes_the_corners_matches():
    """By the half-pixel rule, joined and apart: each corner cell's best cell, mixed; letterbox padding has no say."""
    for geometry in (Geometry.stretch(SIZE, INPUT), Geometry.letterbox(SIZE, INPUT)):
        (source,), (target,) = (maps(seed, ((16, 8),), geometry=geometry) for seed in (0, 1))
        points = np.random.default_rng(3).uniform(-0.5, 1, (12, 2)) + np.random.default_rng(4).uniform(0, 34, (12, 2))
        found = matched(MatchRule(Matcher("bilinear"), (1.0,)), [source], [target], points)
        shown = content_cells(geometry, (8, 8))
        rows, columns = np.flatnonzero(shown.any(axis=1)), np.flatnonzero(shown.any(axis=0))
        unit = target.data / np.linalg.norm(target.data, axis=0)
        want = []
        for x, y in geometry.to_cells(points, (8, 8)):
            x, y = min(max(x, columns[0]), columns[-1]), min(max(y, rows[0]), rows[-1])
            x0, y0 = min(int(x), columns[-1] - 1), min(int(y), rows[-1] - 1)
            place = np.zeros(2)
            for dx in (0, 1):
                for dy in (0, 1):
                    cosine = np.where(shown, np.tensordot(source.data[:, y0 + dy, x0 + dx], unit, 1), -np.inf)
                    ny, nx = np.unravel_index(cosine.argmax(), cosine.shape)
                    weight = (x - x0 if dx else x0 + 1 - x) * (y - y0 if dy else y0 + 1 - y)
                    place += weight * np.array([nx, ny])
            want.append(place)
        pixels = geometry.to_pixels(np.array(want), (8, 8))
        np.testing.assert_allclose(found.target, np.clip(pixels, 0, np.array(SIZE) - 1.0), atol=1e-6)
        assert np.isfinite(found.score).all()
        assert (found.margin >= 0).all()
        assert np.isfinite(found.cycle_error).all()


@pytest.mark.parametrize("combine", ["concat", "score-sum"])
def test_bilinear_on_a_cell_s_centre_is_its_nearest_neighbour(combine):
    source, target = maps(0), maps(1)
    points = source[0].geometry.to_pixels(np.array([[2.0, 3.0], [5.0, 5.0], [11.0, 11.0]]), (12, 12))
    for_one, for_all = (
        matched(MatchRule(Matcher(name), (1.0, 2.0), combine=combine), source, target, points)
        for name in ("bilinear", "nn")
    )
    np.testing.assert_allclose(for_one.target, for_all.target)
    np.testing.assert_allclose(for_one.margin, for_all.margin)


@pytest.mark.parametrize("combine", ["score-sum", "score-product"])
def test_heat_of_branches_apart_peaks_where_the_match_is(combine):
    rule = MatchRule(Matcher("dense"), (1.0, 3.0), combine=combine)
    ready = [rule.prepare(rule.fuse(maps(seed))) for seed in (0, 1)]
    point = np.array([[21.0, 17.0]])
    heat = ready[0].heat(ready[1], point[0])
    assert heat.shape == (SIZE[1], SIZE[0])
    y, x = np.unravel_index(heat.argmax(), heat.shape)
    found = ready[0].match(ready[1], point)
    assert found.target.tolist() == [[x, y]]
    assert found.score[0] == pytest.approx(heat.max(), abs=1e-6)
    if combine == "score-sum":
        joined = MatchRule(Matcher("dense"), (1.0, 3.0))
        both = [joined.prepare(joined.fuse(maps(seed))) for seed in (0, 1)]
        np.testing.assert_allclose(heat, both[0].heat(both[1], point[0]), atol=2e-6)
    with pytest.raises(PointError, match="lies outside"):
        ready[0].heat(ready[1], (-9, 2))
    if combine == "score-product":
        with pytest.raises(InputError, match="no mutual matches"):
            ready[0].mutual(ready[1])
    else:  # sums of cosines are the cosines of the joined map
        found, wanted = ready[0].mutual(ready[1]), both[0].mutual(both[1])
        np.testing.assert_allclose(found.target, wanted.target)
        np.testing.assert_allclose(found.score, wanted.score, atol=2e-6)
    assert ready[1].nbytes > 0
    assert ready[0].image_size == SIZE


def test_corner_geometry_takes_corners_to_corners():
    geometry = CornerGeometry.stretch((50, 36), (96, 96))
    cells = geometry.to_cells([[0, 0], [767 * 50 / 768, 767 * 36 / 768]], (9, 9))
    np.testing.assert_allclose(cells, [[0, 0], [8, 8]])
    points = np.random.default_rng(0).uniform(0, 30, (5, 2))
    np.testing.assert_allclose(geometry.to_pixels(geometry.to_cells(points, (9, 9)), (9, 9)), points)


def test_points_outside_the_source_are_read_at_its_border():
    source, target = maps(0, ((8, 6),)), maps(1, ((8, 6),))
    rule = MatchRule(Matcher("dense"), (1.0,))
    ready = rule.prepare(rule.fuse(source)), rule.prepare(rule.fuse(target))
    points = np.array([[60.0, 10.0], [5.0, 5.0], [-4.0, 40.0]])
    found, clamped = find(*ready, points, SIZE, False)
    assert clamped == 2
    assert found.source.tolist() == points.tolist()
    border, _ = find(*ready, np.array([[49.5, 10.0], [5.0, 5.0], [-0.5, 35.5]]), SIZE, False)
    assert found.target.tolist() == border.target.tolist()


def test_no_points():
    for combine in ("concat", "score-sum", "score-product"):
        for name in MATCHERS:
            rule = MatchRule(Matcher(name), (1.0, 1.0), combine=combine)
            assert matched(rule, maps(0), maps(1), np.zeros((0, 2))).target.shape == (0, 2)


def test_of_a_recipe():
    recipe = Recipe((Branch(("up1", "up2"), 5, weight=2.0), Branch(("mid",), 7)))
    assert MatchRule.of(recipe).shares == (1.0, 1.0, 1.0)
    assert MatchRule.of(recipe, "score-sum").apart
    assert not MatchRule.of(Recipe((Branch(("up1",), 5),)), "score-product").apart  # a single map is joined already
    with pytest.raises(InputError, match="combine is 'sum'; allowed: concat"):
        MatchRule.of(recipe, "sum")
    with pytest.raises(InputError, match="reading is 'edges'"):
        MatchRule.of(recipe, reading="edges")
    with pytest.raises(InputError, match="letterbox"):
        MatchRule.of(dataclasses.replace(recipe, fit="letterbox"), reading="corners")
    mutual = dataclasses.replace(recipe, matcher=Matcher("mutual"))
    assert MatchRule.of(mutual, "score-sum").combine == "concat"  # the same cosines
    with pytest.raises(InputError, match="mutual"):
        MatchRule.of(mutual, "score-product")
