"""Graphs in the cache and beside checkpoints: one copy of the weights, and which graph is meant."""

import json
import shutil

import pytest

import difftap.export.graphs as graphs
from difftap.artifacts.cache import Cache, Making
from difftap.backbones.checkpoint import Checkpoint
from difftap.engine.graphfiles import cached_graph, file_stem, model_folder, model_key, place_weights
from difftap.errors import ArtifactError
from difftap.export import ensure_graph
from tests.harness import MINI_TAPS


@pytest.fixture
def cache(mini, mini_cache, tmp_path):
    """A copy of the exported graphs, to be damaged."""
    shutil.copytree(mini_cache.folder, tmp_path / "copied")
    return Cache(tmp_path / "copied")


@pytest.fixture
def exports(monkeypatch):
    """Stands in for the slow export; holds what it was asked for."""
    asked = []

    def fake(cache, graph, scratch, *, placed=False):
        asked.append((graph.component, graph.taps))
        scratch.write_bytes(b"new")
        return Making(place_weights(cache, graph.model, graph.component, scratch.parent))

    monkeypatch.setattr(graphs, "_write", fake)
    return asked


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.unlink()  # a hard link would damage the checkpoint as well
    path.write_bytes(data)


def edit(path, **changes):
    data = json.loads(path.read_text())
    data["made_from"].update(changes)
    path.write_text(json.dumps(data))


def test_what_is_there_is_used(cache, mini, exports):
    model = Checkpoint.load(mini)
    for component, taps in (("vae", ()), ("unet", MINI_TAPS)):
        graph = ensure_graph(cache, model, component, taps)
        assert graph.path.parent == model_folder(cache, model)
        assert graph == cached_graph(cache, model, component, taps)
    assert not exports


DAMAGE = {
    "graph tampered": lambda f: flip(f / "vae.onnx"),
    "weights tampered": lambda f: flip(f / "vae" / "diffusion_pytorch_model.safetensors"),
    "manifest of another version": lambda f: edit(f / "vae.json", graph_version=0),
    "manifest of other weights": lambda f: edit(f / "vae.json", weights="0" * 64),
    "manifest of another graph": lambda f: shutil.copy(f / f"unet.{'+'.join(MINI_TAPS)}.json", f / "vae.json"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_graphs_in_the_cache_are_made_again(cache, mini, exports, damage):
    model = Checkpoint.load(mini)
    DAMAGE[damage](model_folder(cache, model))
    with pytest.raises(ArtifactError):
        cached_graph(cache, model, "vae")
    assert ensure_graph(cache, model, "vae").path.read_bytes() == b"new"
    assert exports == [("vae", ())]


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_graphs_beside_the_checkpoint_are_refused(mini, cache, exports, tmp_path, damage):
    folder = tmp_path / "shipped"
    shutil.copytree(mini, folder)
    for path in model_folder(cache, Checkpoint.load(mini)).iterdir():
        if path.is_file() and not path.name.startswith("."):
            shutil.copy(path, folder)
    empty = Cache(tmp_path / "empty")
    assert ensure_graph(empty, Checkpoint.load(folder), "vae").path == folder / "vae.onnx"
    DAMAGE[damage](folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(ArtifactError, match="came with the model: install or download it again"):
        ensure_graph(empty, Checkpoint.load(folder), "vae")
    assert not exports
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_other_weights_have_another_folder(mini, mini_cache, tmp_path):
    shutil.copytree(mini, tmp_path / "other")
    flip(tmp_path / "other" / "vae" / "diffusion_pytorch_model.safetensors")
    model, other = Checkpoint.load(mini), Checkpoint.load(tmp_path / "other")
    assert model_key(mini_cache, model) != model_key(mini_cache, other)
    assert cached_graph(mini_cache, other, "vae") is None


def test_two_graphs_of_one_model_share_one_copy_of_the_weights(mini_cache, mini):
    folder = model_folder(mini_cache, Checkpoint.load(mini))
    weights = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.safetensors"))
    assert weights == ["unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors"]


def test_long_names_are_cut_and_stay_apart():
    taps = [f"up_blocks.1.attentions.{i}.transformer_blocks.0.attn1" for i in range(12)]
    one, two = "unet." + "+".join(taps), "unet." + "+".join(taps[:-1])
    assert len(file_stem(one)) <= 80
    assert file_stem(one) != file_stem(two)
    assert file_stem("unet.up1") == "unet.up1"
    assert file_stem("x" * 80) == "x" * 80
    assert file_stem("x" * 81) == "x" * 60 + "~4d1f7bb876c6"
