"""Features: the same bits in any company, and the numbers that plain diffusers gives."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as PIL

from difftap.backbones.checkpoint import Checkpoint
from difftap.backbones.sd_unet import SDUNet
from difftap.engine import BranchEngine, Featurizer, Profile, finite_or_alone, get_backend, members_per_run
from difftap.engine.graphfiles import cached_graph
from difftap.engine.noise import draw
from difftap.errors import InputError, NonFiniteError
from difftap.images import Image
from difftap.pipeline.environment import Runtime
from difftap.pipeline.pipeline import Pipeline
from difftap.prompts import encode_prompt
from difftap.recipe import Branch, Recipe
from tests.harness import MINI_SCHEDULE, MINI_TAPS, picture

IMAGES = [Image(picture(i, (30 + 7 * i, 21))) for i in range(5)]
SIZE = (24, 16)


@pytest.fixture(scope="module")
def recipe(mini) -> Recipe:
    return Recipe((Branch(MINI_TAPS, 261, "a cat"),), str(mini), size=SIZE, ensemble=3, seed=4)


def flat(features):
    return [value.data for taps in features.branches for value in taps.values()]


def run(recipe, images, cache, **runtime):
    with Pipeline.open(recipe, Runtime(cache=cache.folder, **runtime)) as pipeline:
        return [flat(features) for features in pipeline.features(images)]


def same(first, second):
    return all((a == b).all() for a, b in zip(first, second, strict=True))


@pytest.fixture(scope="module")
def alone(recipe, mini_cache):
    """Each image's features from a run of its own."""
    return [run(recipe, [image], mini_cache, threads=1)[0] for image in IMAGES]


@pytest.mark.parametrize("batch", [1, 2, 3, 8])
def test_the_same_bits_for_any_batch_size(recipe, mini_cache, alone, batch):
    together = run(recipe, IMAGES, mini_cache, threads=1, batch=batch)
    assert all(map(same, together, alone))


def test_the_same_bits_in_any_order_and_company(recipe, mini_cache, alone):
    order = [3, 0, 3, 4, 1, 2, 0]
    mixed = run(recipe, [IMAGES[i] for i in order], mini_cache, threads=1, batch=3)
    assert all(same(got, alone[i]) for got, i in zip(mixed, order, strict=True))


def test_the_same_picture_from_another_file_has_the_same_bits(recipe, mini_cache, alone, tmp_path):
    from difftap.images import load_image

    PIL.fromarray(IMAGES[0].pixels).save(tmp_path / "a.bmp")
    assert same(run(recipe, [load_image(tmp_path / "a.bmp")], mini_cache, threads=1)[0], alone[0])


def test_an_engine_batch_of_several_images_agrees(recipe, mini, mini_cache, alone):
    """As on a GPU: all images in one run; the kernels may differ in the last bits."""
    model, ort = Checkpoint.load(mini), get_backend("ort")
    prompt = encode_prompt(model, "a cat", mini_cache)
    vae = ort.open(cached_graph(mini_cache, model, "vae"), Profile(SIZE, batch=4), "cpu", 1)
    unet = ort.open(cached_graph(mini_cache, model, "unet", MINI_TAPS), Profile(SIZE, 3, len(prompt), 4), "cpu", 1)
    with vae, unet:
        got = list(Featurizer(model, recipe, vae, [BranchEngine(recipe.branches[0], unet, prompt)], 4)(IMAGES))
    assert [features.digest for features in got] == [image.digest for image in IMAGES]
    for features, want in zip(got, alone, strict=True):
        for value, other in zip(flat(features), want, strict=True):
            assert np.abs(value - other).max() <= 1e-4 * np.abs(other).max()


def test_seed_timestep_prompt_and_ensemble_change_the_features(recipe, mini_cache, alone):
    branch = recipe.branches[0]
    for change in (
        {"seed": 5}, {"ensemble": 2}, {"branches": (dataclasses.replace(branch, timestep=260),)},
        {"branches": (dataclasses.replace(branch, prompt="a dog"),)}, {"fit": "letterbox"},
    ):  # fmt: skip
        got = run(dataclasses.replace(recipe, **change), IMAGES[:1], mini_cache, threads=1)[0]
        assert not same(got, alone[0]), change


