"""From a model's name to a folder: presets, folders, hub ids, random weights."""

import json
import logging
import shutil
import sys
from types import SimpleNamespace

import pytest
from safetensors.numpy import load_file, save_file

import difftap.backbones.find as checkpoints
from difftap.backbones.checkpoint import Checkpoint, pocket_folder
from difftap.engine import Cache
from difftap.engine.graphfiles import shipped_graph
from difftap.errors import MissingExtraError, ModelError
from difftap.export import open_model
from difftap.recipe import ModelReference
from tests.harness import MINI_SCHEDULE, MINI_UNET, MINI_VAE, write_mini


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path / "cache")


@pytest.fixture
def hub(monkeypatch):
    """Stands in for the hub: gives the embedded model's folder, or raises; holds what it was asked for."""
    asked = []
    fake = SimpleNamespace(fail=None)

    def snapshot_download(name, **options):
        asked.append((name, options))
        if fake.fail:
            raise fake.fail
        return str(pocket_folder())

    fake.snapshot_download = snapshot_download
    fake.asked = asked
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    return fake


def test_the_embedded_model_and_folders_need_no_hub(cache, hub, mini):
    assert open_model(ModelReference("pocket"), cache).folder == pocket_folder()
    assert open_model(ModelReference(str(mini)), cache).folder == mini
    assert not hub.asked


