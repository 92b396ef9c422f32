"""The picture: marks where the matches are, in every format, written whole or not at all."""

import dataclasses
import errno

import numpy as np
import pytest
from PIL import Image as PIL

from difftap.errors import OutputError
from difftap.images import Image
from difftap.matching import Matches
from difftap.pages.draw import _GAP, _HEIGHT, CAPTION_HEIGHT, _colour, _surest, check_output, draw_matches, save_picture

SOURCE, TARGET = Image(np.full((48, 60, 3), 90, np.uint8)), Image(np.full((96, 50, 3), 160, np.uint8))


def matches(source, target):
    source, target = np.array(source, float).reshape(-1, 2), np.array(target, float).reshape(-1, 2)
    return Matches(source, target, np.full(len(source), 0.9), np.full(len(source), 0.1), np.zeros(len(source)))


def place(point, image, left):
    """Where a point should be on the canvas: each panel is 480 pixels high, below a caption."""
    scale = _HEIGHT / image.size[1]
    return round((point[0] + 0.5) * scale - 0.5 + left), round((point[1] + 0.5) * scale - 0.5 + CAPTION_HEIGHT)


LEFTS = 0, 600 + _GAP, 600 + 250 + 2 * _GAP


def test_the_canvas_holds_both_panels_side_by_side():
    canvas = draw_matches(SOURCE, TARGET, matches([], []))
    assert canvas.size == (600 + _GAP + 250, _HEIGHT + CAPTION_HEIGHT)
    assert canvas.getpixel((300, 300)) == (90, 90, 90)
    assert canvas.getpixel((LEFTS[1] + 100, 300)) == (160, 160, 160)


@pytest.mark.parametrize("count", [1, 3, 41])
def test_marks_are_centred_on_the_points(count):
    rng = np.random.default_rng(0)
    a, b = rng.uniform(4, 40, (count, 2)), rng.uniform(4, 40, (count, 2))
    canvas = np.asarray(draw_matches(SOURCE, TARGET, matches(a, b)))
    last = count - 1  # later marks lie over earlier ones
    for point, image, left in ((a[last], SOURCE, LEFTS[0]), (b[last], TARGET, LEFTS[1])):
        x, y = place(point, image, left)
        assert tuple(canvas[y, x]) == _colour(last)
        ring = canvas[y - 9 : y + 10, x - 9 : x + 10]
        filled = np.argwhere((ring == _colour(last)).all(axis=2))
        if last == 0:
            assert np.abs(filled.mean(axis=0) - 9).max() < 1.5  # its number covers a corner of it


def test_a_match_without_a_target_is_a_hollow_ring_on_the_source_alone():
    canvas = np.asarray(draw_matches(SOURCE, TARGET, matches([[20, 20]], [[np.nan, np.nan]])))
    x, y = place((20, 20), SOURCE, 0)
    assert tuple(canvas[y, x]) == (90, 90, 90)
    assert (canvas[y, x - 6 : x - 4] == 0).all(axis=-1).any()
    assert (canvas[CAPTION_HEIGHT:, LEFTS[1] :] == 160).all()


def test_colours_differ_and_a_line_joins_the_two():
    assert len({_colour(i) for i in range(50)}) == 50
    canvas = np.asarray(draw_matches(SOURCE, TARGET, matches([[20, 20]], [[20, 40]])))
    x0, y0 = place((20, 20), SOURCE, 0)
    x1, y1 = place((20, 40), TARGET, LEFTS[1])
    middle = canvas[(y0 + y1) // 2 - 1 : (y0 + y1) // 2 + 2, (x0 + x1) // 2]
    assert (middle != 90).any()


def test_the_heat_map_is_a_third_panel_brightest_at_its_peak():
    heat = np.zeros((96, 50), np.float32)
    heat[70:80, 30:40] = 1
    canvas = np.asarray(draw_matches(SOURCE, TARGET, matches([[20, 20]], [[5, 5]]), (0, heat))).astype(int)
    assert canvas.shape[1] == LEFTS[2] + 250
    x, y = place((34, 75), TARGET, LEFTS[2])
    dark = place((5, 60), TARGET, LEFTS[2])
    assert canvas[y, x].sum() > canvas[dark[1], dark[0]].sum() + 200
    mark = place((5, 5), TARGET, LEFTS[2])
    assert tuple(canvas[mark[1], mark[0]]) == _colour(0)


def test_a_flat_heat_map_and_extreme_shapes_are_drawn():
    draw_matches(SOURCE, TARGET, matches([[20, 20]], [[5, 5]]), (0, np.full((96, 50), 0.3, np.float32)))
    thin = Image(np.zeros((1, 900, 3), np.uint8))
    assert (
        draw_matches(thin, Image(np.zeros((900, 1, 3), np.uint8)), matches([[899, 0]], [[0, 899]])).size[1]
        == _HEIGHT + CAPTION_HEIGHT
    )


def test_no_more_marks_than_the_limit():
    many = matches(np.tile([[20.0, 20.0]], (5, 1)), np.tile([[20.0, 20.0]], (5, 1)))
    few = matches(np.tile([[20.0, 20.0]], (3, 1)), np.tile([[20.0, 20.0]], (3, 1)))
    drawn, whole = (np.asarray(draw_matches(SOURCE, TARGET, found, limit=3)) for found in (many, few))
    assert (drawn[CAPTION_HEIGHT:] == whole[CAPTION_HEIGHT:]).all()
    assert (drawn[:CAPTION_HEIGHT] != whole[:CAPTION_HEIGHT]).any()  # the caption says that not all are drawn


def test_those_of_the_largest_margin_are_drawn_and_the_one_asked_for():
    found = dataclasses.replace(matches(np.zeros((4, 2)), np.zeros((4, 2))), margin=np.array([0.1, np.nan, 0.3, 0.2]))
    assert _surest(found, 2, None) == [2, 3]
    assert _surest(found, 2, 1) == [1, 2]
    assert _surest(found, 9, None) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("name", "kind"), [("a.png", "PNG"), ("a.jpg", "JPEG"), ("a.JPEG", "JPEG"), ("a.webp", "WEBP")]
)
def test_formats(tmp_path, name, kind):
    save_picture(PIL.new("RGB", (30, 20), (10, 200, 30)), tmp_path / name)
    with PIL.open(tmp_path / name) as opened:
        assert (opened.format, opened.size) == (kind, (30, 20))
        assert np.abs(np.asarray(opened.convert("RGB")).astype(int) - [10, 200, 30]).max() <= 4


@pytest.mark.parametrize("name", ["a.gif", "a", "a.png.txt", ".png"])
def test_other_endings_list_the_allowed_ones(tmp_path, name):
    with pytest.raises(OutputError, match=r"allowed: \.png, \.jpg, \.jpeg, \.webp"):
        check_output(tmp_path / name)


def test_a_picture_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    picture = PIL.new("RGB", (4, 4))
    with pytest.raises(OutputError, match="folder does not exist"):
        save_picture(picture, tmp_path / "none" / "a.png")
    (tmp_path / "b.png").mkdir()
    with pytest.raises(OutputError, match="a folder stands there"):
        save_picture(picture, tmp_path / "b.png")

    def full(self, handle, *_args, **_options):
        handle.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(PIL.Image, "save", full)
    with pytest.raises(OutputError, match="the disk is full"):
        save_picture(picture, tmp_path / "c.png")
    assert [path.name for path in tmp_path.iterdir()] == ["b.png"]
