"""The laws over a list of maps, against the slow way written from their definition, and by hand."""

import numpy as np
import pytest

from difftap.coords import Geometry
from difftap.errors import InputError
from difftap.featuremap import FeatureMap
from difftap.matching import MatchRule, match_points, nearest_cell
from difftap.recipe import COMBINES, Branch, Matcher, Recipe

torch = pytest.importorskip("torch")
F = torch.nn.functional

SIZE = (40, 30)
GEOMETRY = Geometry.stretch(SIZE, (64, 64))


def maps(seed, shapes):
    rng = np.random.default_rng(seed)
    return [FeatureMap(rng.standard_normal(shape).astype(np.float32), GEOMETRY) for shape in shapes]


def slow_scores(source, target, point, law, shares, upsample, interpolation):
    """Score (H, W) of a whole source pixel with every target pixel; everything enlarged, nothing saved."""
    grid = max(m.data.shape[1] for m in source), max(m.data.shape[2] for m in source)
    x, y = point

    def read(m, share):
        data = torch.from_numpy(m.data).double()[None]
        if len(source) > 1:  # cells of length 1 before and after coming to the finest grid
            data = F.normalize(data, dim=1)
            if m.data.shape[1:] != grid:
                data = F.normalize(F.interpolate(data, size=grid, mode=upsample, align_corners=False), dim=1)
        return share**0.5 * F.interpolate(data, size=SIZE[::-1], mode=interpolation, align_corners=False)[0]

    near, far = ([read(m, s) for m, s in zip(each, shares, strict=True)] for each in (source, target))
    if law == "score-product" and len(source) > 1:
        score = torch.ones(SIZE[::-1], dtype=torch.float64)
        for a, b, share in zip(near, far, shares, strict=True):
            cosine = torch.einsum("c,cyx->yx", F.normalize(a[:, y, x], dim=0), F.normalize(b, dim=0))
            score *= cosine.clamp(0, 1) ** share
        return score.numpy()
    a, b = torch.cat(near), torch.cat(far)
    return torch.einsum("c,cyx->yx", F.normalize(a[:, y, x], dim=0), F.normalize(b, dim=0)).numpy()


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("upsample", ["bilinear", "bicubic"])
@pytest.mark.parametrize("law", COMBINES)
@pytest.mark.parametrize("shapes", [[(6, 7, 9)], [(6, 4, 5), (3, 8, 10)], [(6, 8, 10), (3, 8, 10), (2, 3, 3)]])
def test_dense_and_heat_equal_the_slow_way(shapes, law, upsample, interpolation):
    weights = (3.0, 1.0, 2.0)[: len(shapes)]
    shares = np.array(weights) / sum(weights)
    source, target = maps(1, shapes), maps(2, shapes)
    rule = MatchRule(Matcher("dense", interpolation), weights, upsample, law)
    first, second = (rule.prepare(rule.fuse(each)) for each in (source, target))
    points = np.array([[0, 0], [39, 29], [17, 4]])
    found = first.match(second, points)
    for k, point in enumerate(points):
        slow = slow_scores(source, target, point, law, shares, upsample, interpolation)
        x, y = found.target[k].astype(int)
        assert slow[y, x] >= slow.max() - 2e-6
        assert found.score[k] == pytest.approx(slow.max(), abs=2e-6)
        np.testing.assert_allclose(first.heat(second, point), slow, atol=5e-6)


@pytest.mark.parametrize("law", COMBINES)
def test_nan_in_one_of_several_maps_is_refused(law):
    good, bad = maps(0, [(3, 4, 4), (2, 2, 2)]), maps(1, [(3, 4, 4), (2, 2, 2)])
    bad[1].data[0, 1, 1] = np.nan
    for name in ("dense", "nn"):
        rule = MatchRule(Matcher(name), (1.0, 1.0), combine=law)
        ready = [rule.prepare(rule.fuse(each)) for each in (good, bad)]
        with pytest.raises(InputError, match="NaN or infinity"):
            ready[0].match(ready[1], [[1, 1]])


def test_a_branch_s_weight_is_divided_by_its_taps():
    recipe = Recipe((Branch(("up1", "up2", "mid"), 5, weight=3.0), Branch(("mid",), 7, weight=0.5)))
    assert MatchRule.of(recipe).shares == (1.0, 1.0, 1.0, 0.5)


@pytest.mark.parametrize(
    ("law", "score"), [("concat", 0.65), ("score-sum", 0.65), ("score-product", 0.8**0.75 * 0.2**0.25)]
)
def test_score_of_a_list_by_hand(law, score):
    """Cosines 0.8 and 0.2 with the shares 3/4 and 1/4: mean 0.65, or the weighted geometric mean."""

    def one(x, y):
        return FeatureMap(np.array([[[x]], [[y]]], np.float32), GEOMETRY)

    source = [one(1.0, 0.0), one(1.0, 0.0)]
    target = [one(8.0, 6.0), one(0.2, 0.96**0.5)]
    rule = MatchRule(Matcher("nn"), (3.0, 1.0), combine=law)
    first, second = (rule.prepare(rule.fuse(each)) for each in (source, target))
    assert first.match(second, [[3, 3]]).score[0] == pytest.approx(score, abs=1e-6)


def test_cosines_within_a_billionth_are_equal():
    assert nearest_cell(np.array([[[0.5, 0.5 + 5e-10, 0.1]]])).tolist() == [[0, 0]]
    assert nearest_cell(np.array([[[0.5, 0.5 + 2e-9, 0.1]]])).tolist() == [[1, 0]]


def test_first_and_last_pixel():
    """Cells are the pixels here, each unlike the others: every pixel finds itself, those of the border too."""
    data = np.eye(4, dtype=np.float32)[:, None, :]
    features = FeatureMap(data, Geometry.stretch((4, 1), (4, 1)))
    for name in ("dense", "nn", "bilinear"):
        assert match_points(features, features, [[0, 0], [3, 0]], Matcher(name)).target.tolist() == [[0, 0], [3, 0]]


def test_half_a_pixel_by_hand():
    """Two cells under four pixels: pixel 1 lies a quarter of a cell right of the first cell's centre."""
    data = np.eye(2, dtype=np.float32)[:, None, :]
    features = FeatureMap(data, Geometry.stretch((4, 1), (8, 2)))
    other = FeatureMap(np.array([[[1.0]], [[0.0]]], np.float32), Geometry.stretch((1, 1), (8, 2)))
    found = match_points(features, other, [[1, 0]], Matcher("dense"))
    assert found.score[0] == pytest.approx(0.75 / np.hypot(0.75, 0.25))


def test_window_softargmax_by_hand():
    """Cosines 1, 0.6, 0, 0, 0.8 in cells of 10 pixels; a window of 3 leaves 1, 0.6, 0, 0, 0."""
    cells = np.array([[1.0, 0.6, 0.0, 0.0, 0.8], [0.0, 0.8, 1.0, 1.0, 0.6]], np.float32)[:, None, :]
    target = FeatureMap(cells, Geometry.stretch((50, 10), (80, 16)))
    source = FeatureMap(np.array([[[1.0]], [[0.0]]], np.float32), Geometry.stretch((1, 1), (80, 16)))
    found = match_points(source, target, [[0, 0]], Matcher("window-softargmax", temperature=0.5, window=3))
    e = np.exp(np.array([2.0, 1.2, 0.0, 0.0, 0.0]))
    assert found.target[0] == pytest.approx([((e @ np.arange(5)) / e.sum() + 0.5) * 10 - 0.5, 4.5])
