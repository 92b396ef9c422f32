"""Many pairs: each image once, in order, one bad pair no harm, and the same bytes however often the run was killed."""

import json
import random
import shutil
from pathlib import Path

import pytest

from difftap.errors import BackendError, NonFiniteError, OutputError, PairsError
from difftap.features.pairs import Pair, PairMatching, load_pairs, run_pairs
from difftap.images import load_image
from tests.harness import FakePipeline, fake_recipe, write_picture

IMAGES = 5


FAULTS = {
    "broken-engine.png": NonFiniteError("the engine\nfailed"),
    "dead-machine.png": BackendError("out of memory"),
}


GRID = PairMatching(grid=2)


@pytest.fixture
def folder(tmp_path):
    for i in range(IMAGES):
        write_picture(tmp_path / f"{i}.png", (30 + i, 20 + 2 * i), seed=i)
    return tmp_path


def every_pair(folder):
    return [Pair(folder / f"{a}.png", folder / f"{b}.png") for a in range(IMAGES) for b in range(IMAGES)]


def run(folder, pairs, name="out.jsonl", pipeline=None, matching=GRID, batch=1, **options):
    return run_pairs(pipeline or FakePipeline(batch=batch, faults=FAULTS), pairs, folder / name, matching, **options)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("memory", [1, 2 << 30])
def test_each_image_is_extracted_once(folder, batch, memory):
    pipeline = FakePipeline(batch=batch)
    done = run(folder, every_pair(folder), pipeline=pipeline, memory=memory)
    assert (done.written, done.failed, done.skipped) == (IMAGES**2, 0, 0)
    assert set(pipeline.seen.values()) == {1}
    assert max(pipeline.batches) == min(batch, IMAGES)


def test_one_line_a_pair_in_the_lists_order(folder):
    pairs = every_pair(folder)
    random.Random(0).shuffle(pairs)
    run(folder, pairs)
    header, *rest = lines(folder / "out.jsonl")
    assert header["type"] == "run"
    assert header["pairs"] == len(pairs)
    assert [(r["index"], r["source"], r["target"]) for r in rest] == [
        (i, str(p.source), str(p.target)) for i, p in enumerate(pairs)
    ]
    assert all(r["type"] == "pair" and len(r["matches"]) == 4 for r in rest)
    first = load_image(pairs[0].source)
    assert rest[0]["source_image"] == {"width": first.size[0], "height": first.size[1], "sha256": first.digest}


def test_memory_and_batch_do_not_change_a_byte(folder):
    pairs = every_pair(folder)
    random.Random(1).shuffle(pairs)
    for name, options in (("a", {}), ("b", {"memory": 1}), ("c", {"batch": 4}), ("d", {"batch": 2, "memory": 500})):
        run(folder, pairs, name, **options)
        assert (folder / name).read_bytes() == (folder / "a").read_bytes()


def test_a_bad_pair_is_reported_in_its_place(folder):
    (folder / "text.png").write_text("no picture")
    good, far = Pair(folder / "0.png", folder / "1.png"), ((99.0, 99.0),)
    bad = [
        (Pair(folder / "none.png", folder / "0.png"), "no image at"),
        (Pair(folder / "0.png", folder / "text.png"), "not a picture"),
        (Pair(folder / "0.png", folder / "1.png", far), "point 99,99 lies outside"),
    ]
    done = run(folder, [good, *(pair for pair, _ in bad), good, bad[1][0]])
    assert (done.written, done.failed) == (6, 4)
    rest = lines(folder / "out.jsonl")[1:]
    assert ["error" in record for record in rest] == [False, True, True, True, False, True]
    for record, (_, words) in zip(rest[1:4], bad, strict=True):
        assert words in record["error"]
    assert rest[0]["matches"] == rest[4]["matches"]


def test_an_engine_that_fails_is_the_pairs_fault_alone(folder):
    shutil.copy(folder / "0.png", folder / "broken-engine.png")
    done = run(
        folder,
        [Pair(folder / "broken-engine.png", folder / "1.png"), Pair(folder / "0.png", folder / "1.png")],
        batch=2,
    )
    assert done.failed >= 1
    rest = lines(folder / "out.jsonl")[1:]
    assert rest[0]["error"] == "the engine failed"
    assert "matches" in rest[1]


def test_finished_work_is_skipped(folder):
    pairs = every_pair(folder)
    run(folder, pairs)
    before, pipeline = (folder / "out.jsonl").read_bytes(), FakePipeline()
    again = run(folder, pairs, pipeline=pipeline)
    assert (again.written, again.skipped) == (0, len(pairs))
    assert not pipeline.seen
    assert (folder / "out.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"matching": PairMatching(grid=3)},
        {"pairs": [("0.png", "1.png")]},
        {"pairs": [("0.png", "1.png"), ("1.png", "3.png")]},
    ],
)
def test_a_run_with_other_conditions_is_refused(folder, change):
    def listed(names):
        return [Pair(folder / a, folder / b) for a, b in names]

    names = [("0.png", "1.png"), ("1.png", "2.png")]
    run(folder, listed(names))
    before = (folder / "out.jsonl").read_bytes()
    change = dict(change)
    pairs = listed(change.pop("pairs", names))
    if "seed" in change:
        change["pipeline"] = FakePipeline(fake_recipe(seed=change.pop("seed")))
    with pytest.raises(OutputError, match="other conditions"):
        run(folder, pairs, **change)
    assert (folder / "out.jsonl").read_bytes() == before
    run(folder, pairs, overwrite=True, **change)
    assert len(lines(folder / "out.jsonl")) == len(pairs) + 1


