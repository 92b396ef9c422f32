from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from difftap.artifacts.manifest import file_digest
from difftap.datasets.keypoints import load
from difftap.datasets.layout import DatasetError
from difftap.datasets.synthetic import KINDS, Distortion, Homography, ThinPlate, WarpedTarget
from difftap.errors import InputError
from difftap.images import load_image
from tests.harness import write_picture

PLAIN = Distortion(occlusion=0.0, photometric=0.0)


@pytest.fixture
def root(tmp_path):
    write_picture(tmp_path / "pictures/cup/a.png", (90, 70), seed=1)
    write_picture(tmp_path / "pictures/cup/b.jpg", (70, 90), seed=2)
    write_picture(tmp_path / "pictures/top.png", (64, 64), seed=3)
    (tmp_path / "pictures/notes.txt").write_text("not an image")
    return tmp_path / "pictures"


def at(pixels, points):
    """Bilinear values (N, 3) at points (N, 2)."""
    x0, y0 = np.floor(points).astype(int).T
    x0, y0 = np.minimum(x0, pixels.shape[1] - 2), np.minimum(y0, pixels.shape[0] - 2)
    fx, fy = (points[:, 0] - x0)[:, None], (points[:, 1] - y0)[:, None]
    upper, lower = (
        pixels[y] * (1 - fx) + right * fx
        for y, right in (((y0, x0), pixels[y0, x0 + 1]), ((y0 + 1, x0), pixels[y0 + 1, x0 + 1]))
    )
    return upper * (1 - fy) + lower * fy


def test_every_image_gets_every_warp(root, tmp_path):
    found = load("synthetic", root, cache=tmp_path / "made")
    assert [sample.name for sample in found.samples] == [
        f"{file}:{kind}" for file in ("cup/a.png", "cup/b.jpg", "top.png") for kind in ("homography", "thin-plate")
    ]
    assert [sample.category for sample in found.samples] == ["cup"] * 4 + ["all"] * 2
    assert not (tmp_path / "made").exists()  # nothing is made before it is needed
    sample = found[0]
    assert sample.target.parent == tmp_path / "made"
    assert load_image(sample.target).size == sample.target_size == sample.source_size == (90, 70)
    assert sample.target_box == (0, 0, 90, 70)
    assert len(list((tmp_path / "made").iterdir())) == 1
    assert all(path.target.exists() for path in found)


def test_the_target_shows_at_its_keypoints_what_the_source_shows(root, tmp_path):
    for sample in load("synthetic", root, cache=tmp_path / "made", distortion=PLAIN):
        assert len(sample.keypoint_ids) > 40
        source, target = (load_image(path).pixels.astype(float) for path in (sample.source, sample.target))
        inner = ((sample.target_points > 2) & (sample.target_points < np.array(sample.target_size) - 3)).all(axis=1)
        shown = at(target, sample.target_points[inner]) - at(source, sample.source_points[inner])
        assert np.abs(shown).mean() < 1.5  # the pictures are smooth: what is left is resampling twice and rounding
        shifted = at(target, sample.target_points[inner] + 2) - at(source, sample.source_points[inner])
        assert np.abs(shown).mean() < np.abs(shifted).mean() / 2


def test_keypoints_are_pixel_centres_in_sight(root, tmp_path):
    for sample in load("synthetic", root, cache=tmp_path, distortion=Distortion(strength=0.24, occlusion=0.5)).samples:
        assert (sample.source_points == np.floor(sample.source_points)).all()
        assert (sample.target_points >= 0).all()
        assert (sample.target_points <= np.array(sample.target_size) - 1).all()
        assert sample.keypoint_ids == tuple(f"{x:.0f},{y:.0f}" for x, y in sample.source_points)
        assert len(sample.keypoint_ids) < 64


