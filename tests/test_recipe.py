"""Recipes: frozen, checked, the same from Python, TOML and the command line, and named by what decides the numbers."""

import dataclasses
import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from difftap.errors import RecipeError
from difftap.recipe import (
    FITS,
    INTERPOLATIONS,
    MATCHERS,
    Branch,
    Learned,
    Matcher,
    ModelReference,
    Recipe,
    load_recipe,
    presets,
)
from tests.harness import invoke

texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
branches = st.builds(
    Branch,
    taps=st.lists(texts, min_size=1, max_size=3, unique=True).map(tuple),
    timestep=st.integers(0, 999),
    prompt=st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
    weight=st.floats(1e-3, 1e3),
)
matchers = st.builds(
    Matcher,
    name=st.sampled_from(MATCHERS),
    interpolation=st.sampled_from(INTERPOLATIONS),
    temperature=st.floats(1e-6, 1e6),
    sigma=st.floats(1e-6, 1e6),
    window=st.integers(0, 20).map(lambda n: 2 * n + 1),
)
recipes = st.builds(
    Recipe,
    branches=st.lists(branches, min_size=1, max_size=3).map(tuple),
    model=texts,
    size=st.tuples(st.integers(8, 4096), st.integers(8, 4096)),
    fit=st.sampled_from(FITS),
    ensemble=st.integers(1, 1024),
    seed=st.integers(0, 2**63 - 1),
    upsample=st.sampled_from(INTERPOLATIONS),
    matcher=matchers,
)
PLAIN = Recipe((Branch(("up1",), 20),))


def _toml(recipe: Recipe) -> str:
    from difftap.commands.recipes import _toml as value

    return "".join(f"{name} = {value(field)}\n" for name, field in recipe.to_dict().items())


@given(recipes)
def test_toml_and_back(recipe):
    again = Recipe.from_dict(tomllib.loads(_toml(recipe)))
    assert again == recipe
    assert again.key() == recipe.key()


@pytest.mark.parametrize("name", presets())
def test_what_difftap_recipes_prints_is_that_recipe(tmp_path, name):
    shown = invoke(["recipes", name])
    assert shown.exit_code == 0
    (tmp_path / "mine.toml").write_text(shown.stdout)
    assert load_recipe(tmp_path / "mine.toml") == load_recipe(name)


def test_presets_are_listed_and_hold_the_published_settings():
    listing = invoke(["recipes"]).stdout.splitlines()
    assert [line.split()[0] for line in listing] == list(presets())
    dift = load_recipe("dift")
    assert (dift.model.name, dift.size, dift.ensemble) == ("sd21", (768, 768), 8)
    assert dift.branches == (Branch(("up1",), 261, "a photo of a {category}"),)
    assert load_recipe("pocket").model.name == "pocket"


