"""The loss against loops in plain numpy, and the joining of maps against the one that matching uses."""

import math

import numpy as np
import pytest

from difftap.coords import Geometry
from difftap.featuremap import FeatureMap
from difftap.matching import combine

torch = pytest.importorskip("torch")

from difftap.tuning import loss  # noqa: E402

SHAPE = (5, 9, 11)  # (C, h, w)


def unit(vector):
    return vector / np.linalg.norm(vector)


def bilinear(values, x, y):
    """Values ``(h, w, ...)`` read at one place; the border repeats."""
    height, width = values.shape[:2]
    total = 0.0
    for j in (math.floor(y), math.floor(y) + 1):
        for i in (math.floor(x), math.floor(x) + 1):
            weight = (1 - abs(x - i)) * (1 - abs(y - j))
            total = total + weight * values[min(max(j, 0), height - 1), min(max(i, 0), width - 1)]
    return total


def slow_loss(source, target, here, there, rule):
    """One pair's mean loss, one keypoint, one cell and one place at a time."""
    height, width = target.shape[1:]
    losses = []
    for (sx, sy), (tx, ty) in zip(here, there, strict=True):
        query = unit(bilinear(source.transpose(1, 2, 0), sx, sy))
        cosines = np.array([[query @ unit(target[:, y, x]) for x in range(width)] for y in range(height)])
        exponents = np.exp(cosines / 0.04 - cosines.max() / 0.04)
        shares = exponents / exponents.sum()
        weights, values = [], []
        for dy in range(-3, 4):
            for dx in range(-3, 4):
                x, y = tx + dx, ty + dy
                weight = math.exp(-(dx * dx + dy * dy) / (2 * 1.5**2))
                if rule == "published" and 0 < x < width - 1 and 0 < y < height - 1:
                    weights.append(weight / (2 * math.pi * 1.5**2))
                    values.append(math.log(bilinear(shares, x, y)))
                if rule == "normalised" and 0 <= x <= width - 1 and 0 <= y <= height - 1:
                    weights.append(weight)
                    values.append(bilinear(np.log(shares), x, y))
        losses.append(-np.dot(weights, values) / (sum(weights) if rule == "normalised" else 1))
    return float(np.mean(losses))


@pytest.mark.parametrize("rule", loss.RULES)
@pytest.mark.parametrize("seed", range(6))
def test_the_loss_is_what_loops_give(seed, rule):
    rng = np.random.default_rng(seed)
    source, target = rng.standard_normal((2, *SHAPE))
    # Some keypoints lie at the border and in corners, half a cell outside the outermost centres included.
    corners = np.array([[-0.5, -0.5], [10.5, 8.5], [0, 8], [10, 0.25]])
    here = np.concatenate([rng.uniform(0, (10, 8), (5, 2)), corners])
    there = np.concatenate([rng.uniform(0, (10, 8), (5, 2)), corners[::-1]])
    scores = loss.cosines(*(torch.from_numpy(one) for one in (source, target, here)))
    got = loss.gaussian_cross_entropy(scores, torch.from_numpy(there), rule).mean()
    assert float(got) == pytest.approx(slow_loss(source, target, here, there, rule), rel=1e-9)


def test_the_published_gaussian_is_a_density_that_is_not_scaled():
    """Uniform scores: the loss is the Gaussian's sum, 0.9654, times the logarithm of the number of cells."""
    scores = torch.zeros(1, 21, 21, dtype=torch.float64)
    got = float(loss.gaussian_cross_entropy(scores, torch.tensor([[10.3, 9.6]], dtype=torch.float64)))
    assert got / math.log(21 * 21) == pytest.approx(0.9654, abs=5e-5)


def test_the_loss_is_least_where_the_right_place_is_best():
    """A map that spreads as the Gaussian does beats one that singles the cell out, and that beats a wrong one."""
    cells = torch.tensor([[5.0, 4.0]], dtype=torch.float64)
    right, wrong = torch.zeros(2, 1, 9, 11, dtype=torch.float64)
    right[0, 4, 5] = 1
    wrong[0, 1, 9] = 1
    down, across = torch.meshgrid(torch.arange(9) - 4.0, torch.arange(11) - 5.0, indexing="ij")
    spread = (-(down**2 + across**2) / (2 * 1.5**2) * loss.TEMPERATURE).double()[None]
    losses = [float(loss.gaussian_cross_entropy(one, cells)) for one in (spread, right, wrong)]
    assert losses == sorted(losses)


@pytest.mark.parametrize("upsample", ["bilinear", "bicubic"])
@pytest.mark.parametrize("shares", [(1.0, 1.0), (1.0, 3.0)])
def test_maps_are_joined_as_matching_joins_them(upsample, shares):
    rng = np.random.default_rng(0)
    maps = [rng.standard_normal(shape).astype(np.float32) for shape in ((4, 4, 6), (3, 8, 12))]
    geometry = Geometry.stretch((60, 40), (96, 64))
    want = combine([FeatureMap(one, geometry) for one in maps], shares, upsample).data
    got = loss.join([torch.from_numpy(one) for one in maps], shares, upsample)
    assert np.allclose(got.numpy(), want, atol=2e-6)


def test_a_product_of_scores_is_the_weighted_geometric_mean():
    rng = np.random.default_rng(1)
    here, there = ([torch.from_numpy(rng.random((4, 5, 6))) for _ in range(2)] for _ in range(2))
    cells = torch.tensor([[1.25, 2.0], [4.0, 0.5]], dtype=torch.float64)
    got = loss.fused_cosines(here, there, cells, (1.0, 3.0), "bicubic", "score-product")
    unit = [[torch.nn.functional.normalize(one, dim=0) for one in maps] for maps in (here, there)]
    parts = [loss.cosines(one, other, cells) for one, other in zip(*unit, strict=True)]
    assert torch.allclose(got, parts[0] ** 0.25 * parts[1] ** 0.75)


def test_a_sum_of_scores_is_their_mean():
    rng = np.random.default_rng(2)
    here, there = ([torch.from_numpy(rng.standard_normal((4, 5, 6))) for _ in range(2)] for _ in range(2))
    cells = torch.tensor([[1.0, 2.0], [4.0, 0.0]], dtype=torch.float64)  # whole: joined vectors there are unit ones
    got = loss.fused_cosines(here, there, cells, (1.0, 3.0), "bicubic", "score-sum")
    parts = [loss.cosines(one, other, cells) for one, other in zip(here, there, strict=True)]
    assert torch.allclose(got, 0.25 * parts[0] + 0.75 * parts[1])
