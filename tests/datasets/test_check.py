import json
import re

import pytest

from difftap.commands.data import data
from difftap.datasets import keypoints as datasets
from difftap.datasets.check import SCHEMA, check
from difftap.datasets.layout import DatasetError
from difftap.errors import InputError
from tests.datasets.builders import write_csv, write_spair
from tests.harness import invoke, run_child, write_picture


def run(*arguments):
    return invoke(["check", *map(str, arguments)], command=data)


def test_an_unknown_data_set_lists_those_there_are(tmp_path):
    with pytest.raises(InputError, match="no data set 'caltech'; allowed: pf-pascal, pf-willow, spair, synthetic"):
        datasets.load("caltech", tmp_path)


@pytest.mark.parametrize("name", datasets.NAMES)
def test_every_loader_has_the_same_shape(name, tmp_path):
    module = datasets.loader(name)
    assert module.SPLITS
    assert module.TREE
    assert list(module.variants(tmp_path / "none")) == []
    with pytest.raises(InputError, match="split 'nope' does not exist; allowed: "):
        datasets.load(name, tmp_path, split="nope", allow_missing=True, cache=tmp_path)


@pytest.mark.parametrize("name", datasets.NAMES)
def test_a_missing_root_draws_the_expected_tree(name, tmp_path):
    gone = tmp_path / "gone"
    with pytest.raises(DatasetError) as caught:
        datasets.load(name, gone, cache=tmp_path)
    error = caught.value
    assert error.summary == f"'{gone}' does not exist; give the folder that holds the data set '{name}'"
    lines = error.detail.splitlines()
    assert lines[:2] == ["expected:", f"{gone}/"]
    assert len(lines) == 2 + len(datasets.loader(name).TREE)
    assert all(re.match(r"[|`]-- .*\[not found\]$", line) for line in lines[2:])
    assert str(error) == f"{error.summary}\n{error.detail}"
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(DatasetError, match="is not a folder"):
        check(name, file)


def test_the_tree_marks_what_is_not_there(tmp_path):
    root = write_spair(tmp_path, {"1": {}})
    (root / "Layout/large/test.txt").unlink()
    with pytest.raises(DatasetError) as caught:
        datasets.load("spair", root)
    marks = {line.split()[1]: line.endswith("[not found]") for line in caught.value.detail.splitlines()[2:]}
    assert marks == {
        "ImageAnnotation/*/*.json": False,
        "JPEGImages/*/*.jpg": False,
        "Layout/large/*.txt": True,
        "PairAnnotation/*/*.json": False,
    }


def test_an_empty_list_is_refused(tmp_path):
    root = write_spair(tmp_path, {"1": {}})
    (root / "Layout/large/test.txt").write_text("\n")
    with pytest.raises(DatasetError, match="lists no pairs"):
        datasets.load("spair", root)


def test_a_long_list_of_problems_is_cut_short(tmp_path):
    root = write_spair(tmp_path, {f"{k:02}": {"trg_imname": "none.jpg"} for k in range(12)})
    with pytest.raises(DatasetError) as caught:
        datasets.load("spair", root)
    assert len(caught.value.detail.splitlines()) == 11
    assert caught.value.detail.endswith("... and 2 more")
    assert len(caught.value.problems) == 12


def test_a_slice_keeps_what_was_found(tmp_path):
    found = datasets.load("spair", write_spair(tmp_path, {"1": {}, "2": {}, "3": {}}))
    assert [sample.name for sample in found[1:]] == ["2", "3"]
    assert found[1:].name == "spair"


def test_a_sound_data_set(tmp_path):
    root = write_spair(tmp_path, {"1": {}, "2": {}})
    write_spair(tmp_path, {"1": {}}, layout="small")
    result = run("spair", root)
    assert result.exit_code == 0
    assert result.output.splitlines() == [
        "test large: 2 pairs, 2 usable, 2 images, 4 keypoints",
        "  class  pairs  images  keypoints",
        "  cat        2       2          4",
        "test small: 1 pairs, 1 usable, 2 images, 2 keypoints",
        "  class  pairs  images  keypoints",
        "  cat        1       2          2",
        f"spair in {root}: all is well",
    ]