@pytest.mark.parametrize("text", ["my notes\n", "[1]\n", "3\n", '{"type": "match"}\n', "\0\n", "no newline at all"])
def test_a_foreign_file_is_refused_and_left_alone(folder, text):
    (folder / "out.jsonl").write_text(text)
    with pytest.raises(OutputError, match=r"no output of|--overwrite"):
        run(folder, every_pair(folder))
    assert (folder / "out.jsonl").read_text() == text


def test_nothing_but_the_output_is_left(folder):
    before = set(folder.iterdir())
    run(folder, every_pair(folder), memory=1)
    assert set(folder.iterdir()) - before == {folder / "out.jsonl"}


@pytest.mark.parametrize("name", ["none/out.jsonl", "0.png/out.jsonl", "."])
def test_an_output_that_cannot_be_written(folder, name):
    with pytest.raises(OutputError, match="cannot write"):
        run(folder, every_pair(folder), name)


LIST = "source,target,points\n"


def test_load_pairs(tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_text(
        '\ufeffTarget, SOURCE ,points,note\nb.png,sub/a.png,"1,2; 3.5,4",x\r\n/abs/d.png,c.png,,\n', encoding="utf-8"
    )
    with pytest.raises(PairsError, match=r"columns|allowed"):
        (tmp_path / "bad.csv").write_text("a,b\n1,2\n")
        load_pairs(tmp_path / "bad.csv")
    pairs = load_pairs(path)
    assert pairs[0] == Pair(tmp_path / "sub" / "a.png", tmp_path / "b.png", ((1.0, 2.0), (3.5, 4.0)))
    assert str(pairs[1].target) == "/abs/d.png"
    assert pairs[1].points == ()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "columns none"),
        ("source,target\n", "holds no pair"),
        ("source\na.png\n", "columns source"),
        (LIST + "a.png\n", "line 2"),
        (LIST + "a.png,\n", "line 2"),
        (LIST + "a.png,b.png,1,2\n", "line 2.*in quotes"),
        (LIST + 'a.png,b.png,"1,2"\nc.png,d.png,nose\n', "line 3.*'nose'"),
        (LIST + 'a.png,b.png,"1,2\n', "line"),
        (LIST + "a.png,b.png," + "9" * 200_000, "line"),
    ],
)
def test_malformed_lists_name_the_line(tmp_path, text, words):
    path = tmp_path / "pairs.csv"
    path.write_text(text)
    with pytest.raises(PairsError, match=words):
        load_pairs(path)


def test_a_missing_list(tmp_path):
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x80")
    for name in ("none.csv", "binary.csv", "."):
        with pytest.raises(PairsError, match="cannot be read"):
            load_pairs(tmp_path / name)


@pytest.mark.parametrize("batch", [1, 6])
def test_a_fault_is_blamed_on_its_own_image_whatever_the_batch(folder, batch):
    shutil.copy(folder / "4.png", folder / "broken-engine.png")
    pairs = [Pair(folder / "0.png", folder / "1.png"), Pair(folder / "2.png", folder / "broken-engine.png")]
    pairs += [Pair(folder / "3.png", folder / "0.png")]
    done = run(folder, pairs, f"{batch}.jsonl", batch=batch)
    assert ["error" in record for record in lines(folder / f"{batch}.jsonl")[1:]] == [False, True, False]
    assert done.failed == 1


def test_a_finished_list_still_counts_its_failures(folder):
    pairs = [Pair(folder / "0.png", folder / "none.png"), Pair(folder / "0.png", folder / "1.png")]
    assert run(folder, pairs).failed == 1
    again = run(folder, pairs)
    assert (again.written, again.skipped, again.failed) == (0, 2, 1)


def test_the_current_folder_is_no_output(folder, monkeypatch):
    monkeypatch.chdir(folder)
    with pytest.raises(OutputError, match="a folder stands there"):
        run_pairs(FakePipeline(), every_pair(folder), Path(), GRID)


def test_a_fault_of_the_machine_ends_the_run_and_blames_no_pair(folder):
    shutil.copy(folder / "4.png", folder / "dead-machine.png")
    pairs = [Pair(folder / "0.png", folder / "1.png"), Pair(folder / "2.png", folder / "dead-machine.png")]
    with pytest.raises(BackendError, match="out of memory"):
        run(folder, pairs)
    assert [record.get("index") for record in lines(folder / "out.jsonl")[1:]] == [0]
