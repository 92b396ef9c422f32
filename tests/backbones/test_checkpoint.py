"""A checkpoint folder is read safely, or refused with one line that says what is wrong with it."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from difftap.artifacts.digests import DigestMemo
from difftap.backbones.checkpoint import Checkpoint, pocket_folder
from difftap.errors import DifftapError, ModelError, RecipeError


@pytest.fixture
def copy(tmp_path):
    """A copy of the embedded checkpoint, to be damaged."""
    folder = tmp_path / "model"
    shutil.copytree(pocket_folder(), folder)
    return folder


def _refused(folder, words):
    with pytest.raises(ModelError, match=words) as caught:
        Checkpoint.load(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_embedded_model_loads(pocket):
    assert pocket.name == "pocket"
    assert pocket.size_step % pocket.latent_stride == 0
    assert [path.suffix for path in pocket.weight_files("unet")] == [".safetensors"]


def test_a_missing_folder(tmp_path):
    _refused(tmp_path / "none", "no model folder")


@pytest.mark.parametrize(("part", "words"), [("unet", "no UNet"), ("vae", "no VAE"), ("scheduler", "no scheduler")])
def test_a_missing_part_is_named(copy, part, words):
    shutil.rmtree(copy / part)
    assert "unet/, vae/ and scheduler/" in _refused(copy, words)


def test_another_class_is_refused(copy):
    path = copy / "unet" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "_class_name": "FluxTransformer2DModel"}))
    _refused(copy, "'FluxTransformer2DModel' where a UNet2DConditionModel is needed")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "diffusion_pytorch_model.bin", "model.ckpt", "unet.pt"])
def test_pickled_weights_are_refused(copy, name):
    (copy / "unet" / "diffusion_pytorch_model.safetensors").rename(copy / "unet" / name)
    assert "safe_serialization" in _refused(copy, f"pickled weights .{name}.")


def test_pickled_weights_beside_safe_ones_are_not_looked_at(copy):
    (copy / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"cposix\nsystem\n")
    assert Checkpoint.load(copy).weight_files("unet")[0].suffix == ".safetensors"


def test_no_weights_at_all(copy):
    (copy / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    _refused(copy, "holds no weights")


@pytest.mark.parametrize("text", ["", "{", "[1]", "3", "\ud800"])
def test_damaged_json(copy, text):
    (copy / "vae" / "config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    _refused(copy, "vae")


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("unet", {"block_out_channels": None}),
        ("unet", {"block_out_channels": "many"}),
        ("unet", {"block_out_channels": [8]}),
        ("unet", {"down_block_types": None}),
        ("unet", {"up_block_types": []}),
        ("unet", {"cross_attention_dim": None}),
        ("unet", {"cross_attention_dim": [1, 2]}),
        ("unet", {"layers_per_block": "two"}),
        ("vae", {"block_out_channels": None}),
        ("vae", {"scaling_factor": "big"}),
        ("vae", {"latent_channels": 0}),
    ],
)
def test_a_configuration_that_makes_no_sense_is_a_model_error(copy, part, change):
    path = copy / part / "config.json"
    config = {**json.loads(path.read_text()), **change}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    _refused(copy, part)


def _shard(folder):
    whole = folder / "diffusion_pytorch_model.safetensors"
    tensors = load_file(whole)
    names = sorted(tensors)
    parts = {"one.safetensors": names[::2], "two.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    whole.unlink()
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))


def test_a_sharded_index(copy):
    _shard(copy / "unet")
    assert [path.name for path in Checkpoint.load(copy).weight_files("unet")] == ["one.safetensors", "two.safetensors"]
    (copy / "unet" / "two.safetensors").unlink()
    _refused(copy, "two.safetensors")


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', '{"weight_map": {"a": "../../x"}}']
)
def test_a_damaged_index(copy, text):
    (copy / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(text)
    _refused(copy, "index")


def test_half_precision_weights_are_found(copy):
    for part in ("unet", "vae"):
        (copy / part / "diffusion_pytorch_model.safetensors").rename(
            copy / part / "diffusion_pytorch_model.fp16.safetensors"
        )
    assert Checkpoint.load(copy).weight_files("vae")[0].name.endswith("fp16.safetensors")


def test_the_weights_hash_is_of_weights_and_configuration(copy, tmp_path):
    memo = DigestMemo(tmp_path / "memo.json")
    before = Checkpoint.load(copy).weights_hash("unet", memo)
    path = copy / "unet" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**dict(reversed(config.items())), "_diffusers_version": "0.1"}))
    assert (
        Checkpoint.load(copy).weights_hash("unet", memo) == before
    )  # neither order nor the writer's version is a number
    path.write_text(json.dumps({**config, "norm_eps": 1e-3}))
    assert Checkpoint.load(copy).weights_hash("unet", memo) != before
    path.write_text(json.dumps(config))
    weights = copy / "unet" / "diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert Checkpoint.load(copy).weights_hash("unet", memo) != before


@pytest.mark.parametrize(
    "config",
    [
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000},
        {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02, "num_train_timesteps": 500},
        {},
        {"trained_betas": [0.1, 0.2, 0.3], "num_train_timesteps": 3},
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "rescale_betas_zero_snr": True},
    ],
)
def test_the_schedule_is_diffusers(copy, config):
    diffusers = pytest.importorskip("diffusers")
    (copy / "scheduler" / "scheduler_config.json").write_text(json.dumps({"_class_name": "DDIMScheduler", **config}))
    want = diffusers.DDIMScheduler(**config).alphas_cumprod.double().numpy()
    assert np.allclose(Checkpoint.load(copy).alphas_cumprod, want, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "config", [{"beta_schedule": "squaredcos_cap_v2"}, {"num_train_timesteps": "many"}, {"beta_start": None}]
)
def test_an_unknown_schedule_is_a_model_error(copy, config):
    (copy / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError):
        _ = Checkpoint.load(copy).alphas_cumprod


def test_sizes_that_the_blocks_cannot_halve_are_refused(pocket):
    step = pocket.size_step
    pocket.check_size((step, 3 * step))
    for size in ((step + 8, step), (step, step - 8), (1, 1)):
        with pytest.raises(RecipeError, match=f"multiples of {step}"):
            pocket.check_size(size)


def test_every_damage_is_ours():
    assert issubclass(ModelError, DifftapError)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"in_channels": 9}, "takes 9 channels"),
        ({"addition_embed_type": "text_image"}, "addition_embed_type = 'text_image'"),
        ({"addition_embed_type": "text_time"}, "projection_class_embeddings_input_dim = None"),
        ({"class_embed_type": "projection"}, "class_embed_type"),
    ],
)
def test_networks_that_need_other_inputs_are_refused(copy, change, words):
    path = copy / "unet" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    _refused(copy, words)
