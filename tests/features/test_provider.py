"""A store in a pipeline's place: what is in is read, what is not is extracted or refused."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from difftap.backbones.checkpoint import Checkpoint
from difftap.engine.graphfiles import model_key
from difftap.errors import InputError, OutputError, RecipeError
from difftap.features.extract import ExtractSettings, extract_to_store
from difftap.features.provider import StoreProvider
from difftap.features.sources import Item, Source
from difftap.features.store import Encoding
from difftap.images import Image
from difftap.pipeline import fastest as auto
from difftap.pipeline.conditioning import embed_prompts
from difftap.pipeline.environment import Runtime
from difftap.pipeline.pipeline import Pipeline
from difftap.prompts.learned import fits_of, save_learned
from difftap.recipe import Branch, Learned, Recipe
from tests.harness import MINI_TAPS, picture

pytest.importorskip("zarr")
IMAGES = [Image(picture(number, (30 + 7 * number, 21))) for number in range(4)]


@dataclasses.dataclass(frozen=True)
class Given:
    image: Image

    def load(self):
        return self.image


@pytest.fixture
def recipe(mini):
    return Recipe((Branch(MINI_TAPS, 261), Branch(MINI_TAPS, 50)), str(mini), size=(24, 16), ensemble=1)


@pytest.fixture
def store(recipe, mini_cache, tmp_path):
    source = Source("given", [Item(f"{number}", Given(IMAGES[number])) for number in (0, 2)])
    with Pipeline.open(recipe, Runtime(cache=mini_cache.folder, threads=1)) as pipeline:
        extract_to_store(pipeline, source, tmp_path / "s.zarr", ExtractSettings(Encoding("float32")))
    return tmp_path / "s.zarr"


def flat(features):
    return [one.data for taps in features.branches for one in taps.values()]


def test_what_is_in_is_read_and_the_rest_extracted(recipe, mini_cache, store):
    runtime = Runtime(cache=mini_cache.folder, threads=1)
    with Pipeline.open(recipe, runtime) as pipeline:
        want = list(pipeline.features(IMAGES))
        joined = list(pipeline.extract(IMAGES))
        category = next(pipeline.extract(IMAGES[:1], "cat"))
    with StoreProvider.open(recipe, store, runtime) as source:
        got = list(source.features(IMAGES))
        assert source.not_in_store == 2
        for one, other in zip(got, want, strict=True):
            assert all((a == b).all() for a, b in zip(flat(one), flat(other), strict=True))
        assert all((a.data == b.data).all() for a, b in zip(source.extract(IMAGES), joined, strict=True))
        assert (next(source.extract(IMAGES[:1], "cat")).data == category.data).all()
        assert len(next(source.maps(IMAGES[:1]))) == 4


def test_a_data_set_that_is_in_needs_no_engine(recipe, mini_cache, store):
    source = StoreProvider.open(recipe, store, Runtime(cache=mini_cache.folder), complete=True)
    assert len(list(source.features([IMAGES[2], IMAGES[0], IMAGES[2]]))) == 3
    assert source._pipeline is None
    with pytest.raises(InputError, match="is not in"):
        list(source.features(IMAGES))
    assert source._pipeline is None


def test_a_prompt_learned_again_is_refused_and_named_in_the_conditions(recipe, mini_cache, tmp_path):
    """Under the same path lies another prompt: the store's features are not its."""
    folder, runtime = tmp_path / "prompt", Runtime(cache=mini_cache.folder, threads=1)
    learned = dataclasses.replace(recipe, learned=Learned(str(folder), "single"))

    def learn(value):
        model = Checkpoint.load(Path(recipe.model.name))
        key = model_key(mini_cache, model)
        shape = embed_prompts(recipe, model, mini_cache)[0].shape
        said = dict.fromkeys(("data", "settings", "scores", "steps"))
        about = {
            "kind": "single",
            "classes": [],
            "fits": fits_of(recipe),
            "model": {"name": "mini", "key": key},
            **said,
        }
        folder.mkdir(exist_ok=True)
        branch = {"embedding": np.full((1, *shape), value, np.float32)}
        return save_learned(folder, about, [branch] * len(recipe.branches)).sha256

    first = learn(0.1)
    source = Source("given", [Item("0", Given(IMAGES[0]))])
    with Pipeline.open(learned, runtime) as pipeline:
        extract_to_store(pipeline, source, tmp_path / "l.zarr", ExtractSettings(Encoding("float32")))
    with StoreProvider.open(learned, tmp_path / "l.zarr", runtime) as stored:
        assert stored.conditions["prompts"]["sha256"] == first
        list(stored.features(IMAGES[:1]))
        assert (stored.from_store, stored.not_in_store) == (1, 0)
    assert learn(0.2) != first
    with pytest.raises(RecipeError, match=r"made with learned\.sha256 = "):
        StoreProvider.open(learned, tmp_path / "l.zarr", runtime)
    with (
        Pipeline.open(learned, runtime) as pipeline,
        pytest.raises(OutputError, match=r"other conditions \(recipe\.learned"),
    ):
        extract_to_store(pipeline, source, tmp_path / "l.zarr", ExtractSettings(Encoding("float32")))


def test_the_fastest_backend_may_be_asked_for(recipe, mini_cache, store, monkeypatch):
    import difftap.pipeline.fastest

    chosen = []
    monkeypatch.setattr(
        difftap.pipeline.fastest,
        "resolve",
        lambda recipe, runtime, **_: chosen.append(1) or dataclasses.replace(runtime, backend="ort"),
    )
    source = StoreProvider.open(recipe, store, Runtime("auto", cache=mini_cache.folder), complete=True)
    assert chosen
    assert source.conditions["backend"]["name"] == "ort"


def test_a_recipe_that_does_not_fit_is_refused(recipe, mini_cache, store):
    with pytest.raises(RecipeError, match="made with ensemble = 1, and 2 is asked for"):
        StoreProvider.open(dataclasses.replace(recipe, ensemble=2), store, Runtime(cache=mini_cache.folder))


def test_auto_is_what_it_chooses(recipe, store, mini_cache, monkeypatch):
    monkeypatch.setattr(auto, "BACKENDS", {"ort": ""})  # alone, so that nothing has to be measured
    try:
        with StoreProvider.open(recipe, store, Runtime("auto", cache=mini_cache.folder, threads=1)) as source:
            assert source.conditions["backend"]["name"] == "ort"
            assert len(list(source.extract(IMAGES))) == 4 and source.not_in_store == 2
    finally:
        auto.forget_choices(mini_cache)