def test_a_recipe_is_frozen_all_the_way_down():
    for value, field in ((PLAIN, "seed"), (PLAIN.branches[0], "timestep"), (PLAIN.matcher, "name")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(value, field, 1)
    assert isinstance(Recipe([Branch(["up1"], 20)], size=[64, 64]).branches[0].taps, tuple)
    assert hash(PLAIN) == hash(Recipe((Branch(("up1",), 20),)))


CHANGES = {
    "branches": (Branch(("up1",), 20), Branch(("up2",), 50)),
    "model": "sd21", "size": (768, 512), "fit": "letterbox", "ensemble": 4, "noise": "none", "seed": 1,
    "upsample": "bilinear", "combine": "score-sum", "matcher": Matcher("nn"),
    "learned": Learned("prompts/one"), "resize": "bilinear", "posterior": "image",
}  # fmt: skip
LEARNED_CHANGES = {"path": "prompts/two", "kind": "cpm", "mode": "image", "sha256": "a" * 64}
MATCHER_CHANGES = {"name": "nn", "interpolation": "bicubic", "temperature": 0.1, "sigma": 3.0, "window": 5}
BRANCH_CHANGES = {"taps": ("up2",), "timestep": 21, "prompt": "a cat", "weight": 2.0, "tuned_at": 40}


def test_the_key_changes_with_every_field():
    for kind, changes in (
        (Recipe, CHANGES),
        (Matcher, MATCHER_CHANGES),
        (Learned, LEARNED_CHANGES),
        (Branch, BRANCH_CHANGES),
    ):
        assert set(changes) == {field.name for field in dataclasses.fields(kind)}, "a new field needs a line here"
    base = dataclasses.replace(PLAIN, ensemble=1)
    changed = [dataclasses.replace(base, **{name: value}) for name, value in CHANGES.items()]
    changed += [
        dataclasses.replace(base, matcher=Matcher(**{name: value}))
        for name, value in MATCHER_CHANGES.items()
        if name != "name"
    ]
    changed += [
        dataclasses.replace(base, learned=dataclasses.replace(CHANGES["learned"], **{name: value}))
        for name, value in LEARNED_CHANGES.items()
    ]
    changed += [
        dataclasses.replace(base, branches=(dataclasses.replace(base.branches[0], **{name: value}),))
        for name, value in BRANCH_CHANGES.items()
    ]
    keys = {recipe.key() for recipe in [base, *changed]}
    assert len(keys) == len(changed) + 1


def test_the_feature_key_leaves_out_what_the_features_do_not_depend_on():
    same = [
        dataclasses.replace(PLAIN, matcher=Matcher("nn")),
        dataclasses.replace(PLAIN, upsample="bilinear"),
        dataclasses.replace(PLAIN, branches=(Branch(("up1",), 20, weight=3.0),)),
    ]
    assert {recipe.feature_key() for recipe in same} == {PLAIN.feature_key()}
    assert dataclasses.replace(PLAIN, seed=1).feature_key() != PLAIN.feature_key()


def test_learned_prompts_of_a_known_file_are_named_by_it_and_not_by_its_place():
    here, there, other = (
        dataclasses.replace(PLAIN, learned=Learned(path, sha256=digit * 64))
        for path, digit in (("p", "a"), ("./p", "a"), ("p", "b"))
    )
    assert here.key() == there.key() != other.key()
    assert here.feature_key() == there.feature_key() != other.feature_key()
    with pytest.raises(RecipeError, match="64 hexadecimal digits"):
        Learned("p", sha256="A" * 64)


def test_the_order_and_spelling_of_toml_does_not_change_the_key():
    one = "seed = 3\nsize = 64\n"
    one += 'branches = [{taps = ["up1"], timestep = 20, weight = 2}]\nmatcher = {name = "nn", sigma = 3}\n'
    two = '[matcher]\nsigma = 3.0\nname = "nn"\n[[branches]]\nweight = 2.0\ntimestep = 20\ntaps = ["up1"]\n'
    first = Recipe.from_dict(tomllib.loads(one))
    second = Recipe.from_dict(tomllib.loads("size = [64, 64]\nseed = 3\n" + two))
    assert first == second
    assert first.key() == second.key()


GOOD = 'branches = [{ taps = ["up1"], timestep = 20 }]\n'


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "branches"),
        ("branches = []", "at least one"),
        ("branches = 5", "wrong type"),
        ('branches = "up1"', "table"),
        ("branches = [{ timestep = 20 }]", "lacks the field 'taps'"),
        ('branches = [{ taps = ["up1"] }]', "lacks the field 'timestep'"),
        ('branches = [{ taps = "up1", timestep = 20 }]', r'such as \["up1"\]'),
        ("branches = [{ taps = [1], timestep = 20 }]", "taps"),
        ("branches = [{ taps = [], timestep = 20 }]", "taps"),
        ('branches = [{ taps = ["up1", "up1"], timestep = 20 }]', "each tap once"),
        ('branches = [{ taps = ["up1"], timestep = 1000 }]', "0 to 999"),
        ('branches = [{ taps = ["up1"], timestep = "20" }]', "type int"),
        ('branches = [{ taps = ["up1"], timestep = 20.0 }]', "type int"),
        ('branches = [{ taps = ["up1"], timestep = 20, weight = 0 }]', "above 0"),
        ('branches = [{ taps = ["up1"], timestep = 20, weight = nan }]', "above 0"),
        (
            'branches = [{ taps = ["up1"], timestep = 20, colour = 1 }]',
            "unknown field 'colour' in branches; allowed: taps",
        ),
        (GOOD + "steps = 3", "unknown field 'steps' in recipe; allowed: branches, model"),
        (GOOD + "ensemble = true", "type int"),
        (GOOD + "ensemble = 0", "1 to 1024"),
        (GOOD + "seed = -1", "seed"),
        (GOOD + "size = 4", "size"),
        (GOOD + "size = [64, 64, 64]", "size"),
        (GOOD + "size = 3.5", "wrong type"),
        (GOOD + 'size = "big"', "size"),
        (GOOD + "size = [true, 64]", "size"),
        (GOOD + 'fit = "crop"', "stretch, letterbox"),
        (GOOD + 'noise = "none"', "1 when noise"),
        (
            GOOD + 'noise = "antithetic"\nensemble = 3',
            "ensemble is 3; allowed: an even number when noise is 'antithetic'",
        ),
        (GOOD + 'noise = "paired"', "independent, antithetic, none"),
        (GOOD + 'model = ""', "model"),
        (GOOD + 'matcher = "dense"', "table"),
        (GOOD + 'matcher = { name = "best" }', "dense, nn"),
        (GOOD + "matcher = { window = 4 }", "odd"),
        (GOOD + "matcher = { temperature = 0 }", "above 0"),
        ("a = = 1", "cannot be read as TOML"),
    ],
)
def test_bad_recipe_files_say_what_is_allowed(tmp_path, text, words):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=words) as caught:
        load_recipe(path)
    assert str(path) in str(caught.value)


