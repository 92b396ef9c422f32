import numpy as np
import pytest

from difftap.datasets.objects import load
from difftap.prototypes import ObjectFilter
from difftap.study.transforms import (
    OBJECT_TRANSFORMS,
    TRANSFORMS,
    WHOLE_TRANSFORMS,
    transform_of,
    transformed,
)
from tests.datasets.builders import write_voc


@pytest.fixture
def source(tmp_path):
    return load("voc", write_voc(tmp_path), wanted=ObjectFilter(min_area=0.0))


def test_every_object_is_seen_once_under_every_transform(source):
    changed = transformed(source)
    seen = {}
    for key in changed.keys:
        for one in changed.read(key).objects:
            seen.setdefault(transform_of(key), []).append(one.instance)
    everything = [one.instance for key in source.keys for one in source.read(key).objects]
    assert list(seen) and set(seen) == set(TRANSFORMS)
    assert all(sorted(found) == sorted(everything) for found in seen.values())
    assert not set(changed.keys) & set(source.keys)


@pytest.mark.parametrize("kind", WHOLE_TRANSFORMS)
def test_masks_go_with_their_pixels(source, kind):
    plain = source.read("a")
    changed = transformed(source).read(f"a#{kind}")
    for before, after in zip(plain.masks, changed.masks, strict=True):
        # The pixels under the mask are the same, in another order.
        assert sorted(map(tuple, plain.image.pixels[before])) == sorted(map(tuple, changed.image.pixels[after]))
    assert changed.image.size == (plain.image.size if "rotate 90" != kind != "rotate 270" else (30, 40))


def test_turns_are_counter_clockwise(source):
    plain = source.read("a").image.pixels
    assert np.array_equal(transformed(source).read("a#rotate 90").image.pixels[-1, 0], plain[0, 0])
    assert np.array_equal(transformed(source).read("a#flip horizontal").image.pixels[0, -1], plain[0, 0])
    assert np.array_equal(transformed(source).read("a#flip vertical").image.pixels[-1, 0], plain[0, 0])


def test_crop_pad_keeps_the_place_and_greys_the_rest(source):
    plain, changed = source.read("a"), transformed(source).read("a#crop-pad#0")
    assert np.array_equal(changed.masks[0], plain.masks[0])
    inside = plain.masks[0]
    assert np.array_equal(changed.image.pixels[inside], plain.image.pixels[inside])
    rows, columns = np.nonzero(inside)
    outside = np.ones(inside.shape, np.bool_)
    outside[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1] = False
    assert (changed.image.pixels[outside] == 127).all()


def test_crop_resize_is_the_box(source):
    plain, changed = source.read("a"), transformed(source).read("a#crop-resize#2")
    rows, columns = np.nonzero(plain.masks[2])
    box = np.s_[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    assert np.array_equal(changed.image.pixels, plain.image.pixels[box])
    assert np.array_equal(changed.masks[0], plain.masks[2][box])
    assert changed.objects[0].instance == plain.objects[2].instance


def test_crop_shift_loses_a_share_of_the_object(source):
    kept = [1.0]
    for percent in (20, 40, 60):
        scene = transformed(source).read(f"a#crop-shift {percent} %#0")
        whole = transformed(source).read("a#crop-resize#0")
        assert scene.image.size == whole.image.size
        kept.append(float(scene.masks.sum() / whole.masks.sum()))
        assert kept[-1] == pytest.approx(1 - percent / 100, abs=0.04)
        move = round(percent / 100 * whole.image.size[0])
        # Object 0 is on the left, so the window moves right: its left edge is lost.
        assert np.array_equal(scene.masks[0][:, : -move or None], whole.masks[0][:, move:])
    assert kept == sorted(kept, reverse=True)


def test_the_window_moves_to_the_side_with_room_and_beyond_it_is_grey(source):
    scene = transformed(source).read("a#crop-shift 60 %#1")  # the right cat: the window moves left
    whole = transformed(source).read("a#crop-resize#1")
    move = round(0.6 * whole.image.size[0])
    assert np.array_equal(scene.masks[0][:, move:], whole.masks[0][:, :-move])
    wide = transformed(source).read("a#crop-shift 60 %#2")  # as wide as the image
    assert (wide.image.pixels[:, -round(0.6 * wide.image.size[0]) + 1 :] == 127).all()


def test_unreadable_images_stay_failures(source, tmp_path):
    (tmp_path / "JPEGImages/b.jpg").write_bytes(b"no picture")
    changed = transformed(source)
    keys = [key for key in changed.keys if key.startswith("b#")]
    assert len(keys) == len(OBJECT_TRANSFORMS) + len(WHOLE_TRANSFORMS)
    with pytest.raises(ValueError, match="not a picture"):
        changed.read(keys[0])