def test_what_is_broken_is_said_and_the_exit_code_is_1(tmp_path):
    root = write_spair(tmp_path, {"1": {}, "2": {"trg_imname": "c.jpg"}, "3": {"trg_imname": "cut.jpg"}})
    whole = write_picture(root / "JPEGImages/cat/cut.jpg", (50, 36)).read_bytes()
    (root / "JPEGImages/cat/cut.jpg").write_bytes(whole[:-150])
    (root / "ImageAnnotation/cat/cut.json").write_text((root / "ImageAnnotation/cat/b.json").read_text())
    result = run("spair", root)
    assert result.exit_code == 1
    assert "3 pairs, 1 usable" in result.output
    assert "broken: 1 pairs, missing-image" in result.output
    assert "broken: 1 pairs, unreadable-image" in result.output
    assert run("spair", root, "--no-decode").output.count("broken: ") == 1  # the header is whole
    report = json.loads(run("spair", root, "--json").output)
    assert (report["schema"], report["ok"], report["name"]) == (SCHEMA, False, "spair")
    (part,) = report["parts"]
    assert part["options"] == {"split": "test", "layout": "large"}
    assert (part["pairs"], part["usable"], part["images"], part["keypoints"]) == (3, 1, 2, 2)
    assert part["classes"] == {"cat": {"usable": 1, "images": 2, "keypoints": 2}}
    assert part["problem_counts"] == {"missing-image": 1, "unreadable-image": 1}
    assert {problem["pair"] for problem in part["problems"]} == {"2", "3"}
    assert part["problems"][0]["path"].endswith("c.jpg")


def test_the_installed_command_ends_with_1_too(tmp_path):
    """The command's own entry point is in charge of exit codes, where click's test runner otherwise is."""
    root = write_spair(tmp_path, {"1": {"trg_imname": "none.jpg"}})
    done = run_child(["data", "check", "spair", root])
    assert done.returncode == 1, done.stderr
    assert done.stdout.endswith(": broken\n")


def test_a_list_with_nothing_usable_is_reported_in_full(tmp_path):
    root = write_spair(tmp_path, {f"{k:02}": {"trg_imname": "none.jpg"} for k in range(12)})
    result = run("spair", root)
    assert result.exit_code == 1
    assert "12 pairs, 0 usable" in result.output
    assert "... and 2 more (--all lists them)" in result.output
    assert "... and" not in run("spair", root, "--all").output


def test_a_folder_without_lists_is_an_error(tmp_path):
    for name in ("spair", "pf-pascal", "pf-willow", "synthetic"):
        assert isinstance(run(name, tmp_path).exception, DatasetError)


def test_checking_makes_no_images(tmp_path):
    write_picture(tmp_path / "cup/a.png", (40, 30))
    report = check("synthetic", tmp_path)
    assert report.ok
    (part,) = report.parts
    assert (part.pairs, part.images) == (2, 1)
    assert [path.name for path in tmp_path.rglob("*")] == ["cup", "a.png"]


def test_a_flipped_list_can_be_checked(tmp_path):
    for name in "ab":
        write_picture(tmp_path / f"PF-dataset-PASCAL/JPEGImages/{name}.jpg")
    header = ["source_image", "target_image", "class", "XA", "YA", "XB", "YB", "flip"]
    files = [f"PF-dataset-PASCAL/JPEGImages/{name}.jpg" for name in "ab"]
    write_csv(
        tmp_path / "train_pairs_pf_pascal.csv", header, [[*files, 1, "1", "2", "3", "4", flip] for flip in (0, 1)]
    )
    (part,) = check("pf-pascal", tmp_path).parts
    assert (part.usable, part.images, part.problems) == (2, 2, ())


@pytest.mark.dataset
@pytest.mark.parametrize(
    ("name", "folder", "counts"),
    [("spair", "spair-mini", (12, 16, 91)), ("pf-willow", "pf-willow-half", (450, 50, 4500))],
)
def test_the_real_data_is_sound(real, name, folder, counts):
    report = check(name, real(folder))
    assert report.ok
    (part,) = report.parts
    assert (part.usable, part.images, part.keypoints) == counts


@pytest.mark.dataset
def test_both_real_pf_pascal_lists_are_found(real):
    parts = check("pf-pascal", real("pf-pascal-lists")).parts
    assert [(part.options["pairs"], part.pairs, part.usable) for part in parts] == [
        ("test_pairs_pf_pascal.csv", 299, 0),
        ("weakalign_test_pairs.csv", 308, 0),
    ]