def test_a_folder_of_a_presets_name_comes_first(cache, hub, mini, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sd15").symlink_to(mini)
    assert open_model(ModelReference("sd15"), cache).unet["cross_attention_dim"] == MINI_UNET["cross_attention_dim"]
    assert not hub.asked


@pytest.mark.parametrize("name", ["sd15", "sd21", "someone/a-checkpoint_1.5"])
def test_presets_and_hub_ids_are_downloaded_and_only_what_is_safe(cache, hub, name):
    model = open_model(ModelReference(name, revision="abc"), cache)
    assert model.name == name
    ((asked, options),) = hub.asked
    assert "/" in asked
    assert options["revision"] == "abc"
    assert not [
        pattern
        for pattern in options["allow_patterns"]
        if pattern.endswith((".bin", ".ckpt", ".py", "/*.pt")) or pattern == "*"
    ]
    assert any(
        pattern.startswith("unet/") and pattern.endswith(".safetensors") for pattern in options["allow_patterns"]
    )


def test_a_failed_download_is_one_line_with_a_way_out(cache, hub):
    hub.fail = OSError("401 Client Error\nRepository Not Found\nlots of advice")
    with pytest.raises(
        ModelError, match=r"'a/b' cannot be downloaded: 401 Client Error; give a local folder"
    ) as caught:
        open_model(ModelReference("a/b"), cache)
    assert "\n" not in str(caught.value)
    with pytest.raises(ModelError, match="taken down: use a mirror"):
        open_model(ModelReference("stabilityai/stable-diffusion-2-1"), cache)
    hub.fail = OSError()
    with pytest.raises(ModelError, match="cannot be downloaded"):
        open_model(ModelReference("a/b"), cache)


def test_without_the_hub_package_the_pip_line(cache, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'difftap\[export\]'"):
        open_model(ModelReference("sd15"), cache)


@pytest.mark.parametrize("name", ["nope", "./a", "../a/b", "a/b/c", "/no/such/folder", "a b/c"])
def test_unknown_names_list_what_is_allowed(cache, hub, name):
    with pytest.raises(ModelError):
        open_model(ModelReference(name), cache)
    assert not hub.asked


def test_options_that_do_not_fit_the_model(cache, mini):
    with pytest.raises(ModelError, match="--random-weights builds sd15, sd21 or sdxl; got model 'pocket'"):
        open_model(ModelReference("pocket", random_weights=0), cache)
    with pytest.raises(ModelError, match="--revision goes with a hub id"):
        open_model(ModelReference("pocket", revision="main"), cache)


@pytest.fixture
def tiny_presets(monkeypatch):
    pytest.importorskip("diffusers")
    config = {
        "unet": {"_class_name": "UNet2DConditionModel", **MINI_UNET},
        "vae": {"_class_name": "AutoencoderKL", **MINI_VAE},
        "scheduler": MINI_SCHEDULE,
    }  # fmt: skip
    monkeypatch.setattr(checkpoints, "_preset", lambda name: config)


def test_random_weights_are_built_once_and_are_the_seeds(cache, tiny_presets, tmp_path):
    model = open_model(ModelReference("sd15", random_weights=3), cache)
    assert model.name == "sd15 (random weights, seed 3)"
    assert json.loads((model.folder / "model_index.json").read_text()) == {checkpoints.RANDOM_MARK: 3}
    stamp = (model.folder / "unet").stat().st_mtime_ns
    assert open_model(ModelReference("sd15", random_weights=3), cache).folder == model.folder
    assert (model.folder / "unet").stat().st_mtime_ns == stamp
    other, again = (
        open_model(ModelReference("sd15", random_weights=4), cache),
        open_model(ModelReference("sd15", random_weights=3), Cache(tmp_path / "second")),
    )
    assert again.weights_hash("unet", cache.memo) == model.weights_hash("unet", cache.memo)
    assert other.weights_hash("unet", cache.memo) != model.weights_hash("unet", cache.memo)


def test_building_that_fails_leaves_no_checkpoint(cache, tiny_presets, monkeypatch):
    import diffusers

    def fail(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(diffusers.AutoencoderKL, "save_pretrained", fail)
    with pytest.raises(KeyboardInterrupt):
        open_model(ModelReference("sd21", random_weights=0), cache)
    assert [path for path in (cache.folder / "checkpoints").iterdir() if path.suffix != ".lock"] == []


def test_the_published_configurations_are_what_diffusers_reads():
    diffusers = pytest.importorskip("diffusers")
    for name, width, heads in (("sd15", 768, 8), ("sd21", 1024, [5, 10, 20, 20])):
        config = checkpoints._preset(name)
        assert config["unet"]["cross_attention_dim"] == width
        assert config["unet"]["attention_head_dim"] == heads
        assert config["unet"]["block_out_channels"] == [320, 640, 1280, 1280]
        known = set(diffusers.UNet2DConditionModel.__init__.__wrapped__.__code__.co_varnames)
        assert not {key for key in config["unet"] if not key.startswith("_")} - known
        assert diffusers.DDIMScheduler.from_config(config["scheduler"]).config.num_train_timesteps == 1000


def test_another_unets_weights_in_a_base_model(cache, mini, tmp_path):
    """As CleanDIFT publishes its own: one safetensors file with diffusers' names."""
    other = write_mini(tmp_path / "other", 7)
    file = tmp_path / "clean_unet.safetensors"
    shutil.copy(other / "unet" / "diffusion_pytorch_model.safetensors", file)
    model = open_model(ModelReference(f"{mini}+{file}"), cache)
    base = Checkpoint.load(mini)
    assert model.weights_hash("vae", cache.memo) == base.weights_hash("vae", cache.memo)
    assert model.weights_hash("unet", cache.memo) == Checkpoint.load(other).weights_hash("unet", cache.memo)
    assert open_model(ModelReference(f"{mini}+{file}"), cache).folder == model.folder
    assert not list(cache.folder.rglob("*.part"))


def test_a_base_model_may_be_built_with_random_weights(cache, tiny_presets, mini):
    file = mini / "unet" / "diffusion_pytorch_model.safetensors"
    model = open_model(ModelReference(f"sd21+{file}", random_weights=1), cache)
    assert model.weights_hash("unet", cache.memo) == Checkpoint.load(mini).weights_hash("unet", cache.memo)


def test_weights_that_do_not_fit_the_base_are_refused(cache, mini, tmp_path):
    with pytest.raises(ModelError, match="no UNet weights at"):
        open_model(ModelReference(f"{mini}+{tmp_path / 'none.safetensors'}"), cache)
    (tmp_path / "damaged.safetensors").write_bytes(b"abc")
    with pytest.raises(ModelError, match="not a whole safetensors file"):
        open_model(ModelReference(f"{mini}+{tmp_path / 'damaged.safetensors'}"), cache)
    with pytest.raises(ModelError, match=r"does not fit the UNet of .*: \d+ tensors differ, such as"):
        open_model(ModelReference(f"{mini}+{mini / 'vae' / 'diffusion_pytorch_model.safetensors'}"), cache)


def test_graphs_that_the_base_brought_are_linked_but_for_the_unets(cache, tmp_path):
    """Those are of other weights, and would be refused as damaged."""
    weights = pocket_folder() / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    file = tmp_path / "other.safetensors"
    save_file({name: value + 1 for name, value in tensors.items()}, file)
    model = open_model(ModelReference(f"pocket+{file}"), cache)
    assert shipped_graph(cache, model, "vae") is not None
    assert shipped_graph(cache, model, "unet", ("up1",)) is None


def test_a_base_that_lost_a_part_is_linked_anew(cache, mini, tmp_path, caplog):
    base = tmp_path / "base"
    shutil.copytree(mini, base)
    (base / "tokenizer").mkdir()
    file = mini / "unet" / "diffusion_pytorch_model.safetensors"
    folder = open_model(ModelReference(f"{base}+{file}"), cache).folder
    (base / "tokenizer").rmdir()
    with caplog.at_level(logging.WARNING, "difftap"):
        assert open_model(ModelReference(f"{base}+{file}"), cache).folder == folder
    assert "tokenizer' is a link to a file that does not exist; making it again" in caplog.text
    assert not (folder / "tokenizer").is_symlink()
