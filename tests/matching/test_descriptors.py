"""The joined map's cosine is the weighted mean of the branches' cosines."""

import numpy as np
import pytest

from difftap.coords import Geometry
from difftap.errors import InputError
from difftap.featuremap import FeatureMap
from difftap.matching import combine

torch = pytest.importorskip("torch")
F = torch.nn.functional

GEOMETRY = Geometry.stretch((60, 50), (64, 64))


def feature_map(seed, shape, geometry=GEOMETRY):
    return FeatureMap(np.random.default_rng(seed).standard_normal(shape).astype(np.float32), geometry)


@pytest.mark.parametrize("upsample", ["bilinear", "bicubic"])
def test_cosine_is_the_weighted_mean(upsample):
    shapes, weights = [(5, 4, 3), (3, 8, 9), (2, 2, 2)], [1.0, 2.0, 0.5]
    ours = [combine([feature_map(10 * k + n, s) for n, s in enumerate(shapes)], weights, upsample) for k in range(2)]
    cosines = np.einsum("cp,cq->pq", *(m.data.reshape(10, -1) for m in ours))
    expected = np.zeros((72, 72))
    for n, (shape, weight) in enumerate(zip(shapes, weights, strict=True)):
        units = []
        for k in range(2):
            data = F.normalize(torch.from_numpy(feature_map(10 * k + n, shape).data).double(), dim=0)
            data = F.interpolate(data[None], size=(8, 9), mode=upsample, align_corners=False)[0]
            units.append(F.normalize(data, dim=0).flatten(1).numpy())
        expected += weight / 3.5 * units[0].T @ units[1]
    np.testing.assert_allclose(cosines, expected, atol=1e-5)
    assert ours[0].data.shape == (10, 8, 9)
    assert ours[0].data.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(ours[0].data, axis=0), 1.0, atol=1e-6)


def test_finest_on_each_axis():
    assert combine([feature_map(0, (1, 2, 7)), feature_map(1, (1, 5, 3))], [1, 1], "bicubic").grid == (7, 5)


def test_one_map_is_returned_as_it_is():
    only = feature_map(0, (3, 2, 2))
    assert combine([only], [0.3], "bicubic") is only


def test_zero_cells_stay_zero():
    blank = FeatureMap(np.zeros((2, 3, 3), np.float32), GEOMETRY)
    joined = combine([blank, feature_map(0, (2, 3, 3))], [1, 1], "bilinear")
    assert (joined.data[:2] == 0).all()
    np.testing.assert_allclose(np.linalg.norm(joined.data, axis=0), np.sqrt(0.5), atol=1e-6)


@pytest.mark.parametrize(
    ("maps", "weights", "upsample", "message"),
    [
        ([], [], "bicubic", "no feature maps"),
        ([feature_map(0, (1, 2, 2))] * 2, [1.0], "bicubic", "1 weights for 2 feature maps"),
        ([feature_map(0, (1, 2, 2))] * 2, [1.0, 0.0], "bicubic", "allowed: finite numbers above 0"),
        ([feature_map(0, (1, 2, 2))] * 2, [1.0, float("nan")], "bicubic", "allowed: finite numbers above 0"),
        ([feature_map(0, (1, 2, 2))] * 2, [1.0, 1.0], "nearest", "allowed: bilinear, bicubic"),
        (
            [feature_map(0, (1, 2, 2)), feature_map(0, (1, 2, 2), Geometry.stretch((9, 9), (64, 64)))],
            [1.0, 1.0],
            "bicubic",
            "same image",
        ),
    ],
)
def test_errors(maps, weights, upsample, message):
    with pytest.raises(InputError, match=message):
        combine(maps, weights, upsample)
