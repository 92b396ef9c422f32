"""The poster's table: its rows, resuming, rows that cannot run, published rows where they compare."""

import dataclasses

import pytest

from difftap.bench.poster import LEARNED, PROMPT, learned_rows, poster_rows, stand_in_rows, with_prompts
from difftap.bench.reproduce import reproduce
from difftap.bench.runner import count_passes
from difftap.bench.session import Pairs
from difftap.commands.bench.reproduce import reproduce as command
from difftap.errors import InputError, MissingExtraError
from difftap.recipe import load_recipe
from tests.bench.pck_cases import prompt_file, samples
from tests.harness import FakePipeline, invoke


@pytest.fixture(autouse=True)
def _forget():
    FakePipeline.opened.clear()


@pytest.fixture
def pairs(tmp_path):
    return Pairs(samples(tmp_path / "data"), {"name": "spair", "split": "test"})


def opener(recipe):
    return FakePipeline(recipe, ((12, 6, 6), (8, 12, 12))[: len(recipe.branches)])


def test_rows():
    rows = poster_rows("folder/sd21")
    assert [row.name for row in rows] == ["dift", "dift-bicubic", "dual"]
    for row in rows:
        assert row.recipe.model.name == "folder/sd21"
        assert {branch.prompt for branch in row.recipe.branches} == {PROMPT}
        assert row.recipe.size == (768, 768)
        assert row.rule.combine == row.recipe.combine
    assert rows[1].recipe.matcher.interpolation == "bicubic"
    assert [branch.timestep for branch in rows[2].recipe.branches] == [261, 50]
    assert [row.recipe.combine for row in stand_in_rows()] == ["concat", "concat", "score-sum"]
    assert stand_in_rows(128)[0].recipe.size == (128, 128)


def test_run_then_nothing_left(tmp_path, pairs):
    rows = stand_in_rows(96)
    folder = tmp_path / "out"
    made = reproduce(rows, [pairs], folder, opener)
    assert set(made["spair"]) == {"pocket", "pocket-bicubic", "pocket-dual"}
    table = (folder / "spair" / "table.md").read_text()
    assert "## dift" in table
    assert "## distilldift-img" in table
    before = (folder / "spair" / "pocket" / "results.json").read_bytes()
    # The second row reads what the first one leaves, and so does the third for one of its two branches.
    passes = count_passes(pairs.samples, rows[0].recipe)
    assert [len(pipeline.asked) for pipeline in FakePipeline.opened[-3:]] == [passes, 0, passes]
    said = []
    reproduce(rows, [pairs], folder, opener, say=said.append)
    assert any("0 pairs in" in line and "6 already there" in line for line in said)
    assert (folder / "spair" / "pocket" / "results.json").read_bytes() == before


def test_published_rows_stand_only_where_they_compare(tmp_path, pairs):
    reproduce(stand_in_rows(96)[:1], [pairs], tmp_path, opener)
    sections = dict(part.split("\n", 1) for part in (tmp_path / "spair" / "table.md").read_text().split("## ")[1:])
    for name, source in (("dift", "poster"), ("sd4match", "poster"), ("geoaware", "GeoAware-SC")):
        assert f"(published, {source}\u2020)" in sections[name]
    for name in ("distilldift", "distilldift-img"):  # per point
        assert "(published" not in sections[name]


def test_rows_that_cannot_run_are_said(tmp_path, pairs):
    def partly(recipe):
        if len(recipe.branches) > 1:
            raise MissingExtraError("exporting needs torch")
        return opener(recipe)

    rows = stand_in_rows(96)
    said = []
    made = reproduce(rows, [pairs], tmp_path, partly, say=said.append)
    assert set(made["spair"]) == {"pocket", "pocket-bicubic"}
    assert any("pocket-dual left out: exporting needs torch" in line for line in said)
    with pytest.raises(InputError, match="nothing to reproduce"):
        reproduce(rows, [], tmp_path, opener)
    with pytest.raises(InputError, match="no row can run here: exporting needs torch"):
        reproduce(rows[2:], [pairs], tmp_path, partly)


def test_learned_rows():
    rows = {row.name: row for row in learned_rows("folder/sd21")}
    assert tuple(rows) == LEARNED
    for name, row in rows.items():
        assert row.recipe == dataclasses.replace(load_recipe(name), model="folder/sd21")
        assert row.rule.reading == ("corners" if name.startswith("sd4match") else "centres")
        assert row.recipe.learned.kind == name.rsplit("-", 1)[1]
    names = [row.name for row in learned_rows(size=64)]
    assert names == [f"{base}-{kind}" for base in ("pocket", "pocket-dual") for kind in ("single", "class", "cpm")]
    assert {row.recipe.size for row in learned_rows(size=64)} == {(64, 64)}


