"""Points from the user, and what is said of those that cannot be used."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from difftap.errors import PointError
from difftap.points import check_inside, grid_points, load_points, parse_point

numbers = st.floats(-1e6, 1e6)


@given(numbers, numbers)
def test_parse_point_reads_what_python_writes(x, y):
    assert parse_point(f"{x!r}, {y!r}") == (x, y)


@pytest.mark.parametrize("text", ["", "1", "1,2,3", "a,b", "1;2", "nan,1", "1,inf", "1,", ",", "1e999,0"])
def test_bad_points_are_quoted_back(text):
    with pytest.raises(PointError) as caught:
        parse_point(text)
    assert f"'{text}'" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.csv", "x,y\n1,2\n3.5,4\n"),
        ("p.csv", "1,2\n3.5,4\n"),
        ("p.csv", "\ufeffX , Y\r\n1,2\r\n\r\n3.5,4"),
        ("p.csv", "name,y,x\nnose,2,1\ntail,4,3.5\n"),
        ("p.json", "[[1, 2], [3.5, 4]]"),
        ("p.json", '[{"x": 1, "y": 2}, {"x": 3.5, "y": 4, "name": "tail"}]'),
        ("p.JSON", '{"points": [[1, 2], {"x": 3.5, "y": 4}]}'),
    ],
)
def test_points_files(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    points = load_points(path)
    assert points.dtype == np.float64
    assert points.tolist() == [[1, 2], [3.5, 4]]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("p.csv", "", "holds no point"),
        ("p.csv", "x,y\n", "holds no point"),
        ("p.csv", "x,y\n1,2\n3\n", "line 3"),
        ("p.csv", "x,y\n1,2\na,b\n", "line 3"),
        ("p.csv", "a,b\n1,2\n", "line 1"),
        ("p.csv", "x,y\n1,nan\n", "finite"),
        ("p.csv", "1," + "9" * 200_000, "points file"),
        ("p.json", "[[1, 2]", "not valid JSON"),
        ("p.json", "3", "list of points"),
        ("p.json", "{}", "list of points"),
        ("p.json", "[]", "holds no point"),
        ("p.json", "[[1, 2, 3]]", "entry 0"),
        ("p.json", '[[1, 2], [1, "a"]]', "entry 1"),
        ("p.json", "[[true, 1]]", "entry 0"),
        ("p.json", "[[null, 1]]", "entry 0"),
        ("p.json", f"[[{'9' * 400}, 1]]", "entry 0"),
        ("p.json", "[" * 100_000, "not valid JSON"),
    ],
)
def test_malformed_points_files_are_one_line(tmp_path, name, text, words):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(PointError, match=words) as caught:
        load_points(path)
    assert str(path) in str(caught.value)


def test_missing_and_binary_points_files(tmp_path):
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00\x80")
    for name in ("none.csv", "binary.csv", "."):
        with pytest.raises(PointError, match="cannot be read"):
            load_points(tmp_path / name)


@given(st.integers(1, 500), st.integers(1, 500), st.integers(1, 20))
def test_a_grid_is_even_and_inside(width, height, count):
    points = grid_points((width, height), count)
    assert points.shape == (count**2, 2)
    check_inside(points, (width, height), "it")
    assert np.allclose(points.mean(axis=0), [(width - 1) / 2, (height - 1) / 2])
    if count > 1:
        assert np.allclose(np.diff(points[:count, 0]), width / count)
        assert np.allclose(np.diff(points[::count, 1]), height / count)


@pytest.mark.parametrize("count", [0, -1, 513])
def test_impossible_grids(count):
    with pytest.raises(PointError, match="1 to 512"):
        grid_points((10, 10), count)


def test_the_first_point_outside_is_named():
    with pytest.raises(PointError, match=r"point 9\.6,3 lies outside the source image, which is 10 x 8"):
        check_inside([[0, 0], [9.6, 3], [99, 99]], (10, 8), "the source image")
    assert check_inside(json.loads("[[0, 0]]"), (10, 8), "it").tolist() == [[0, 0]]


@pytest.mark.parametrize("text", ["1,98,101\n2,142,90\n", "98,101,eye\n", "1,2,3,4\n"])
def test_more_columns_than_two_need_names(tmp_path, text):
    path = tmp_path / "points.csv"
    path.write_text(text)
    with pytest.raises(PointError, match="columns and no header with x and y"):
        load_points(path)


def test_columns_are_found_by_their_names(tmp_path):
    path = tmp_path / "points.csv"
    path.write_text("id,X, y ,name\n1,98,101,eye\n2,142,90,ear\n")
    assert load_points(path).tolist() == [[98, 101], [142, 90]]


def test_a_row_with_more_cells_than_the_header_is_refused(tmp_path):
    path = tmp_path / "points.csv"
    path.write_text("x,y\n1,2\n3,4,5\n")
    with pytest.raises(PointError, match="line 3"):
        load_points(path)
