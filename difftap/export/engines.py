"""Engines: a recipe's graphs opened on a backend, run once, held against torch, and recorded in a manifest.

For ONNX Runtime the engine's file is the graph itself with its shapes fixed when it is opened; backends that compile
will put their own file beside the same manifest.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from difftap.engine import Backend, Cache, Graph, Profile, choose_device, get_backend
from difftap.engine.cache import file_stem
from difftap.errors import ArtefactError, BackendError, InputError
from difftap.export.checkpoints import open_model
from difftap.export.parity import TensorParity, compare, example_feeds
from difftap.manifest import FileRecord, Manifest
from difftap.model import Model
from difftap.pipeline import Runtime, prepare_graph
from difftap.prompts import encode_prompt
from difftap.recipe import Recipe

__all__ = ["EngineRecord", "build_engines", "clean", "list_engines", "verify_engine"]


@dataclass(frozen=True)
class EngineRecord:
    """An engine in the cache: its manifest's path and content."""

    path: Path
    manifest: Manifest

    @property
    def size(self) -> int:
        """Bytes of the files it uses; weights may be shared with other engines."""
        return sum(record.size for record in self.manifest.files.values())


def _identity(cache: Cache, graph: Graph, backend: Backend, device: str, profile: Profile) -> dict[str, Any]:
    return {
        **cache.graph_identity(graph),
        "backend": backend.name,
        "backend_version": backend.version(),
        "device": device,
        "precision": "fp32",
        "size": list(profile.size),
        "ensemble": profile.ensemble,
        "tokens": profile.tokens,
        "batch": profile.batch,
        "machine": platform.machine(),
    }


def build_engines(
    recipe: Recipe, runtime: Runtime, *, revision: str | None = None, random_weights: int | None = None
) -> Iterator[tuple[EngineRecord, dict[str, TensorParity] | None]]:
    """Make a recipe's engines on one backend: yields each one's record and, where torch is installed, its parity.

    Raises:
        DifftapError: as `difftap.pipeline.Pipeline.open` does.
    """
    from difftap.engine import default_cache_folder

    cache = Cache(runtime.cache or default_cache_folder())
    backend = get_backend(runtime.backend)
    device = choose_device(backend, runtime.device)
    model = open_model(recipe.model, cache, revision=revision, random_weights=random_weights)
    model.check_size(recipe.size)
    batch = 1 if device == "cpu" else runtime.batch
    wanted: dict[tuple[str, tuple[str, ...], Profile], None] = {("vae", (), Profile(recipe.size, batch=batch)): None}
    for branch in recipe.branches:
        tokens = len(encode_prompt(model, branch.prompt, cache))
        wanted[("unet", branch.taps, Profile(recipe.size, recipe.ensemble, tokens, batch))] = None
    for component, taps, profile in wanted:
        graph = prepare_graph(cache, backend, model, component, taps)
        parity = _measure(graph, backend, device, profile, runtime.threads)
        folder = cache.model_folder(model)
        report = {} if parity is None else {"parity": {name: one.to_dict() for name, one in parity.items()}}
        files = {}
        if graph.path is not None:
            weights = [graph.path.parent / component / path.name for path in model.weight_files(component)]
            files = {
                str(path): FileRecord(path.stat().st_size, cache.memo.digest(path)) for path in (graph.path, *weights)
            }
        manifest = Manifest("engine", _identity(cache, graph, backend, device, profile), files, report)
        path = folder / f"{file_stem(graph.name)}.{backend.name}-{device}.{profile.label}.engine.json"
        with cache.lock(folder, path.name):
            manifest.save(path)
        yield EngineRecord(path, manifest), parity


def _measure(
    graph: Graph, backend: Backend, device: str, profile: Profile, threads: int | None
) -> dict[str, TensorParity] | None:
    """Run the engine on seeded feeds: it must work and be finite; against torch where torch is installed."""
    feeds = example_feeds(graph, profile)
    with backend.open(graph, profile, device, threads) as engine:
        reference = get_backend("torch")
        if reference.missing() or backend.name == "torch":
            engine.run(feeds)
            return None
        with reference.open(graph, profile, "cpu", threads) as other:
            return compare(engine, other, feeds)


def list_engines(cache: Cache) -> list[EngineRecord]:
    """Every engine in the cache; damaged manifests are left out."""
    records = []
    for path in sorted(cache.folder.glob("*/*.engine.json")):
        try:
            records.append(EngineRecord(path, Manifest.load(path)))
        except ArtefactError:
            continue
    return records


def verify_engine(record: EngineRecord) -> None:
    """Read an engine's files again in full and compare them with its manifest, and its runtime with the one installed.

    Raises:
        ArtefactError: a file is missing or changed, or the engine was made with another version of its runtime.
        BackendError: its backend cannot run here.
    """
    record.manifest.check(Path("/"), {})
    made_from = record.manifest.made_from
    backend = get_backend(str(made_from["backend"]))
    lacking = backend.missing()
    if lacking:
        raise BackendError(lacking)
    if backend.version() != made_from["backend_version"]:
        raise ArtefactError(
            f"engine '{record.path.name}' was made with {backend.name} {made_from['backend_version']}, installed is "
            f"{backend.version()}; build it again"
        )


def clean(cache: Cache, model: Model | None = None) -> int:
    """Remove a model's graphs, engines and linked weights from the cache, or all models'; gives the bytes freed.

    Raises:
        InputError: the cache folder holds something that difftap did not write there.
    """
    import shutil

    folders = [cache.model_folder(model)] if model else [p for p in cache.folder.glob("*") if _is_ours(p)]
    freed = 0
    for folder in folders:
        if folder.is_dir():
            if not _is_ours(folder):
                raise InputError(f"'{folder}' does not look like a model's cache; remove it by hand")
            freed += sum(p.stat().st_size for p in folder.rglob("*") if p.is_file() and p.stat().st_nlink == 1)
            shutil.rmtree(folder)
    return freed


def _is_ours(folder: Path) -> bool:
    name = folder.name
    return folder.is_dir() and len(name) == 16 and all(c in "0123456789abcdef" for c in name)
