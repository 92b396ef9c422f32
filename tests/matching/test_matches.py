"""What every matcher owes its caller: checked input, empty in empty out, one result shape."""

import subprocess
import sys

import numpy as np
import pytest

from difftap.coords import Geometry
from difftap.errors import InputError, PointError
from difftap.featuremap import FeatureMap
from difftap.matching import Matches, heat_map, match_points
from difftap.recipe import MATCHERS, Matcher

GEOMETRY = Geometry.stretch((50, 30), (64, 64))
MAP = FeatureMap(np.random.default_rng(0).standard_normal((4, 5, 6)).astype(np.float32), GEOMETRY)


@pytest.mark.parametrize("name", MATCHERS)
def test_empty_in_empty_out(name):
    for nothing in ([], np.zeros((0, 2)), np.zeros((0,))):
        matches = match_points(MAP, MAP, nothing, Matcher(name))
        assert len(matches) == 0
        assert matches.source.shape == matches.target.shape == (0, 2)
        assert matches.score.shape == matches.margin.shape == matches.cycle_error.shape == (0,)


@pytest.mark.parametrize("name", MATCHERS)
def test_shapes_types_and_borders(name):
    corners = [[-0.5, -0.5], [49.5, 29.5], [0, 29], [20.25, 13.75]]
    matches = match_points(MAP, MAP, corners, Matcher(name))
    assert isinstance(matches, Matches)
    assert matches.source.tolist() == corners
    for values, shape in ((matches.target, (4, 2)), (matches.score, (4,)), (matches.margin, (4,))):
        assert values.shape == shape
        assert values.dtype == np.float64
    assert np.isfinite(matches.target).all()
    assert (matches.target >= 0).all()
    assert (matches.target <= [49, 29]).all()
    assert (np.abs(matches.score) <= 1).all()


@pytest.mark.parametrize(
    ("points", "message"),
    [
        (
            [[10, 10], [50, 3]],
            r"point 50,3 lies outside the source image, which is 50 x 30 pixels; allowed",
        ),
        ([[float("nan"), 3]], "point nan,3 lies outside"),
        ([[float("inf"), 3]], "point inf,3 lies outside"),
        ([[1, -0.6], [99, 99]], "point 1,-0.6 lies outside"),
        ([1, 2], r"points have shape \(2,\)"),
        ([[1, 2, 3]], r"points have shape \(1, 3\)"),
        ([["a", "b"]], "points are not numbers"),
        ([[1, 2], [3]], "points are not numbers"),
    ],
)
def test_bad_points(points, message):
    with pytest.raises(PointError, match=message):
        match_points(MAP, MAP, points, Matcher("dense"))


def test_heat_map_needs_one_point():
    for bad in ([], [1, 2, 3], [99, 0]):
        with pytest.raises(PointError):
            heat_map(MAP, MAP, bad, Matcher("nn"))
    assert heat_map(MAP, MAP, [4, 5], Matcher("nn")).shape == (30, 50)


@pytest.mark.parametrize("name", MATCHERS)
def test_channels_must_agree(name):
    other = FeatureMap(np.ones((3, 5, 6), np.float32), GEOMETRY)
    with pytest.raises(InputError, match="source map has 4 channels and the target map 3"):
        match_points(MAP, other, [[1, 1]], Matcher(name))


def test_the_room_needs_numpy_alone():
    code = (
        "import sys; import difftap.matching; "
        "bad = [m for m in ('torch', 'scipy', 'PIL', 'click', 'faiss', 'onnxruntime', 'difftap.engine', "
        "'difftap.export', 'difftap.bench', 'difftap.prompts') if m in sys.modules]; sys.exit(' '.join(bad) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
