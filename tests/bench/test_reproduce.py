"""The poster's table: its rows, the estimate, resuming, rows that cannot run, published rows where they compare."""

import dataclasses

import numpy as np
import pytest
from click.testing import CliRunner

from difftap.bench.estimate import Estimator, format_estimates
from difftap.bench.reproduce import reproduce
from difftap.bench.rows import PROMPT, Row, learned_rows, poster_rows, stand_in_rows
from difftap.bench.runner import count_passes
from difftap.bench.session import Pairs
from difftap.commands.reproduce import reproduce as command
from difftap.errors import InputError, MissingExtraError
from difftap.prompts.learned import fits_of, save_learned
from difftap.recipe import Learned, load_recipe
from tests.bench.pck_cases import FakePipeline, samples


@pytest.fixture(autouse=True)
def _forget():
    FakePipeline.opened.clear()


@pytest.fixture
def pairs(tmp_path):
    return Pairs(samples(tmp_path / "data"), {"name": "spair", "split": "test"})


def opener(recipe):
    return FakePipeline(recipe, ((12, 6), (8, 12))[: len(recipe.branches)])


def test_rows():
    rows = poster_rows("folder/sd21")
    assert [row.name for row in rows] == ["dift", "dift-bicubic", "dual"]
    for row in rows:
        assert row.recipe.model == "folder/sd21"
        assert {branch.prompt for branch in row.recipe.branches} == {PROMPT}
        assert row.recipe.size == (768, 768)
        assert row.joining.combine == row.recipe.combine
    assert rows[1].recipe.matcher.interpolation == "bicubic"
    assert [branch.timestep for branch in rows[2].recipe.branches] == [261, 50]
    assert [row.recipe.combine for row in stand_in_rows()] == ["concat", "concat", "score-sum"]
    assert stand_in_rows(128)[0].recipe.size == (128, 128)


def test_rows_with_learned_prompts_are_those_that_are_there(tmp_path):
    about = {
        "classes": ["cat"], "model": {"name": "m", "key": "k"}, "fits": fits_of(load_recipe("dual-cpm")), "data": {},
        "settings": {}, "scores": [], "steps": 1, "image_tokens": None,
    }  # fmt: skip
    for name, kind in (("dual-cpm", "cpm"), ("sd4match-class", "class"), ("mine", "single")):
        (tmp_path / name).mkdir()
        save_learned(tmp_path / name, {**about, "kind": kind}, [{"embedding": np.ones((1, 2, 3), np.float32)}] * 2)
    rows = learned_rows("folder/sd21", tmp_path)
    assert [(row.name, row.kept) for row in rows] == [("sd4match-class", True), ("dual-cpm", False)]
    assert {row.recipe.model for row in rows} == {"folder/sd21"}
    assert rows[1].recipe.learned.path == str(tmp_path / "dual-cpm")
    assert learned_rows("folder/sd21", tmp_path / "none") == []


def test_prompts_that_lack_a_class_keep_one_row_from_running(tmp_path, pairs):
    (tmp_path / "p").mkdir()
    row = stand_in_rows(96)[0]
    about = {
        "kind": "class", "classes": ["zebra"], "model": {"name": "m", "key": "k"}, "fits": fits_of(row.recipe),
        "data": {}, "settings": {}, "scores": [], "steps": 1, "image_tokens": None,
    }  # fmt: skip
    save_learned(tmp_path / "p", about, [{"embedding": np.ones((1, 2, 3), np.float32)}])
    tuned = Row("tuned", dataclasses.replace(row.recipe, learned=Learned(str(tmp_path / "p"))))
    assert "no prompt for class" in Estimator(opener)(tuned, pairs, tmp_path / "out").refusal
    made = reproduce([row, tuned], [pairs], tmp_path / "out", opener)
    assert set(made["spair"]) == {"pocket"}


def test_estimate_then_run_then_nothing_left(tmp_path, pairs):
    rows = stand_in_rows(96)
    folder = tmp_path / "out"
    estimate = Estimator(opener)
    first = [estimate(row, pairs, folder / "spair" / row.name) for row in rows]
    for one in first:
        assert (one.pairs, one.refusal) == (6, None)
        assert one.images == count_passes(pairs.samples, rows[0].recipe)
        assert one.seconds > 0
    # The second row reads what the first one leaves, and so does the third for one of its two branches.
    assert [one.passes for one in first] == [first[0].images, 0, first[0].images]
    text = "\n".join(format_estimates(first))
    assert "pocket-bicubic" in text
    assert "in all about" in text
    made = reproduce(rows, [pairs], folder, opener)
    assert set(made["spair"]) == {"pocket", "pocket-bicubic", "pocket-dual"}
    table = (folder / "spair" / "table.md").read_text()
    assert "## dift" in table
    assert "## distilldift-img" in table
    before = (folder / "spair" / "pocket" / "results.json").read_bytes()
    assert sum(len(pipeline.asked) for pipeline in FakePipeline.opened[-3:]) == 2 * first[0].images
    left = [Estimator(opener)(row, pairs, folder / "spair" / row.name) for row in rows]
    assert [(one.pairs, one.images, one.seconds) for one in left] == [(0, 0, 0.0)] * 3
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
    estimate = Estimator(partly)
    estimates = [estimate(row, pairs, tmp_path / row.name) for row in rows]
    assert estimates[2].refusal == "exporting needs torch"
    assert "pocket-dual       cannot run here: exporting needs torch" in "\n".join(format_estimates(estimates))
    said = []
    made = reproduce(rows, [pairs], tmp_path, partly, say=said.append)
    assert set(made["spair"]) == {"pocket", "pocket-bicubic"}
    assert any("pocket-dual left out: exporting needs torch" in line for line in said)
    with pytest.raises(InputError, match="nothing to reproduce"):
        reproduce(rows, [], tmp_path, opener)


def test_a_refusal_is_of_a_row_on_one_data_set(tmp_path, pairs):
    other = Pairs(pairs.samples, {"name": "pf-willow", "split": "test"})
    rows = stand_in_rows(96)[:2]
    made = reproduce(rows, [pairs, other], tmp_path, opener, refused={("pocket", "pf-willow")})
    assert set(made["spair"]) == {"pocket", "pocket-bicubic"}
    assert set(made["pf-willow"]) == {"pocket-bicubic"}


def test_command_refuses_before_anything_slow(tmp_path):
    none = CliRunner().invoke(command, ["-o", str(tmp_path)])
    assert "no data set was given" in str(none.exception)
    both = CliRunner().invoke(command, ["-o", str(tmp_path), "--spair", "x", "--model", "m", "--size", "64"])
    assert "--size is the stand-in's" in str(both.exception)
    for more, words in (((), "--prompts goes with --model"), (("--model", "m"), "no learned prompts in")):
        asked = ["-o", str(tmp_path), "--spair", "x", "--prompts", str(tmp_path), *more]
        assert words in str(CliRunner().invoke(command, asked).exception)
