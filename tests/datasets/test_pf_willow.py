import numpy as np
import pytest

from difftap.datasets.keypoints import load
from difftap.datasets.layout import DatasetError
from difftap.errors import MissingExtraError
from tests.datasets.builders import write_csv, write_mat
from tests.harness import write_picture

HEADER = ["imageA", "imageB", *(f"{axis}{image}{k}" for image in "AB" for axis in "XY" for k in range(1, 11))]
POINTS_A = np.arange(20.0).reshape(2, 10)  # x of the ten keypoints, then y
POINTS_B = POINTS_A + 2


def images(root):
    for name, size in (("a", (40, 30)), ("b", (50, 36))):
        write_picture(root / f"PF-dataset-WILLOW/car(S)/{name}.png", size)


def line(a=POINTS_A, b=POINTS_B, names=("a", "b"), folder="PF-dataset-WILLOW/car(S)"):
    return [*(f"{folder}/{name}.png" for name in names), *a.ravel(), *b.ravel()]


def test_a_line_of_the_csv(tmp_path):
    images(tmp_path)
    write_csv(tmp_path / "test_pairs.csv", HEADER, [line(), line(POINTS_B, POINTS_A, ("b", "a"))])
    first, second = load("pf-willow", tmp_path)
    assert first.name == "car(S)/a-b"
    assert second.name == "car(S)/b-a"
    assert first.category == "car(S)"
    assert first.source_points.tolist() == POINTS_A.T.tolist()
    assert first.target_points.tolist() == first.target_visible.tolist() == POINTS_B.T.tolist()
    assert first.keypoint_ids == first.target_ids == tuple(str(k) for k in range(1, 11))
    assert (first.source_size, first.target_size) == ((40, 30), (50, 36))
    assert first.source_box is first.target_box is None


@pytest.mark.parametrize("padding", [("nan", "nan"), ("", ""), (-1, -1), ("NaN", 3)])
def test_padding_gets_nowhere(tmp_path, padding):
    images(tmp_path)
    b = POINTS_B.astype(object)
    b[:, 3] = padding
    a = POINTS_A.astype(object)
    a[:, 9] = padding
    write_csv(tmp_path / "test_pairs.csv", HEADER, [line(a, b)])
    (sample,) = load("pf-willow", tmp_path)
    assert sample.keypoint_ids == ("1", "2", "3", "5", "6", "7", "8", "9")
    assert sample.target_ids == (
        "1",
        "2",
        "3",
        "5",
        "6",
        "7",
        "8",
        "9",
        "10",
    )  # the source's padding is not the target's
    assert sample.target_visible.min() == 2
    assert len(sample.source_points) == 8


@pytest.mark.parametrize("inside", ["", "PF-dataset-WILLOW"])
def test_the_root_may_be_a_folder_inside_the_listed_path(tmp_path, inside):
    images(tmp_path)
    write_csv(tmp_path / inside / "test_pairs.csv", HEADER, [line()])
    assert load("pf-willow", tmp_path / inside)[0].target.is_file()


def test_lines_that_cannot_be_used_are_counted(tmp_path):
    images(tmp_path)
    text = line()
    text[5] = "x12"
    rows = [line(), line()[:-1], text, line(names=("a", "zz")), line(folder="../elsewhere"), [], line(names=("b", "a"))]
    write_csv(tmp_path / "test_pairs.csv", HEADER, rows)
    with pytest.raises(DatasetError, match=r"4 of 6 pairs .*: 3 malformed, 1 missing-image"):
        load("pf-willow", tmp_path)
    found = load("pf-willow", tmp_path, allow_missing=True)
    assert [sample.name for sample in found] == ["car(S)/a-b", "car(S)/b-a"]
    assert [problem.pair for problem in found.problems] == [f"test_pairs.csv line {k}" for k in (3, 4, 5, 6)]
    assert "41 cells; the header has 42" in found.problems[0].message
    assert "'x12' is not a number" in found.problems[1].message