def test_covered_keypoints_are_left_out_and_the_cover_is_where_it_is_said_to_be(root, tmp_path):
    covering = Distortion(occlusion=0.6, photometric=0.0, kinds=("thin-plate",))
    covered = load("synthetic", root, cache=tmp_path / "made", distortion=covering)
    bare = {s.name: s for s in load("synthetic", root, cache=tmp_path / "made", distortion=PLAIN)}
    for sample in covered:
        making = WarpedTarget(covering, "thin-plate", sample.source, file_digest(sample.source))
        _, patches, _ = making.plan(sample.source_size)
        assert len(sample.keypoint_ids) < len(bare[sample.name].keypoint_ids)
        for x1, y1, x2, y2 in patches:
            within = (
                (sample.target_points > [x1 - 0.5, y1 - 0.5]) & (sample.target_points < [x2 - 0.5, y2 - 0.5])
            ).all(axis=1)
            assert not within.any()
        mask = np.zeros(sample.target_size[::-1], bool)
        for x1, y1, x2, y2 in patches:
            mask[y1:y2, x1:x2] = True
        assert 0.1 < mask.mean() <= 0.6
        blocks = load_image(sample.target).pixels[mask].astype(float)
        assert blocks.std() > 60  # random colours


def test_the_same_settings_make_the_same_bytes_whatever_else_is_there(root, tmp_path):
    first = {s.name: s for s in load("synthetic", root, cache=tmp_path / "one")}
    (root / "cup/b.jpg").unlink()
    for sample in load("synthetic", root, cache=tmp_path / "two"):
        other = first[sample.name]
        assert sample.target.name == other.target.name
        assert sample.target.read_bytes() == other.target.read_bytes()
        np.testing.assert_array_equal(sample.target_points, other.target_points)
    other_seed = load("synthetic", root, cache=tmp_path / "two", distortion=Distortion(seed=1)).samples[0]
    assert other_seed.target.name != first[other_seed.name].target.name


def test_only_what_decides_the_pixels_names_the_target(root):
    file = root / "top.png"
    keys = [
        WarpedTarget(distortion, "homography", file, "0").key
        for distortion in (
            Distortion(),
            Distortion(grid=3),
            Distortion(kinds=("homography",)),
            Distortion(strength=0.1),
        )
    ]
    assert keys[0] == keys[1] == keys[2] != keys[3]


def test_limit_spreads_over_the_folder_and_the_cache_is_no_part_of_it(root):
    def files(**options) -> list[str]:
        found = load("synthetic", root, cache=root / "made", **options)
        return [sample.source.name for sample in found][::2]

    assert files() == ["a.png", "b.jpg", "top.png"]
    assert len(list((root / "made").iterdir())) == 6
    assert files(limit=2) == ["a.png", "b.jpg"]
    assert files(limit=9) == ["a.png", "b.jpg", "top.png"]
    with pytest.raises(InputError, match="limit is 0"):
        files(limit=0)
    with pytest.raises(InputError, match="the folder of the images itself"):
        load("synthetic", root, cache=root)


def test_unusable_images_are_counted(root, tmp_path):
    (root / "bad.png").write_bytes(b"nothing of the kind")
    write_picture(root / "tiny.png", (15, 40))
    with pytest.raises(DatasetError, match=r"4 of 10 pairs .*: 2 unreadable-image, 2 malformed"):
        load("synthetic", root, cache=tmp_path)
    found = load("synthetic", root, cache=tmp_path, allow_missing=True)
    assert (len(found), len(found.problems)) == (6, 4)


def test_a_folder_without_images_or_no_cache_is_refused(tmp_path):
    with pytest.raises(DatasetError, match="no images in") as caught:
        load("synthetic", tmp_path, cache=tmp_path / "made")
    assert "JPEG, PNG" in caught.value.detail
    with pytest.raises(DatasetError, match="give cache"):
        load("synthetic", tmp_path)


@pytest.mark.parametrize(
    "settings",
    [{"strength": 0.25}, {"occlusion": 1.0}, {"photometric": -1}, {"kinds": ()}, {"kinds": ("shear",)}, {"grid": 0}],
)
def test_settings_out_of_bounds_are_refused(settings):
    with pytest.raises(InputError, match="allowed"):
        Distortion(**settings)


@pytest.mark.dataset
def test_real_photographs(real, tmp_path):
    found = load("synthetic", real("spair-mini") / "JPEGImages", cache=tmp_path, limit=2)
    assert len(found) == 4
    for sample in found:
        assert isinstance(sample.target, Path)
        assert load_image(sample.target).size == sample.target_size
        assert len(sample.keypoint_ids) > 20


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
