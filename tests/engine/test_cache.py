"""The cache: one copy of the weights, and no file trusted that its manifest does not vouch for."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import difftap.export.graphs as graphs
from difftap.artifacts.manifest import file_digest
from difftap.backbones.checkpoint import Checkpoint
from difftap.engine import Cache, Graph, default_cache_folder
from difftap.engine.cache import file_stem
from difftap.errors import ArtefactError, OutputError
from difftap.export import ensure_graph
from tests.conftest import MINI_TAPS


@pytest.fixture
def cache(mini, mini_cache, tmp_path):
    """A copy of the exported graphs, to be damaged."""
    shutil.copytree(mini_cache.folder, tmp_path / "copied")
    return Cache(tmp_path / "copied")


@pytest.fixture
def exports(monkeypatch):
    """Stands in for the slow export; holds what it was asked for."""
    asked = []

    def fake(cache, model, component, taps=(), folder=None):
        asked.append((component, taps))
        return Graph(model, component, taps, Path("new")), {}

    monkeypatch.setattr(graphs, "export_graph", fake)
    return asked


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.unlink()  # a hard link would damage the checkpoint as well
    path.write_bytes(data)


def test_what_is_there_is_used(cache, mini, exports):
    model = Checkpoint.load(mini)
    for component, taps in (("vae", ()), ("unet", MINI_TAPS)):
        graph = ensure_graph(cache, model, component, taps)
        assert graph.path.parent == cache.model_folder(model)
    assert not exports


DAMAGE = {
    "graph cut short": lambda f: (f / "vae.onnx").write_bytes((f / "vae.onnx").read_bytes()[:-100]),
    "graph tampered": lambda f: flip(f / "vae.onnx"),
    "graph missing": lambda f: (f / "vae.onnx").unlink(),
    "graph empty": lambda f: (f / "vae.onnx").write_bytes(b""),
    "weights tampered": lambda f: flip(f / "vae" / "diffusion_pytorch_model.safetensors"),
    "weights missing": lambda f: (f / "vae" / "diffusion_pytorch_model.safetensors").unlink(),
    "manifest damaged": lambda f: (f / "vae.json").write_text("{"),
    "manifest of another version": lambda f: edit(f / "vae.json", graph_version=0),
    "manifest of other weights": lambda f: edit(f / "vae.json", weights="0" * 64),
    "manifest of another graph": lambda f: shutil.copy(f / f"unet.{'+'.join(MINI_TAPS)}.json", f / "vae.json"),
}


def edit(path, **changes):
    data = json.loads(path.read_text())
    data["made_from"].update(changes)
    path.write_text(json.dumps(data))


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_graphs_in_the_cache_are_made_again(cache, mini, exports, damage):
    model = Checkpoint.load(mini)
    DAMAGE[damage](cache.model_folder(model))
    with pytest.raises(ArtefactError):
        cache.cached_graph(model, "vae")
    assert ensure_graph(cache, model, "vae").path == Path("new")
    assert exports == [("vae", ())]


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_graphs_beside_the_checkpoint_are_refused(mini, cache, exports, tmp_path, damage):
    folder = tmp_path / "shipped"
    shutil.copytree(mini, folder)
    for path in cache.model_folder(Checkpoint.load(mini)).iterdir():
        if path.is_file() and not path.name.startswith("."):
            shutil.copy(path, folder)
    empty = Cache(tmp_path / "empty")
    assert ensure_graph(empty, Checkpoint.load(folder), "vae").path == folder / "vae.onnx"
    if damage == "weights missing":
        return  # then it is no checkpoint at all (test_model.py)
    DAMAGE[damage](folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(ArtefactError, match="came with the model: install or download it again"):
        ensure_graph(empty, Checkpoint.load(folder), "vae")
    assert not exports
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_graph_without_a_manifest_was_never_finished(cache, mini, exports):
    model = Checkpoint.load(mini)
    folder = cache.model_folder(model)
    (folder / "vae.json").unlink()
    (folder / ".vae.json.123.abc.part").write_text("{")
    assert cache.cached_graph(model, "vae") is None
    ensure_graph(cache, model, "vae")
    assert exports == [("vae", ())]


def test_other_weights_have_another_folder(mini, mini_cache, tmp_path, exports):
    shutil.copytree(mini, tmp_path / "other")
    flip(tmp_path / "other" / "vae" / "diffusion_pytorch_model.safetensors")
    model, other = Checkpoint.load(mini), Checkpoint.load(tmp_path / "other")
    assert mini_cache.model_key(model) != mini_cache.model_key(other)
    assert mini_cache.cached_graph(other, "vae") is None


def test_weights_are_hard_links_where_that_works_and_copies_elsewhere(mini, tmp_path, monkeypatch):
    model, cache = Checkpoint.load(mini), Cache(tmp_path / "cache")
    (source,) = model.weight_files("unet")
    (linked,) = cache.place_weights(model, "unet", tmp_path / "linked")
    assert source.samefile(linked)
    assert not linked.is_symlink()

    def refuse(*_):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    (copied,) = cache.place_weights(model, "unet", tmp_path / "copied")
    assert not source.samefile(copied)
    assert file_digest(copied) == file_digest(source)
    stamp = copied.stat().st_mtime_ns
    cache.place_weights(model, "unet", tmp_path / "copied")
    assert copied.stat().st_mtime_ns == stamp, "copied again although it was there"
    copied.write_bytes(b"damaged")
    cache.place_weights(model, "unet", tmp_path / "copied")
    assert file_digest(copied) == file_digest(source)
    assert [path.name for path in copied.parent.iterdir()] == [source.name]


def test_two_graphs_of_one_model_share_one_copy_of_the_weights(mini_cache, mini):
    folder = mini_cache.model_folder(Checkpoint.load(mini))
    weights = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.safetensors"))
    assert weights == ["unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors"]


def test_the_folder_is_the_environments(monkeypatch, tmp_path):
    monkeypatch.setenv("DIFFTAP_CACHE", str(tmp_path / "mine"))
    assert default_cache_folder() == tmp_path / "mine"
    monkeypatch.delenv("DIFFTAP_CACHE")
    assert default_cache_folder().name == "difftap"


def test_an_unwritable_cache_is_one_clear_line(mini):
    model = Checkpoint.load(mini)
    with (
        pytest.raises(OutputError, match="cannot write"),
        Cache(Path("/dev/null/cache")).lock(Path("/dev/null/cache"), "x"),
    ):
        pass
    with pytest.raises(OutputError, match="cannot write"):
        Cache(Path("/dev/null/cache")).place_weights(model, "vae", Path("/dev/null/cache"))


def test_long_names_are_cut_and_stay_apart():
    taps = [f"up_blocks.1.attentions.{i}.transformer_blocks.0.attn1" for i in range(12)]
    one, two = "unet." + "+".join(taps), "unet." + "+".join(taps[:-1])
    assert len(file_stem(one)) <= 80
    assert file_stem(one) != file_stem(two)
    assert file_stem("unet.up1") == "unet.up1"


EXPORT = """
import logging, sys
from pathlib import Path
from difftap.engine import Cache
from difftap.export import ensure_graph
from difftap.backbones.checkpoint import Checkpoint
logging.basicConfig(level=logging.INFO, format="%(message)s")
print(ensure_graph(Cache(Path(sys.argv[2])), Checkpoint.load(Path(sys.argv[1])), "vae").path)
"""


def test_two_processes_that_export_the_same_graph_both_end_well(mini, tmp_path):
    command = [sys.executable, "-c", EXPORT, mini, tmp_path / "shared"]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    done = [process.communicate() for process in running]
    assert [process.returncode for process in running] == [0, 0], done
    assert done[0][0] == done[1][0]
    assert sum(err.count("exporting the vae") for _, err in done) == 1, "both exported it"
    model = Checkpoint.load(mini)
    graph = Cache(tmp_path / "shared").cached_graph(model, "vae")
    assert graph is not None
    assert not list((tmp_path / "shared").rglob("*.part"))


def test_weights_behind_symbolic_links_are_placed_as_files(mini, cache, tmp_path):
    """A hub's snapshot folder is made of relative symbolic links."""
    blobs = tmp_path / "blobs"
    shutil.copytree(mini, blobs)
    for path in blobs.rglob("*"):
        if path.is_file():
            link = tmp_path / "snapshot" / path.relative_to(blobs)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(path, link.parent))
    (placed,) = cache.place_weights(Checkpoint.load(tmp_path / "snapshot"), "unet", tmp_path / "home")
    assert placed.is_file()
    assert not placed.is_symlink()
    assert placed.read_bytes() == (mini / "unet" / placed.name).read_bytes()