def test_a_csv_of_another_kind_is_refused(tmp_path):
    images(tmp_path)
    write_csv(tmp_path / "test_pairs.csv", HEADER[:-1], [])
    with pytest.raises(DatasetError, match="lacks the columns YB10"):
        load("pf-willow", tmp_path)
    (tmp_path / "test_pairs.csv").write_bytes(b"")
    with pytest.raises(DatasetError, match="is empty"):
        load("pf-willow", tmp_path)
    (tmp_path / "test_pairs.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DatasetError, match="cannot be read as CSV"):
        load("pf-willow", tmp_path)


def test_bare_annotations_give_all_ordered_pairs_of_a_class(tmp_path):
    for k, name in enumerate("abc"):
        write_picture(tmp_path / f"car(S)/{name}.png")
        write_mat(tmp_path / f"car(S)/{name}.mat", pts_coord=POINTS_A + k)
    write_picture(tmp_path / "duck(S)/x.jpg")
    write_picture(tmp_path / "duck(S)/y.jpg")
    write_mat(tmp_path / "duck(S)/x.mat", pts_coord=POINTS_A)
    write_mat(tmp_path / "duck(S)/y.mat", pts_coord=POINTS_B)
    found = load("pf-willow", tmp_path)
    assert [s.name for s in found][:4] == ["car(S)/a-b", "car(S)/a-c", "car(S)/b-a", "car(S)/b-c"]
    assert len(found) == 6 + 2
    assert found[0].target_points.tolist() == (POINTS_A + 1).T.tolist()


def test_incomplete_bare_annotations_are_counted(tmp_path):
    for name in "abc":
        write_picture(tmp_path / f"car(S)/{name}.png")
    write_mat(tmp_path / "car(S)/a.mat", pts_coord=POINTS_A)
    write_mat(tmp_path / "car(S)/b.mat", pts_coord=POINTS_B.T)
    write_mat(tmp_path / "car(S)/d.mat", pts_coord=POINTS_A)
    write_mat(tmp_path / "car(S)/e.mat", pts_coord=POINTS_A)
    write_picture(tmp_path / "car(S)/e.png")
    found = load("pf-willow", tmp_path, allow_missing=True)
    assert [sample.name for sample in found] == ["car(S)/a-e", "car(S)/e-a"]
    assert len(found) + len(found.problems) == 5 * 4
    assert set(found.problem_counts()) == {"missing-annotation", "malformed", "missing-image"}
    (tmp_path / "car(S)/b.mat").write_bytes(b"no matlab")
    assert "malformed" in load("pf-willow", tmp_path, allow_missing=True).problem_counts()


def test_a_folder_with_neither_draws_what_is_expected(tmp_path):
    with pytest.raises(DatasetError, match=r"neither 'test_pairs\.csv' nor \.mat") as caught:
        load("pf-willow", tmp_path)
    assert "|-- PF-dataset*/*/*.png" in caught.value.detail
    with pytest.raises(DatasetError, match=r"lacks 'test_pairs\.csv'"):
        load("pf-willow", tmp_path, pairs="csv")


def test_without_scipy_the_pip_line_is_given(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "scipy.io", None)
    for name in "ab":
        (tmp_path / "car").mkdir(exist_ok=True)
        (tmp_path / f"car/{name}.mat").write_bytes(b"")
    with pytest.raises(DatasetError, match="missing-image"):  # nothing to read the annotations for
        load("pf-willow", tmp_path, allow_missing=True)
    for name in "ab":
        write_picture(tmp_path / f"car/{name}.png")
    with pytest.raises(MissingExtraError, match=r"pip install 'difftap\[bench\]'"):
        load("pf-willow", tmp_path, allow_missing=True)


@pytest.mark.dataset
def test_the_real_pairs_are_the_same_from_both_sources(real):
    root = real("pf-willow-half")
    from_csv = load("pf-willow", root)
    assert len(from_csv) == 450
    assert len({path for sample in from_csv for path in (sample.source, sample.target)}) == 50
    assert {sample.category for sample in from_csv} == {
        "car(S)", "duck(S)", "motorbike(S)", "winebottle(M)", "winebottle(wC)",
    }  # fmt: skip
    assert all(len(sample.keypoint_ids) == 10 for sample in from_csv)
    pytest.importorskip("scipy")
    from_mat = {sample.name: sample for sample in load("pf-willow", root, pairs="mat")}
    assert from_mat.keys() == {sample.name for sample in from_csv}
    for sample in from_csv:
        other = from_mat[sample.name]
        assert (other.source, other.target) == (sample.source, sample.target)
        np.testing.assert_allclose(other.source_points, sample.source_points, atol=1e-6, rtol=0)
        np.testing.assert_allclose(other.target_points, sample.target_points, atol=1e-6, rtol=0)


def test_the_list_under_its_makers_own_name(tmp_path):
    images(tmp_path)
    write_csv(tmp_path / "test_pairs_pf.csv", HEADER, [line()])
    assert [sample.name for sample in load("pf-willow", tmp_path)] == ["car(S)/a-b"]


def test_class_folders_that_are_links(tmp_path):
    pytest.importorskip("scipy")
    images(tmp_path / "elsewhere")
    folder = tmp_path / "elsewhere/PF-dataset-WILLOW/car(S)"
    for name, points in (("a", POINTS_A), ("b", POINTS_B)):
        write_mat(folder / f"{name}.mat", pts_coord=points)
    (tmp_path / "root").mkdir()
    (tmp_path / "root/car(S)").symlink_to(folder, target_is_directory=True)
    assert len(load("pf-willow", tmp_path / "root")) == 2
