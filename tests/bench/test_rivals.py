"""DIFT's way and the tuned one give the features that ours gives, by other roads."""

import dataclasses

import numpy as np
import pytest

from difftap import Image, Pipeline, Recipe, Runtime
from difftap.backbones.checkpoint import Checkpoint
from difftap.bench import rivals
from difftap.bench.rivals import Rival, vae_bytes
from difftap.engine.noise import draw
from difftap.errors import BackendError, MissingExtraError
from difftap.images import to_input
from difftap.pipeline.conditioning import embed_prompts
from difftap.recipe import Branch
from tests.harness import picture

pytest.importorskip("diffusers")
SIZE = (24, 16)


@pytest.fixture
def recipe(mini):
    return Recipe((Branch(("up1",), 261, "a cat"),), model=str(mini), size=SIZE, ensemble=4, seed=3)


def inputs(recipe, images, model):
    laid = np.stack([to_input(image, recipe.size)[0] for image in images])
    shape = (model.latent_channels, SIZE[1] // model.latent_stride, SIZE[0] // model.latent_stride)
    drawn = [draw(recipe.seed, image.digest, recipe.ensemble, shape) for image in images]
    return laid, np.stack([np.stack(pair) for pair in zip(*drawn, strict=True)])


@pytest.mark.parametrize("tuned", [False, True])
def test_features_are_ours(recipe, mini, mini_cache, tuned):
    recipe = dataclasses.replace(recipe, branches=(*recipe.branches, Branch(("up1",), 40, "a dog")))
    model, images = Checkpoint.load(mini), [Image(picture(1)), Image(picture(2, (50, 36)))]
    with Pipeline.open(recipe, Runtime(backend="torch", cache=mini_cache.folder)) as pipeline:
        wanted = list(pipeline.features(images))
    rival = Rival(model, recipe, embed_prompts(recipe, model, mini_cache), "cpu", tuned=tuned, compiled=False)
    rival.warm_up()
    values, clock = rival.extract(*inputs(recipe, images, model))
    assert set(clock) == {"vae", "unet"}
    assert min(clock.values()) > 0
    for i, features in enumerate(wanted):
        for branch, taps in enumerate(features.branches):
            got, ours = values[branch]["up1"][i], taps["up1"].data
            assert got.shape == ours.shape
            assert np.linalg.norm(got - ours) <= 1e-4 * np.linalg.norm(ours)


def test_the_vae_runs_for_every_member_and_once_when_tuned(recipe, mini, mini_cache):
    model = Checkpoint.load(mini)
    prompts = embed_prompts(recipe, model, mini_cache)
    for tuned, encoded in ((False, recipe.ensemble), (True, 1)):
        rival = Rival(model, recipe, prompts, "cpu", tuned=tuned, compiled=False)
        seen = []
        encode = rival._encode
        rival._encode = lambda image, seen=seen, encode=encode: (seen.append(len(image)), encode(image))[1]
        rival.extract(*inputs(recipe, [Image(picture(1))], model))
        assert sum(seen) == encoded


def test_members_that_do_not_fit_run_in_parts_and_it_is_said(recipe, mini, mini_cache, monkeypatch):
    model = Checkpoint.load(mini)
    prompts = embed_prompts(recipe, model, mini_cache)
    whole = Rival(model, recipe, prompts, "cpu")
    assert (whole.together, whole.notes) == (4, [])
    free = vae_bytes(model, SIZE, 2) / 0.8 + 1
    monkeypatch.setattr(rivals, "available_memory", lambda: free)
    split = Rival(model, recipe, prompts, "cpu")
    assert split.together == 2
    assert split.notes == ["2 of 4 members at a time: more do not fit into memory"]
    given = inputs(recipe, [Image(picture(1))], model)
    assert np.allclose(split.extract(*given)[0][0]["up1"], whole.extract(*given)[0][0]["up1"], rtol=1e-4, atol=1e-6)
    monkeypatch.setattr(rivals, "available_memory", lambda: 0)
    assert Rival(model, recipe, prompts, "cpu").together == 1


def test_tuned_needs_a_decoder_block(recipe, mini, mini_cache):
    model = Checkpoint.load(mini)
    for taps in (("down1.attn0",), ("up1", "up2")):
        other = dataclasses.replace(recipe, branches=(Branch(taps, 261),))
        with pytest.raises(BackendError, match=f"got taps {', '.join(taps)}; allowed: one of up0"):
            Rival(model, other, embed_prompts(other, model, mini_cache), "cpu", tuned=True, compiled=False)


def test_without_torch_the_pip_line_is_given(recipe, mini, mini_cache, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    with pytest.raises(MissingExtraError, match=r"difftap\[bench\]"):
        Rival(Checkpoint.load(mini), recipe, [], "cpu")


@pytest.mark.slow
def test_compiled_gives_the_same(recipe, mini, mini_cache):
    model = Checkpoint.load(mini)
    prompts = embed_prompts(recipe, model, mini_cache)
    given = inputs(recipe, [Image(picture(1))], model)
    plain = Rival(model, recipe, prompts, "cpu").extract(*given)[0][0]["up1"]
    compiled = Rival(model, recipe, prompts, "cpu", tuned=True)
    compiled.warm_up()
    assert np.linalg.norm(compiled.extract(*given)[0][0]["up1"] - plain) <= 1e-4 * np.linalg.norm(plain)
