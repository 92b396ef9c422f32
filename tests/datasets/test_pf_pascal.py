import csv
import shutil

import numpy as np
import pytest

from difftap.datasets.keypoints import load
from difftap.datasets.layout import DatasetError
from difftap.errors import InputError
from difftap.images import load_image
from tests.datasets.builders import write_csv, write_mat
from tests.harness import write_picture

NAN = float("nan")
WITH_POINTS = ["source_image", "target_image", "class", "XA", "YA", "XB", "YB"]
WITHOUT = ["source_image", "target_image", "class", "flip"]
FILES = ["PF-dataset-PASCAL/JPEGImages/a.jpg", "PF-dataset-PASCAL/JPEGImages/b.jpg"]


@pytest.fixture
def root(tmp_path):
    write_picture(tmp_path / FILES[0], (40, 30), seed=1)
    write_picture(tmp_path / FILES[1], (50, 36), seed=2)
    return tmp_path


@pytest.fixture
def annotated(root):
    folder = root / "PF-dataset-PASCAL/Annotations/bus"
    write_mat(folder / "a.mat", kps=[[1, 2], [3, 4], [NAN, NAN], [7, 8]], bbox=[[1, 2, 30, 29]])
    write_mat(folder / "b.mat", kps=[[11, 12], [NAN, NAN], [15, 16], [17.5, 60]], bbox=[[3, 4, 50, 36]])
    return root


def test_a_list_with_keypoints(root):
    write_csv(root / "test_pairs_pf_pascal.csv", WITH_POINTS, [[*FILES, 6, "1.5;2;3", "4;5;6", "7;8;9", "10;11;60.5"]])
    found = load("pf-pascal", root)
    (sample,) = found
    assert sample.name == "bus/a-b"
    assert sample.category == "bus"
    assert sample.source_points.tolist() == [[1.5, 4], [2, 5], [3, 6]]
    assert sample.target_points.tolist() == [[7, 10], [8, 11], [9, 60.5]]
    assert sample.keypoint_ids == ("0", "1", "2")
    assert sample.target_box is None
    assert (sample.source_size, sample.target_size) == ((40, 30), (50, 36))
    assert "numbered within each pair" in found.notes[0]


def test_a_list_beside_annotations_leaves_absent_keypoints_out(annotated):
    write_csv(annotated / "test_pairs.csv", WITHOUT[:3], [[*FILES, 6]])
    (sample,) = load("pf-pascal", annotated)
    assert sample.keypoint_ids == ("0", "3")  # 1 is absent in the target, 2 in the source
    assert sample.source_points.tolist() == [[1, 2], [7, 8]]
    assert sample.target_points.tolist() == [[11, 12], [17.5, 60]]
    assert sample.target_ids == ("0", "2", "3")
    assert sample.target_visible.tolist() == [[11, 12], [15, 16], [17.5, 60]]
    assert sample.source_box == (1, 2, 30, 29)
    assert sample.target_box == (3, 4, 50, 36)


def test_annotations_decide_which_list_is_taken(annotated):
    write_csv(annotated / "test_pairs.csv", WITHOUT[:3], [[*FILES, "bus"]])
    write_csv(annotated / "test_pairs_pf_pascal.csv", WITH_POINTS, [[*FILES, 6, "1", "1", "2", "2"]])
    assert load("pf-pascal", annotated)[0].target_box is not None
    assert len(load("pf-pascal", annotated, pairs="test_pairs_pf_pascal.csv")[0].keypoint_ids) == 1
    shutil.rmtree(annotated / "PF-dataset-PASCAL/Annotations")
    assert load("pf-pascal", annotated)[0].target_box is None


def test_the_root_may_be_the_inner_folder(annotated):
    inner = annotated / "PF-dataset-PASCAL"
    write_csv(inner / "val_pairs.csv", WITHOUT[:3], [[*FILES, 6]])
    assert load("pf-pascal", inner, split="val")[0].source == inner / "JPEGImages/a.jpg"
    assert load("pf-pascal", annotated, split="val")[0].source == inner / "JPEGImages/a.jpg"


@pytest.mark.parametrize("name", ["trn_pairs.csv", "train_pairs.csv", "train_pairs_pf_pascal.csv"])
def test_training_lists_go_by_two_names(annotated, name):
    write_csv(annotated / name, WITHOUT, [[*FILES, 6, 0]])
    assert len(load("pf-pascal", annotated, split="trn")) == 1


def test_a_flip_mirrors_both_images(annotated, tmp_path_factory):
    write_csv(annotated / "trn_pairs.csv", WITHOUT, [[*FILES, 6, 0], [*FILES, 6, 1]])
    cache = tmp_path_factory.mktemp("copies")
    found = load("pf-pascal", annotated, split="trn", cache=cache)
    assert not list(cache.iterdir())  # nothing is made before it is needed
    plain, flipped = found
    assert (plain.name, flipped.name) == ("bus/a-b", "bus/a-b-flip")
    assert flipped.source_points.tolist() == [[39 - 1, 2], [39 - 7, 8]]
    assert flipped.target_points.tolist() == [[49 - 11, 12], [49 - 17.5, 60]]
    assert flipped.target_visible[1].tolist() == [49 - 15, 16]
    assert flipped.source_box == (39 - 30, 2, 39 - 1, 29)
    assert flipped.target_box == (49 - 50, 4, 49 - 3, 36)
    assert not flipped.mirrored  # the files are mirrored already
    for made, file in zip((flipped.source, flipped.target), FILES, strict=True):
        np.testing.assert_array_equal(load_image(made).pixels, load_image(annotated / file).pixels[:, ::-1])
    again = load("pf-pascal", annotated, split="trn", cache=cache)
    assert again[1].source == flipped.source


