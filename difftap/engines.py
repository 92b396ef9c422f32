"""Engines: a recipe's graphs opened on a backend, run once, held against torch, and recorded in a manifest.

For ONNX Runtime the engine's file is the graph itself with its shapes fixed when it is opened; backends that compile
will put their own file beside the same manifest.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from difftap.conditioning import checked
from difftap.engine import (
    Cache,
    Profile,
    check_precision,
    choose_device,
    default_cache_folder,
    get_backend,
)
from difftap.engine.builds import ensure_built, save_engine_manifest
from difftap.errors import ArtefactError, BackendError
from difftap.export.checkpoints import open_model
from difftap.export.parity import TensorParity, example_feeds, measure
from difftap.manifest import Manifest, output_errors
from difftap.pipeline import Runtime, available_cores, check_fits, prepare_graph, run_members
from difftap.prompts import PromptBook
from difftap.recipe import Recipe

__all__ = ["Artefact", "build_engines", "clean", "list_artefacts", "verify_artefact"]


@dataclass(frozen=True)
class Artefact:
    """A graph or an engine in the cache: its manifest's path and content."""

    path: Path
    manifest: Manifest

    @property
    def size(self) -> int:
        """Bytes of the files it uses; weights may be shared with other engines."""
        return sum(record.size for record in self.manifest.files.values())

    @property
    def not_run(self) -> str | None:
        """Why an engine was built but not run where it was built; None if it was."""
        return self.manifest.report.get("not_run")


def build_engines(
    recipe: Recipe, runtime: Runtime, *, revision: str | None = None, random_weights: int | None = None
) -> Iterator[tuple[Artefact, dict[str, TensorParity] | None]]:
    """Make a recipe's engines on one backend: yields each one's record and, where torch is installed, its parity.

    Raises:
        DifftapError: as `difftap.pipeline.Pipeline.open` does.
    """
    cache = Cache(runtime.cache or default_cache_folder())
    backend = get_backend(runtime.backend)
    device = choose_device(backend, runtime.device)
    check_precision(backend, device, runtime.precision)
    threads = runtime.threads or available_cores()
    model = open_model(recipe.model, cache, revision=revision, random_weights=random_weights)
    check_fits(recipe, model)
    wanted: dict[tuple[str, tuple[str, ...], Profile], None] = {
        ("vae", (), Profile(recipe.size, batch=runtime.batch, precision=runtime.precision)): None
    }
    members = run_members(backend, device, model, recipe)
    book = PromptBook(model, recipe, cache, checked(recipe, model, cache))
    for branch, embedding in zip(recipe.branches, book.any(), strict=True):
        profile = Profile(recipe.size, members, len(embedding), runtime.batch, runtime.precision)
        wanted[("unet", branch.taps, profile)] = None
    for component, taps, profile in wanted:
        graph = prepare_graph(cache, backend, model, component, taps, profile, device)
        built = ensure_built(cache, graph, backend, profile, device)
        hindrance = backend.cannot_run(device)
        if hindrance:
            path, manifest = save_engine_manifest(cache, graph, backend, profile, device, {"not_run": hindrance})
            yield Artefact(path, manifest), None
            continue
        # What is built is measured as it is; elsewhere the fidelity of one member is that of many, in less memory.
        small = profile if built else replace(profile, ensemble=1, batch=1)
        parity = None
        if backend.name == "torch" or get_backend("torch").missing():
            with backend.open(graph, small, device, threads, built) as engine:
                engine.run(example_feeds(graph, small))  # it must at least work, and be finite
        else:
            parity = measure(graph, small, backend.name, device, threads, built)
        report = {} if parity is None else {"parity": {name: one.to_dict() for name, one in parity.items()}}
        path, manifest = save_engine_manifest(cache, graph, backend, profile, device, report)
        yield Artefact(path, manifest), parity


def list_artefacts(cache: Cache) -> list[Artefact | ArtefactError]:
    """Every graph and engine in the cache, in the order of their names; a damaged manifest gives its error."""
    records: list[Artefact | ArtefactError] = []
    for path in sorted(cache.folder.glob("*/*.json")):
        try:
            records.append(Artefact(path, Manifest.load(path)))
        except ArtefactError as error:
            records.append(error)
    return records


def verify_artefact(artefact: Artefact) -> str | None:
    """Read an artefact's files again in full and compare them with its manifest, and its runtime with the one here.

    Returns:
        Why an engine could not be opened here as well; None if nothing stands against it.

    Raises:
        ArtefactError: a file is missing or changed, or an engine was made with another version of its runtime.
        InputError, BackendError: an engine's backend does not exist, or cannot run here.
    """
    artefact.manifest.check(artefact.path.parent, {})
    if artefact.manifest.kind in ("graph", "weights"):
        return None
    made_from = artefact.manifest.made_from
    backend = get_backend(str(made_from.get("backend")))
    lacking = backend.missing()
    if lacking:
        raise BackendError(lacking)
    if backend.version() != made_from.get("backend_version"):
        raise ArtefactError(
            f"engine '{artefact.path.name}' was made with {backend.name} {made_from.get('backend_version')}, "
            f"installed is {backend.version()}; build it again"
        )
    return backend.cannot_run(str(made_from.get("device")))


def clean(cache: Cache, checkpoints: bool = False) -> tuple[int, int]:
    """Remove every model's graphs, engines and linked weights from the cache.

    Args:
        cache: what to clean.
        checkpoints: remove checkpoints that were built into the cache with random weights too.

    Returns:
        Bytes freed, and bytes of such checkpoints that stay.

    Raises:
        OutputError: something cannot be removed.
    """
    built = cache.folder / "checkpoints"
    # Only folders that bear a model's key are ours to remove.
    folders = [p for p in cache.folder.glob("*") if len(p.name) == 16 and set(p.name) <= set("0123456789abcdef")]
    before = _size(cache.folder)
    for folder in [*folders, *([built] if checkpoints and built.is_dir() else [])]:
        with output_errors(folder):
            shutil.rmtree(folder)
    return before - _size(cache.folder), _size(built)


def _size(folder: Path) -> int:
    """Bytes on disk below a folder; what has several names there counts once."""
    files = {(s.st_dev, s.st_ino): s.st_size for s in (p.stat() for p in folder.rglob("*") if p.is_file())}
    return sum(files.values())
