import json

import numpy as np
import pytest

from difftap.datasets.keypoints import load
from difftap.datasets.layout import DatasetError
from difftap.errors import InputError
from tests.datasets.builders import write_spair
from tests.harness import write_picture


def test_a_pair_is_read_as_annotated(tmp_path):
    root = write_spair(tmp_path, {"000001-a-b:cat": {}})
    (sample,) = load("spair", root)
    assert sample.name == "000001-a-b:cat"
    assert sample.category == "cat"
    assert sample.source == root / "JPEGImages/cat/a.jpg"
    assert (sample.source_size, sample.target_size) == ((40, 30), (50, 36))
    assert sample.source_points.tolist() == [[3, 4], [5, 6]]
    assert sample.target_points.tolist() == [[11, 12], [45, 35]]  # the second lies outside its box, and stays
    assert sample.keypoint_ids == ("0", "7")
    assert sample.target_box == (10, 10, 30, 36)
    assert sample.source_box == (2, 1, 40, 30)
    assert sample.flags == {"viewpoint_variation": 2, "scale_variation": 1, "truncation": 3, "occlusion": 0}
    assert not sample.mirrored


def test_rivals_are_all_keypoints_of_the_target(tmp_path):
    (sample,) = load("spair", write_spair(tmp_path, {"1": {}}))
    assert sample.target_ids == ("0", "5", "7")  # 5 is not in the source; 1 is null, hence absent
    assert sample.target_visible.tolist() == [[11, 12], [20, 21], [45, 35]]


def test_without_image_annotations_the_pair_s_own_keypoints_are_the_rivals_and_a_note_says_so(tmp_path):
    root = write_spair(tmp_path, {"1": {}})
    for file in (root / "ImageAnnotation/cat").iterdir():
        file.unlink()
    with pytest.raises(DatasetError, match="missing-annotation"):
        load("spair", root)
    (root / "ImageAnnotation/cat").rmdir()
    (root / "ImageAnnotation").rmdir()
    found = load("spair", root)
    assert found[0].target_ids == ("0", "7")
    assert "PCK-dagger" in found.notes[0]


def test_boxes_partly_outside_the_image_stay(tmp_path):
    (sample,) = load("spair", write_spair(tmp_path, {"1": {"trg_bndbox": [-3, -2, 60.5, 40]}}))
    assert sample.target_box == (-3, -2, 60.5, 40)


def test_layouts_and_splits_are_told_apart(tmp_path):
    root = write_spair(tmp_path, {"1": {}, "2": {}})
    write_spair(tmp_path, {"2": {}}, layout="small")
    write_spair(tmp_path, {"9": {}}, split="trn")
    assert [sample.name for sample in load("spair", root)] == ["1", "2"]
    assert [sample.name for sample in load("spair", root, layout="small")] == ["2"]
    assert [sample.name for sample in load("spair", root, split="trn")] == ["9"]
    with pytest.raises(DatasetError, match=r"lacks 'Layout/large/val\.txt'"):
        load("spair", root, split="val")


@pytest.mark.parametrize(("option", "value"), [("split", "train"), ("layout", "medium")])
def test_an_unknown_option_lists_those_allowed(tmp_path, option, value):
    with pytest.raises(InputError, match=rf"{option} '{value}' does not exist; allowed: (trn, val, test|large, small)"):
        load("spair", tmp_path, **{option: value})


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({"trg_imname": "c.jpg"}, "missing-image"),
        ({"src_imsize": [41, 30, 3]}, "size-mismatch"),
        ({"src_kps": [], "trg_kps": [], "kps_ids": []}, "no-keypoints"),
        ({"src_kps": [[1, 2]]}, "malformed"),
        ({"src_kps": [None, None]}, "no-keypoints"),
        ({"src_kps": [[1], [3, 4]]}, "malformed"),
        ({"trg_kps": None}, "malformed"),
        ({"trg_bndbox": [10, 10, 5, 36]}, "malformed"),
        ({"trg_bndbox": [10, 10, 36]}, "malformed"),
        ({"trg_bndbox": [4, 4, 4, 4]}, "malformed"),
    ],
)
def test_a_broken_pair_is_refused_or_counted_but_never_dropped(tmp_path, change, kind):
    root = write_spair(tmp_path, {"good": {}, "bad": change})
    with pytest.raises(DatasetError, match=rf"1 of 2 pairs of 'spair' \(test\).*: 1 {kind}; .*allow missing") as caught:
        load("spair", root)
    assert "bad: " in caught.value.detail
    found = load("spair", root, allow_missing=True)
    assert [sample.name for sample in found] == ["good"]
    assert [(problem.pair, problem.kind) for problem in found.problems] == [("bad", kind)]
    assert found.problem_counts() == {kind: 1}