def test_a_flip_can_concern_the_target_alone_or_nothing(annotated):
    write_csv(annotated / "trn_pairs.csv", WITHOUT, [[*FILES, 6, 1]])
    with pytest.raises(DatasetError, match="mirrored pairs; give cache"):
        load("pf-pascal", annotated, split="trn")
    (target,) = load("pf-pascal", annotated, split="trn", flip="target")
    assert target.mirrored
    assert target.source_points.tolist() == [[1, 2], [7, 8]]
    assert target.target_points.tolist() == [[49 - 11, 12], [49 - 17.5, 60]]
    (ignored,) = load("pf-pascal", annotated, split="trn", flip="ignore")
    assert not ignored.mirrored
    assert ignored.target_points.tolist() == [[11, 12], [17.5, 60]]
    with pytest.raises(InputError, match="allowed: both, target, ignore"):
        load("pf-pascal", annotated, split="trn", flip="source")


@pytest.mark.parametrize(
    ("cells", "kind", "says"),
    [
        ([*FILES, 6, "1;2", "3", "1;2", "3;4"], "malformed", "XA has 2 numbers and YA 1"),
        ([*FILES, 6, "1;2", "3;4", "1", "3"], "malformed", "2 and 1 keypoints"),
        ([*FILES, 6, "1;b", "3;4", "1;2", "3;4"], "malformed", "'b' is not a number"),
        ([*FILES, 21, "1", "3", "1", "3"], "malformed", "class '21'"),
        ([*FILES, "unicorn", "1", "3", "1", "3"], "malformed", "class 'unicorn'"),
        ([*FILES, 6, "1", "3", "1"], "malformed", "6 cells"),
        ([*FILES, 6, "nan", "nan", "1", "3"], "no-keypoints", "no keypoint"),
        ([FILES[0], "PF-dataset-PASCAL/JPEGImages/z.jpg", 6, "1", "3", "1", "3"], "missing-image", "z.jpg"),
        (["", FILES[1], 6, "1", "3", "1", "3"], "malformed", "not the name of a file"),
    ],
)
def test_broken_lines_are_counted(root, cells, kind, says):
    good = [*FILES, 6, "1;2", "3;4", "nan;2", "nan;4"]
    write_csv(root / "test_pairs_pf_pascal.csv", WITH_POINTS, [good, cells])
    found = load("pf-pascal", root, allow_missing=True)
    assert found[0].keypoint_ids == ("1",)  # a pair of one point; the absent one is left out
    (problem,) = found.problems
    assert (problem.kind, problem.pair) == (kind, "test_pairs_pf_pascal.csv line 3")
    assert says in problem.message


def test_broken_annotations_are_counted(annotated):
    folder = annotated / "PF-dataset-PASCAL/Annotations/bus"
    rows = []
    for name, arrays in {
        "c": {"kps": [[1, 2, 3]], "bbox": [[1, 2, 3, 4]]},
        "d": {"kps": [[1, 2]] * 4, "bbox": [[1, 2, 3]]},
        "e": {"other": [[1, 2]]},
        "f": {"kps": [[1, 2]] * 3, "bbox": [[1, 2, 3, 4]]},
        "g": {"kps": [[NAN, NAN]] * 4, "bbox": [[1, 2, 3, 4]]},
    }.items():
        write_picture(annotated / f"PF-dataset-PASCAL/JPEGImages/{name}.jpg")
        write_mat(folder / f"{name}.mat", **arrays)
        rows.append([FILES[0], f"PF-dataset-PASCAL/JPEGImages/{name}.jpg", 6, 0])
    rows += [[*FILES, 7, 0], [*FILES, 6, 2], [*FILES, 6, 0]]
    write_csv(annotated / "test_pairs.csv", WITHOUT, rows)
    found = load("pf-pascal", annotated, allow_missing=True)
    assert len(found) == 1
    kinds = ["malformed"] * 4 + ["no-keypoints", "missing-annotation", "malformed"]
    assert [problem.kind for problem in found.problems] == kinds


def test_a_list_without_its_columns_is_refused(root):
    write_csv(root / "test_pairs.csv", ["a", "b"], [["1", "2"]])
    with pytest.raises(DatasetError, match="lacks the columns source_image, target_image, class"):
        load("pf-pascal", root)


@pytest.mark.dataset
def test_the_real_list_with_keypoints(real, tmp_path):
    listing = real("pf-pascal-lists") / "test_pairs_pf_pascal.csv"
    shutil.copy(listing, tmp_path)
    with pytest.raises(DatasetError, match=r"299 of 299 pairs .*: 299 missing-image; none is left to use"):
        load("pf-pascal", tmp_path)
    with open(listing, newline="") as handle:
        rows = [row for row in csv.DictReader(handle) if row["source_image"]]
    stub = write_picture(tmp_path / "stub.jpg", (300, 300)).read_bytes()
    (tmp_path / "PF-dataset-PASCAL/JPEGImages").mkdir(parents=True)
    for name in {row[f"{end}_image"] for row in rows for end in ("source", "target")}:
        (tmp_path / name).write_bytes(stub)
    found = load("pf-pascal", tmp_path)
    assert len(found) == len(rows) == 299
    assert sum(len(sample.keypoint_ids) for sample in found) == 2414
    assert len({sample.category for sample in found}) == 20
    assert len({sample.name for sample in found}) == 299
    assert found[0].category == "aeroplane"
    np.testing.assert_allclose(found[0].target_points[0], [272.801888, 65.2755428571429])


@pytest.mark.dataset
def test_the_real_list_without_its_images_says_so(real):
    with pytest.raises(DatasetError, match=r"308 of 308 pairs .*: 308 missing-image"):
        load("pf-pascal", real("pf-pascal-lists"), pairs="weakalign_test_pairs.csv", allow_missing=True)