def test_unknown_names_list_the_presets(tmp_path):
    for name in ("difft", tmp_path, "x" * 5000):
        with pytest.raises(RecipeError, match="presets: pocket, dift"):
            load_recipe(name)
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(RecipeError, match="TOML"):
        load_recipe(tmp_path / "binary.toml")


def test_a_model_is_named_by_reference_and_its_weights_enter_no_key():
    plain = load_recipe("dift")
    assert plain.to_dict()["model"] == "sd21"
    for extra in ({"revision": "abc"}, {"random_weights": 0}):
        named = dataclasses.replace(plain, model=ModelReference("sd21", **extra))
        assert named.to_dict()["model"] == {"name": "sd21", **extra}
        assert Recipe.from_dict(named.to_dict()) == named != plain
        assert (named.key(), named.feature_key()) == (plain.key(), plain.feature_key())
    assert dataclasses.replace(plain, model="sd21") == plain
    assert str(ModelReference("sd15", random_weights=3)) == "sd15 (random weights, seed 3)"
    assert str(ModelReference("a/b", "main")) == "a/b at main"
    with pytest.raises(RecipeError, match="unknown field 'seed' in model"):
        Recipe.from_dict({**plain.to_dict(), "model": {"name": "sd21", "seed": 1}})
    with pytest.raises(RecipeError, match="model"):
        Recipe.from_dict({**plain.to_dict(), "model": ""})


@pytest.mark.parametrize("name", ["resize", "posterior"])
def test_fields_that_0_1_0_did_not_have_are_written_only_where_they_differ(name):
    changed = dataclasses.replace(PLAIN, **{name: CHANGES[name]})
    assert name not in PLAIN.to_dict()
    assert name not in PLAIN.feature_fields()
    assert changed.to_dict()[name] == changed.feature_fields()[name] == CHANGES[name]
    assert Recipe.from_dict(changed.to_dict()) == changed
    with pytest.raises(RecipeError, match=f"{name} is 'other'; allowed: "):
        dataclasses.replace(PLAIN, **{name: "other"})