def test_damaged_files_are_named(tmp_path):
    root = write_spair(tmp_path, {"good": {}, "cut": {}, "gone": {}, "keyless": {}, "noimage": {"trg_imname": "d.jpg"}})
    folder = root / "PairAnnotation/test"
    (folder / "cut.json").write_text((folder / "good.json").read_text()[:50])
    (folder / "gone.json").unlink()
    keyless = json.loads((folder / "good.json").read_text())
    del keyless["kps_ids"]
    (folder / "keyless.json").write_text(json.dumps(keyless))
    (root / "JPEGImages/cat/d.jpg").write_bytes(b"not a picture")
    found = load("spair", root, allow_missing=True)
    assert {problem.pair: problem.kind for problem in found.problems} == {
        "cut": "malformed", "gone": "missing-annotation", "keyless": "malformed", "noimage": "unreadable-image",
    }  # fmt: skip
    assert any("'kps_ids' is missing" in problem.message for problem in found.problems)


def test_sizes_are_those_of_the_upright_image(tmp_path):
    from PIL import Image as PIL

    root = write_spair(tmp_path, {"1": {"trg_imname": "t.jpg", "trg_imsize": [36, 50, 3]}})
    exif = PIL.Exif()
    exif[0x0112] = 6
    write_picture(root / "JPEGImages/cat/t.jpg", (50, 36), exif=exif)
    (root / "ImageAnnotation/cat/t.json").write_text((root / "ImageAnnotation/cat/b.json").read_text())
    assert load("spair", root)[0].target_size == (36, 50)


def test_a_set_mirror_flag_flips_nothing_and_is_noted(tmp_path):
    found = load("spair", write_spair(tmp_path, {"1": {"mirror": 1}, "2": {"mirror": 1}}))
    assert not any(sample.mirrored for sample in found)
    assert found.notes == ("a pair has mirror set; it is read as a description, and no image is flipped (2 times)",)


def test_a_repeated_pair_counts_twice_under_two_names(tmp_path):
    root = write_spair(tmp_path, {"1": {}})
    (root / "Layout/large/test.txt").write_text("1\n\n1\n")
    found = load("spair", root)
    assert [sample.name for sample in found] == ["1", "1#2"]
    assert "repeats" in found.notes[0]


@pytest.mark.dataset
def test_the_real_pairs(real):
    found = load("spair", real("spair-mini"))
    assert len(found) == 12
    assert not found.problems
    assert not found.notes
    assert len({sample.category for sample in found}) == 6
    assert sum(len(sample.keypoint_ids) for sample in found) == 91
    by_name = {sample.name: sample for sample in found}
    horse = by_name["008149-2010_003297-2007_000783:horse"]
    assert horse.source_points[0].tolist() == [323, 129]
    assert horse.keypoint_ids[:3] == ("3", "6", "8")
    assert len(horse.target_ids) == 13
    assert horse.flags == {"viewpoint_variation": 2, "scale_variation": 1, "truncation": 0, "occlusion": 1}
    for sample in found:  # the pair's keypoints are among the target's, at the same places
        places = dict(zip(sample.target_ids, sample.target_visible.tolist(), strict=True))
        np.testing.assert_array_equal([places[key] for key in sample.keypoint_ids], sample.target_points)


def test_an_option_of_another_data_set_is_refused(tmp_path):
    with pytest.raises(InputError, match="data set 'spair' has no option --flip"):
        load("spair", tmp_path, flip="both")
