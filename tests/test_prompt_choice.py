"""What conditions a branch for an image: the category, the fallback, one embedding a prompt, branches left out."""

import json
import logging

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from difftap.cli import cli
from difftap.errors import InputError
from difftap.images import Image
from difftap.pipeline import Pipeline, Runtime
from difftap.prompts import Prompt, Subject, choose_prompt, choose_prompts, fill, wants_category
from difftap.recipe import Branch, Recipe, load_recipe
from tests.conftest import MINI_TAPS, picture

ASKED = Branch(("up1",), 261, "a photo of a {category}")


@pytest.mark.parametrize(
    ("category", "text"),
    [
        ("cat", "a photo of a cat"),
        ("car(S)", "a photo of a car"),
        ("train/caltech101/accordion", "a photo of a accordion"),
        ("tvmonitor", "a photo of a tvmonitor"),
        (None, ""),
    ],
)
def test_the_category_fills_the_prompt(category, text):
    assert choose_prompt(ASKED, Subject(category)) == Prompt(text)


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=20).filter(lambda t: "{category}" not in t))
def test_other_prompts_know_no_category(text):
    branch = Branch(("up1",), 261, text)
    assert choose_prompt(branch, Subject("cat")) == choose_prompt(branch, Subject()) == Prompt(text)
    assert not wants_category([branch])


@pytest.mark.parametrize("name", ["dift", "dift-bicubic", "dual", "dual-concat", "dual-product"])
def test_presets_carry_the_published_prompt(name):
    recipe = load_recipe(name)
    assert {branch.prompt for branch in recipe.branches} == {"a photo of a {category}"}
    assert {prompt.text for prompt in choose_prompts(recipe, Subject("cow"))} == {"a photo of a cow"}
    filled = fill(recipe, Subject("cow"))
    assert {branch.prompt for branch in filled.branches} == {"a photo of a cow"}
    assert filled.key() != recipe.key()
    assert not wants_category(filled.branches)


@pytest.fixture(scope="module")
def recipe(mini) -> Recipe:
    branches = (Branch(MINI_TAPS, 261, "a {category}"), Branch(MINI_TAPS, 50, "a dog"))
    return Recipe(branches, str(mini), size=(24, 16), ensemble=2)


def data(features):
    return [[m.data for m in taps.values()] for taps in features.branches]


def test_the_pipeline_takes_prompts_and_leaves_branches_out(recipe, mini_cache):
    images = [Image(picture(i)) for i in range(2)]
    runtime = Runtime(cache=mini_cache.folder, threads=1)
    cat = choose_prompts(recipe, Subject("cat"))
    with Pipeline.open(fill(recipe, Subject("cat")), runtime) as pipeline:
        wanted = [data(one) for one in pipeline.features(images)]
    with Pipeline.open(recipe, runtime) as pipeline:
        together = [data(one) for one in pipeline.features(images, cat)]
        alone = [data(one) for one in pipeline.features(images, (None, cat[1]))]
        joined = next(iter(pipeline.extract(images, "cat")))
        other = next(iter(pipeline.extract(images)))
    for both, got, second in zip(wanted, together, alone, strict=True):
        assert all((a == b).all() for x, y in zip(both, got, strict=True) for a, b in zip(x, y, strict=True))
        assert len(second) == 1
        assert all((a == b).all() for a, b in zip(both[1], second[0], strict=True))
    assert np.abs(joined.data - other.data).max() > 0


def test_a_missing_category_is_told_once(recipe, mini_cache, caplog):
    image = Image(picture(0))
    with (
        caplog.at_level(logging.INFO, "difftap"),
        Pipeline.open(recipe, Runtime(cache=mini_cache.folder, threads=1)) as pipeline,
    ):
        for _ in range(2):
            list(pipeline.extract([image]))
        assert caplog.text.count("no category is given") == 1
        empty = next(iter(pipeline.features([image])))
        same = next(iter(pipeline.features([image], (Prompt(""), Prompt("a dog")))))
    assert all((a == b).all() for x, y in zip(data(empty), data(same), strict=True) for a, b in zip(x, y, strict=True))


def test_match_fills_the_category_and_says_what_it_asked(photos):
    def match(*more):
        return CliRunner().invoke(cli, ["match", *map(str, photos), "--point", "5,5", "--size", "64", *more])

    filled = match("--prompt", "a photo of a {category}", "--category", "dog")
    assert filled.exit_code == 0, filled.exception
    record = json.loads(filled.stdout)
    assert record["recipe"]["branches"][0]["prompt"] == "a photo of a dog"
    plain = match("--prompt", "a photo of a dog")
    assert json.loads(plain.stdout)["matches"] == record["matches"]
    assert json.loads(plain.stdout)["recipe_key"] == record["recipe_key"]
    empty = match("--prompt", "a photo of a {category}")
    assert "stays empty without --category" in empty.stderr
    assert json.loads(empty.stdout)["recipe"]["branches"][0]["prompt"] == ""
    refused = match("--category", "dog")
    assert isinstance(refused.exception, InputError)
    assert "this recipe's has none" in str(refused.exception)
