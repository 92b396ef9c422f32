"""Where version 0.1.0 kept what it made, and what its manifests said: what lies there is used, not made again."""

import json
import platform
import shutil
from pathlib import Path

import numpy as np
import pytest

from difftap.artifacts.cache import Cache
from difftap.backbones.checkpoint import Checkpoint, pocket_folder
from difftap.backbones.find import open_model
from difftap.engine import Profile
from difftap.engine.builds import ensure_built
from difftap.engine.graph import Graph
from difftap.export import ensure_graph
from difftap.export.conditional import dino_facts, dino_graph, text_graph
from difftap.export.variants import ensure_variant
from difftap.prompts import encode_prompt
from difftap.recipe import ModelReference
from tests.engine.test_builds import Compiler

KEPT = json.loads((Path(__file__).parent / "cache.json").read_text())
"""Path in the cache -> what the manifest beside it says; None where 0.1.0 wrote no manifest."""


@pytest.fixture
def model(tmp_path):
    """The embedded model, with a text encoder in place of its table and without the graphs that it brings."""
    folder = tmp_path / "model"
    shutil.copytree(pocket_folder(), folder, ignore=shutil.ignore_patterns("prompt_table", "*.onnx", "[uv]*.json"))
    for part, names in (
        ("text_encoder", ("config.json", "model.safetensors")),
        ("tokenizer", ("vocab.json", "merges.txt")),
    ):
        (folder / part).mkdir()
        for name in names:
            (folder / part / name).write_text(f'{{"model_type": "{part}"}}')
    return Checkpoint.load(folder)


def dino(tmp_path, model, cache):
    folder = tmp_path / "dino"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "dinov2"}')
    (folder / "model.safetensors").write_text("weights")
    weights, side, channels = dino_facts(str(folder), cache)
    return dino_graph(model, cache, str(folder), weights, side, 256, channels).path


def graph(model):
    return Graph(model, "vae")


MADE = {
    "checkpoints/sd15-random-3": lambda t, m, c: open_model(ModelReference("sd15", random_weights=3), c).folder,
    "d23fba6622c51bdc/text.77.onnx": lambda t, m, c: text_graph(m, c, 77, 12).path,
    "d23fba6622c51bdc/vae.fp16.onnx": lambda t, m, c: ensure_variant(c, graph(m), "fp16").path,
    "d23fba6622c51bdc/vae.fp32-fused.onnx": lambda t, m, c: ensure_variant(c, graph(m), "fp32", "fused").path,
    "d23fba6622c51bdc/vae.onnx": lambda t, m, c: ensure_graph(c, m, "vae").path,
    "d23fba6622c51bdc/vae.compiler-cpu.64x64.e1.t1.b1.fp32": lambda t, m, c: ensure_built(
        c, graph(m), Compiler(), Profile((64, 64)), "cpu"
    ),
    "dinov2-08364eda0908324b/tokens.224.onnx": dino,
    "prompts/f862f677e9737a5c9efd1c18614e641a.npy": lambda t, m, c: encode_prompt(m, "a cat", c),
}


@pytest.mark.parametrize("name", KEPT)
def test_what_0_1_0_made_is_used(name, model, tmp_path):
    """Stand-ins lie where 0.1.0's artifacts lay; making one anew would need torch, and would replace it."""
    cache, wanted = Cache(tmp_path / "kept"), KEPT[name]
    path = cache.folder / name
    folder = name.startswith("checkpoints")
    path.parent.mkdir(parents=True)
    if folder:
        shutil.copytree(model.folder, path)
    elif "compiler" in name:
        path.mkdir()
        (path / "plan").write_bytes(b"kept")
    else:
        np.save(path.with_suffix(".npy"), np.ones((77, model.prompt_width), np.float32))
        path.with_suffix(".npy").rename(path)
    if wanted is not None:
        if "compiler" in name:
            wanted = {**wanted, "machine": platform.machine()}
        manifest = path.with_name(f"{path.name}.engine.json") if path.is_dir() else path.with_suffix(".json")
        files = [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]
        cache.record("kept", manifest, wanted, files, {})
    before = {p: p.read_bytes() for p in path.parent.rglob("*") if p.is_file()}
    found = MADE[name](tmp_path, model, cache)
    assert (found == 1).all() if isinstance(found, np.ndarray) else found == path
    assert {p: p.read_bytes() for p in before} == before


def test_everything_made_goes_the_one_way(model, tmp_path, monkeypatch):
    """Each asks `Cache.get_or_make` for the path and the identity that are kept here, and for nothing else."""
    asked = {}

    def get_or_make(self, kind, path, identity, make, **options):
        asked[path.relative_to(self.folder).as_posix()] = dict(identity)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.parent.name == "checkpoints":
            shutil.copytree(model.folder, path)
        elif path.suffix == ".npy":
            np.save(path, np.ones((77, model.prompt_width), np.float32))
        return path

    monkeypatch.setattr(Cache, "get_or_make", get_or_make)
    cache = Cache(tmp_path / "kept")
    for make in MADE.values():
        make(tmp_path, model, cache)
    assert asked.pop("checkpoints/sd15-random-3")["seed"] == 3
    asked["d23fba6622c51bdc/vae.compiler-cpu.64x64.e1.t1.b1.fp32"].pop("machine")
    assert asked == {name: wanted for name, wanted in KEPT.items() if wanted is not None}