def reference(recipe, image, folder, prompts):
    """Plain PyTorch and diffusers, written from scratch; only the noise and the prompt embeddings are difftap's."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel

    vae = AutoencoderKL.from_pretrained(folder / "vae").eval()
    unet = UNet2DConditionModel.from_pretrained(folder / "unet").eval()
    scheduler = DDIMScheduler(**{k: v for k, v in MINI_SCHEDULE.items() if not k.startswith("_")})
    resized = PIL.fromarray(image.pixels).resize(recipe.size, PIL.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.asarray(resized).astype(np.float32) / 255 * 2 - 1).permute(2, 0, 1)[None]
    results = []
    with torch.inference_mode():
        posterior = vae.encode(pixels).latent_dist
        first, second = draw(recipe.seed, image.digest, recipe.ensemble, tuple(posterior.mean.shape[1:]))
        if recipe.noise == "antithetic":
            for noise in (first, second):
                noise[1::2] = -noise[0::2]
        for branch, prompt in zip(recipe.branches, prompts, strict=True):
            caught = {path: [] for path in ("up_blocks.1", "down_blocks.1.attentions.0")}
            for path, store in caught.items():
                module = unet.get_submodule(path)
                module.register_forward_hook(
                    lambda m, i, o, store=store: store.append(o[0] if isinstance(o, tuple) else getattr(o, "sample", o))
                )
            for member in range(recipe.ensemble):  # one at a time: the plain way
                if recipe.noise == "none":
                    noisy = posterior.mean * vae.config.scaling_factor
                else:
                    latent = (
                        posterior.mean + posterior.std * torch.from_numpy(first[member])
                    ) * vae.config.scaling_factor
                    noisy = scheduler.add_noise(
                        latent, torch.from_numpy(second[member])[None], torch.tensor([branch.timestep])
                    )
                unet(noisy, torch.tensor([branch.timestep]), encoder_hidden_states=torch.from_numpy(prompt)[None])
            results += [torch.stack(store).mean(0)[0].numpy() for store in caught.values()]
            unet = UNet2DConditionModel.from_pretrained(folder / "unet").eval()  # without the hooks
    return results


@pytest.mark.parametrize("backend", ["ort", "torch"])
@pytest.mark.parametrize("kind", ["one", "two", "clean", "pairs"])
def test_features_are_those_of_plain_diffusers(recipe, mini, mini_cache, backend, kind):
    if kind == "two":
        recipe = dataclasses.replace(recipe, branches=(*recipe.branches, Branch(MINI_TAPS, 40, "a dog on grass", 2.0)))
    if kind == "clean":
        recipe = dataclasses.replace(recipe, noise="none", ensemble=1)
    if kind == "pairs":
        recipe = dataclasses.replace(recipe, noise="antithetic", ensemble=4)
    prompts = [encode_prompt(Checkpoint.load(mini), branch.prompt, mini_cache) for branch in recipe.branches]
    got = run(recipe, IMAGES[1:2], mini_cache, backend=backend, threads=2)[0]
    want = reference(recipe, IMAGES[1], mini, prompts)
    assert len(got) == len(want) == 2 * len(recipe.branches)
    for value, other in zip(got, want, strict=True):
        assert value.shape == other.shape
        assert np.linalg.norm(value - other) <= 1e-4 * np.linalg.norm(other)


def test_two_branches_are_joined_by_their_shares(recipe, mini_cache):
    recipe = dataclasses.replace(recipe, branches=(*recipe.branches, Branch(MINI_TAPS, 40, "a dog", 3.0)))
    with Pipeline.open(recipe, Runtime(cache=mini_cache.folder)) as pipeline:
        (features,) = pipeline.features(IMAGES[:1])
        joined = pipeline.join(features)
    assert joined.channels == 2 * (16 + 16)
    assert joined.grid == (12, 8)
    norms = np.linalg.norm(joined.data, axis=0)
    assert np.allclose(norms, norms.flat[0], rtol=1e-4) or norms.max() > 0


def test_a_batch_below_one_and_a_timestep_beyond_the_schedule(recipe, mini, mini_cache, pocket):
    with pytest.raises(InputError, match="batch is 0"):
        Featurizer(pocket, recipe, None, [], 0)


def test_no_images_no_features(recipe, mini_cache):
    assert run(recipe, [], mini_cache) == []


def test_members_run_in_equal_parts_when_memory_asks_for_it(recipe, mini_cache, monkeypatch):
    recipe = dataclasses.replace(recipe, ensemble=6)
    [whole] = run(recipe, IMAGES[:1], mini_cache)
    sizes = []
    model = Checkpoint.load(Path(recipe.model.name))
    stride = 2 * model.latent_stride  # attention begins in the second block
    table = 4 * model.unet["attention_head_dim"] * (SIZE[0] // stride * (SIZE[1] // stride)) ** 2  # bytes
    for budget in (1, 2 * table):
        monkeypatch.setattr("difftap.engine.featurizer.ATTENTION_BUDGET", budget)
        sizes.append(members_per_run(model, SIZE, 6))
        [parts] = run(recipe, IMAGES[:1], mini_cache)
        for a, b in zip(whole, parts, strict=True):
            assert np.abs(a - b).max() <= 1e-5 * np.abs(a).max()
    assert sizes == [1, 2]


def test_full_size_networks_stay_within_memory():
    blocks = ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"]
    heads = {"attention_head_dim": [5, 10, 20, 20], "down_block_types": blocks}
    sd21 = SDUNet("sd21", Path(), heads, {"block_out_channels": [128, 256, 512, 512]}, {})
    assert members_per_run(sd21, (768, 768), 8) == 1
    assert members_per_run(sd21, (256, 256), 8) == 8


@pytest.mark.parametrize("bad", [(), (0,), (3,), (1, 2), (0, 1, 2, 3)])
def test_what_is_not_finite_does_not_spoil_its_batch(bad):
    calls = []

    def run(items):
        calls.append(list(items))
        if set(items) & set(bad):
            raise NonFiniteError(f"NaN among {items}")
        return [10 * item for item in items]

    found = {}
    for items, made in finite_or_alone(run, [0, 1, 2, 3]):
        found |= dict.fromkeys(items) if isinstance(made, NonFiniteError) else dict(zip(items, made, strict=True))
    assert found == {k: None if k in bad else 10 * k for k in range(4)}
    assert calls == ([[0, 1, 2, 3]] if not bad else [[0, 1, 2, 3], [0], [1], [2], [3]])
    assert list(finite_or_alone(run, [])) == []
