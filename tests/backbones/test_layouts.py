"""Files and folders that are no checkpoint difftap reads are called by their name."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from difftap.artifacts.cache import Cache
from difftap.backbones.checkpoint import Checkpoint
from difftap.backbones.find import open_model
from difftap.errors import ModelError
from difftap.recipe import ModelReference


def refused(path, tmp_path):
    with pytest.raises(ModelError) as caught:
        open_model(ModelReference(str(path)), Cache(tmp_path / "cache"))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        (
            ["model.diffusion_model.input_blocks.0.0.weight", "first_stage_model.encoder.conv_in.weight"],
            'original-layout single file; convert it with: python -c "from diffusers import StableDiffusionPipeline as',
        ),
        (
            ["model.diffusion_model.input_blocks.0.0.weight", "conditioner.embedders.0.transformer.x"],
            "import StableDiffusionXLPipeline",
        ),
        (["model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"], "a transformer (SD3, Flux)"),
        (["double_blocks.0.img_attn.qkv.weight"], "a transformer (SD3, Flux)"),
        (["lora_unet_down_blocks_0.lora_up.weight"], "a LoRA"),
        (["unet.down_blocks.0.attentions.0.to_k.lora_A.weight"], "a LoRA"),
        (["controlnet_cond_embedding.conv_in.weight"], "a ControlNet"),
        (["down_blocks.0.resnets.0.conv1.weight", "up_blocks.0.resnets.0.conv1.weight"], "BASE+model.safetensors"),
        (["embedding"], "holds no whole checkpoint"),
    ],
)
def test_safetensors_files(tmp_path, tensors, words):
    save_file({name: np.zeros(1, np.float32) for name in tensors}, tmp_path / "model.safetensors")
    assert words in refused(tmp_path / "model.safetensors", tmp_path)
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "model.safetensors").rename(folder / "model.safetensors")
    assert words in refused(folder, tmp_path)


@pytest.mark.parametrize(
    ("name", "words"),
    [("a.ckpt", "pickled"), ("a.gguf", "quantised"), ("a.txt", "no checkpoint"), ("a.safetensors", "no checkpoint")],
)
def test_other_files(tmp_path, name, words):
    (tmp_path / name).write_bytes(b"something else")
    assert words in refused(tmp_path / name, tmp_path)


def test_the_line_that_converts_names_the_file(tmp_path):
    path = tmp_path / "v1-5.safetensors"
    save_file({"model.diffusion_model.x": np.zeros(1, np.float32)}, path)
    assert f"from_single_file('{path}').save_pretrained('v1-5')" in refused(path, tmp_path)


@pytest.mark.parametrize(
    ("part", "config", "words"),
    [
        ("transformer", {"_class_name": "SD3Transformer2DModel"}, "Flux, PixArt) (SD3Transformer2DModel), not a UNet"),
        ("transformer", None, "a transformer (SD3, Flux, PixArt), not a UNet"),
        ("prior", {"_class_name": "StableCascadeUNet"}, "Stable Cascade's stages"),
        (".", {"model_type": "dinov2"}, "a single network (dinov2)"),
    ],
)
def test_folders(tmp_path, part, config, words):
    folder = tmp_path / "model"
    (folder / part).mkdir(parents=True)
    if config is not None:
        (folder / part / "config.json").write_text(json.dumps(config))
    assert words in refused(folder, tmp_path)


def test_an_empty_folder_says_what_a_model_is(tmp_path):
    with pytest.raises(ModelError, match="unet/, vae/ and scheduler/"):
        Checkpoint.load(tmp_path)
