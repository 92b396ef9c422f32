"""SDXL's UNet and its two text encoders, against diffusers used directly."""

import json

import numpy as np
import pytest

from difftap import Pipeline, Recipe
from difftap.backbones.checkpoint import Checkpoint
from difftap.engine import Cache, Profile, get_backend, members_per_run
from difftap.engine.noise import example_feeds
from difftap.errors import ModelError
from difftap.export import export_graph
from difftap.prompts import encode_prompt
from difftap.recipe import Branch
from tests.harness import MINI_UNET, compare, write_mini
from tests.prompts.test_encode import write_clip

MINI_XL_UNET = {
    **MINI_UNET,
    "cross_attention_dim": 14,
    "attention_head_dim": (2, 4, 4),
    "transformer_layers_per_block": (1, 1, 2),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 6 * 4 + 6,
}
"""SDXL's kind: no attention in the first block, and a pooled text embedding (6 wide) with six sizes as conditions."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_mini(tmp_path_factory.mktemp("xl"), unet=MINI_XL_UNET)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Of all tests here: tracing this UNet takes half a minute."""
    return Cache(tmp_path_factory.mktemp("xl-cache"))


def test_the_tap_is_what_diffusers_gives(folder):
    """Pooled text from the prompt's last row; sizes of an uncropped image, as the pipeline's time ids."""
    import torch
    from diffusers import UNet2DConditionModel

    from difftap.engine import Graph

    model, profile = Checkpoint.load(folder), Profile((24, 16), 1, 6)
    graph = Graph(model, "unet", ("up0",))
    feeds = example_feeds(graph, profile)
    with get_backend("torch").open(graph, profile, "cpu", 1) as engine:
        got = engine.run(feeds)["up0"]
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet").eval()
    caught = []
    unet.up_blocks[0].register_forward_hook(lambda _m, _i, out: caught.append(out))
    latent = feeds["mean"] + feeds["std"] * feeds["posterior_noise"][:, 0]
    latent = feeds["signal"] * latent + feeds["sigma"] * feeds["noise"][:, 0]
    prompt = torch.from_numpy(feeds["prompt"])
    with torch.inference_mode():
        unet(
            torch.from_numpy(latent),
            torch.tensor([261]),
            encoder_hidden_states=prompt[:, :5],
            added_cond_kwargs={
                "text_embeds": prompt[:, 5, :6],
                "time_ids": torch.tensor([[16, 24, 0, 0, 16, 24]], dtype=torch.float32),
            },
        )
    assert np.allclose(got, caught[0].numpy(), rtol=1e-4, atol=1e-5)


def test_the_graph_gives_torchs_numbers_at_any_size_and_listens_to_the_pooled_text(folder, cache):
    model = Checkpoint.load(folder)
    graph, _ = export_graph(cache, model, "unet", ("up0",))
    for seed, profile in enumerate([Profile((8, 8), tokens=2), Profile((40, 24), 2, 9, 2)]):
        feeds = example_feeds(graph, profile, seed)
        with (
            get_backend("ort").open(graph, profile, "cpu", 1) as engine,
            get_backend("torch").open(graph, profile, "cpu", 1) as torch,
        ):
            assert compare(engine, torch, feeds)["up0"].relative <= 1e-4
            other = feeds["prompt"].copy()
            other[:, -1, :6] += 1
            assert (engine.run({**feeds, "prompt": other})["up0"] != engine.run(feeds)["up0"]).any()


def test_from_a_recipe_to_features(folder, cache, tmp_path):
    from PIL import Image as Pillow

    import difftap
    from difftap.pipeline.environment import Runtime

    Pillow.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)).save(tmp_path / "a.png")
    recipe = Recipe((Branch(("up0",), 5),), model=str(folder), size=(24, 16), ensemble=2)
    with Pipeline.open(recipe, Runtime(cache=cache.folder)) as pipeline:
        [found] = pipeline.extract([difftap.load_image(tmp_path / "a.png")])
    assert found.data.shape == (16, 4, 6)


def test_members_per_run_counts_the_finest_grid_that_has_attention(folder):
    model = Checkpoint.load(folder)
    # (64 / 2 / 2)^2 cells, 4 heads, 4 bytes: 1 MB; 1 GB holds them all
    assert members_per_run(model, (64, 64), 8) == 8
    assert members_per_run(model, (1024, 1024), 8) == 1


def test_damaged_conditions_are_refused(folder, tmp_path):
    import shutil

    shutil.copytree(folder, tmp_path / "model")
    path = tmp_path / "model" / "unet" / "config.json"
    for change in (
        {"projection_class_embeddings_input_dim": None},
        {"projection_class_embeddings_input_dim": 10},
        {"addition_time_embed_dim": "many"},
    ):
        path.write_text(json.dumps({**MINI_XL_UNET, "_class_name": "UNet2DConditionModel", **change}))
        with pytest.raises(ModelError, match="addition_time_embed_dim"):
            Checkpoint.load(tmp_path / "model")


def test_prompts_are_those_of_diffusers_pipeline(tmp_path):
    """Both encoders' last but one hidden state side by side, and the second one's pooled embedding in one row more."""
    import torch
    from diffusers import StableDiffusionXLPipeline
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    folder = write_mini(tmp_path / "xl", unet=MINI_XL_UNET)
    write_clip(folder, width=8)
    write_clip(folder, width=6, suffix="_2", projection=6)
    got = encode_prompt(Checkpoint.load(folder), "a cat", Cache(tmp_path / "cache"))
    pipe = StableDiffusionXLPipeline(
        vae=None,
        text_encoder=CLIPTextModel.from_pretrained(folder / "text_encoder"),
        text_encoder_2=CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder_2"),
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        tokenizer_2=CLIPTokenizer.from_pretrained(folder / "tokenizer_2"),
        unet=None,
        scheduler=None,
    )
    with torch.inference_mode():
        want, _, pooled, _ = pipe.encode_prompt("a cat", device="cpu", do_classifier_free_guidance=False)
    assert got.shape == (78, 14)
    assert np.allclose(got[:77], want[0].numpy(), atol=1e-5)
    assert np.allclose(got[77, :6], pooled[0].numpy(), atol=1e-5)
    assert (got[77, 6:] == 0).all()
    (folder / "text_encoder_2" / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="text_encoder_2"):
        encode_prompt(Checkpoint.load(folder), "a cat", Cache(tmp_path / "cache"))
