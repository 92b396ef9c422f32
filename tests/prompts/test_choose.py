"""What conditions a branch for an image: the category, the fallback, one embedding a prompt, branches left out."""

import json
import logging

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from difftap.backbones.find import open_model
from difftap.engine import Cache
from difftap.errors import InputError, RecipeError
from difftap.images import Image
from difftap.pipeline.environment import Runtime
from difftap.pipeline.pipeline import Pipeline
from difftap.prompts import Prompt, Subject, choose_prompt, choose_prompts, fill, wants_category
from difftap.recipe import Branch, ModelReference, Recipe, load_recipe
from tests.harness import MINI_TAPS, invoke, picture

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
        return invoke(["match", *map(str, photos), "--point", "5,5", "--size", "64", *more])

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


def write_recipe(path, combine):
    path.write_text(
        f'model = "pocket"\nsize = 64\nensemble = 1\ncombine = "{combine}"\n'
        'branches = [{ taps = ["up1"], timestep = 1 }, { taps = ["up2"], timestep = 1 }]\n'
    )
    return str(path)


def test_match_keeps_branches_apart(photos, tmp_path):
    """score-sum finds what concat finds; score-product runs too; --pairs and pictures go the same way."""
    found = {}
    for combine in ("concat", "score-sum", "score-product"):
        recipe = write_recipe(tmp_path / f"{combine}.toml", combine)
        out = tmp_path / f"{combine}.png"
        arguments = ["--recipe", recipe, "--grid", "3", "-o", str(out), "--heat", "2"]
        done = invoke(["match", *map(str, photos), *arguments])
        assert done.exit_code == 0, done.exception
        assert out.stat().st_size > 1000
        found[combine] = json.loads(done.stdout)["matches"]
        (tmp_path / "pairs.csv").write_text("source,target\n" + ",".join(path.name for path in photos) + "\n")
        many = ["match", "--pairs", str(tmp_path / "pairs.csv"), "--recipe", recipe, "--grid", "3"]
        listed = tmp_path / f"{combine}.jsonl"
        assert invoke([*many, "-o", str(listed)]).exit_code == 0
        assert json.loads(listed.read_text().splitlines()[1])["matches"] == found[combine]
    for joined, apart in zip(found["concat"], found["score-sum"], strict=True):
        assert apart["target"] == joined["target"]
        assert apart["score"] == pytest.approx(joined["score"], abs=1e-5)
    assert found["score-product"] != found["concat"]
    mutual = ["match", *map(str, photos), "--mutual", "--recipe"]
    both = [invoke([*mutual, str(tmp_path / f"{c}.toml")]) for c in ("concat", "score-sum")]
    assert json.loads(both[0].stdout)["matches"] == json.loads(both[1].stdout)["matches"] != []
    refused = invoke([*mutual, str(tmp_path / "score-product.toml")])
    assert isinstance(refused.exception, InputError)
    assert "--mutual needs branches that add up" in str(refused.exception)


def test_a_size_that_cannot_fit_is_refused_before_anything_is_built(tmp_path):
    with pytest.raises(RecipeError, match="size 100 x 100 does not fit model 'sd15'"):
        open_model(ModelReference("sd15", random_weights=0), Cache(tmp_path / "cache"), size=(100, 100))
    assert not (tmp_path / "cache").exists() or not list((tmp_path / "cache").rglob("*.safetensors"))