def test_rows_with_prompts_run_and_the_others_are_named(tmp_path, pairs):
    made = {row.name: row for row in learned_rows(size=96)}
    for name in ("pocket-single", "pocket-dual-class", "pocket-cpm"):
        recipe = dataclasses.replace(made[name].recipe, learned=None)
        prompt_file(tmp_path / "prompts" / name, name.rsplit("-", 1)[1], recipe)
    rows, absent = with_prompts(list(made.values()), tmp_path / "prompts")
    assert [row.name for row in rows] == ["pocket-single", "pocket-cpm", "pocket-dual-class"]
    assert absent == ["pocket-class", "pocket-dual-single", "pocket-dual-cpm"]
    assert [row.keepable for row in rows] == [True, False, True]
    folder = tmp_path / "out"
    results = reproduce(rows, [pairs], folder, opener)
    assert set(results["spair"]) == {row.name for row in rows}
    assert "| pocket-dual-class |" in (folder / "spair" / "table.md").read_text()
    # Learned again: what is there is not mixed with it, and neither are its features.
    before = (folder / "spair" / "pocket-single" / "predictions.jsonl").read_bytes()
    recipe = dataclasses.replace(made["pocket-single"].recipe, learned=None)
    prompt_file(tmp_path / "prompts" / "pocket-single", "single", recipe, 5.0)
    with pytest.raises(InputError, match=r"no row can run here: .*prompts\.sha256 is"):
        reproduce(rows[:1], [pairs], folder, opener)
    reproduce(rows[:1], [pairs], folder, opener, overwrite=True)
    assert (folder / "spair" / "pocket-single" / "predictions.jsonl").read_bytes() != before


def test_a_row_that_knows_not_all_classes_is_refused_and_ends_nothing(tmp_path):
    horses = Pairs(samples(tmp_path / "data", classes=("horse",)), {"name": "spair", "split": "test"})
    (row,) = [row for row in learned_rows(size=96) if row.name == "pocket-class"]
    prompt_file(tmp_path / "prompts" / "pocket-class", "class", dataclasses.replace(row.recipe, learned=None))
    (row,), _ = with_prompts([row], tmp_path / "prompts")
    said = []
    results = reproduce([row, *stand_in_rows(96)[:1]], [horses], tmp_path / "out", opener, say=said.append)
    assert set(results["spair"]) == {"pocket"}
    assert any("pocket-class left out" in line and "no prompt for class 'horse'" in line for line in said)


def test_a_damaged_image_does_not_refuse_the_row(tmp_path, pairs):
    pairs.samples[0].source.write_bytes(b"no picture")
    results = reproduce(stand_in_rows(96)[:1], [pairs], tmp_path / "out", opener)
    assert 0 < results["spair"]["pocket"]["counts"]["pairs_failed"] < 6


def test_a_stopped_run_leaves_the_table_of_the_rows_that_are_done(tmp_path, pairs):
    class Stopped(Exception):
        pass

    def stop(text):
        if "pocket-bicubic" in text:
            raise Stopped

    with pytest.raises(Stopped):
        reproduce(stand_in_rows(96), [pairs], tmp_path, opener, say=stop)
    assert "| pocket |" in (tmp_path / "spair" / "table.md").read_text()


def test_command_refuses_before_anything_slow(tmp_path):
    (tmp_path / "s.zarr").mkdir()
    (tmp_path / "s.zarr" / "zarr.json").write_text("{}")
    store = invoke(["-o", str(tmp_path), "--spair", "x", "--features", str(tmp_path / "s.zarr")], command=command)
    assert "is a store of 'difftap extract'" in str(store.exception)
    bare = invoke(["-o", str(tmp_path), "--spair", "x", "--prompts-root", str(tmp_path)], command=command)
    assert "holds no learned prompts for a row; allowed: a folder with pocket-single" in str(bare.exception)
    none = invoke(["-o", str(tmp_path)], command=command)
    assert "no data set was given" in str(none.exception)
    both = invoke(["-o", str(tmp_path), "--spair", "x", "--model", "m", "--size", "64"], command=command)
    assert "--size is the stand-in's" in str(both.exception)
