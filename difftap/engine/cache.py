"""Where graphs and engines are kept, and what makes them trusted.

The cache folder holds one folder a model, named by its weights: hard links to (or copies of) the checkpoint's own
weight files, the graphs that refer to them, and a manifest beside each graph and engine. So two graphs of one model,
cut at different taps, share one copy of the weights. A checkpoint folder may also carry its graphs itself, as the
embedded model does; those are looked for first.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from platformdirs import user_cache_path

from difftap.artifacts.digests import DigestMemo
from difftap.artifacts.files import atomic_path, output_errors
from difftap.artifacts.manifest import FileRecord, Manifest
from difftap.backbones.checkpoint import COMPONENTS, Checkpoint
from difftap.engine.backend import Graph
from difftap.errors import ArtefactError

__all__ = ["GRAPH_VERSION", "Cache", "default_cache_folder"]

_LOG = logging.getLogger("difftap")

GRAPH_VERSION = 1
"""Raised whenever the export step would write other graphs from the same checkpoint."""


def default_cache_folder() -> Path:
    """``$DIFFTAP_CACHE`` if it is set, else the user's cache folder."""
    chosen = os.environ.get("DIFFTAP_CACHE")
    return Path(chosen) if chosen else Path(user_cache_path("difftap"))


def file_stem(name: str) -> str:
    """A graph's name as a file name: long ones (many taps, deep module paths) are cut and end in a hash."""
    return name if len(name) <= 80 else f"{name[:60]}~{hashlib.sha256(name.encode()).hexdigest()[:12]}"


@dataclass(frozen=True)
class Cache:
    """The artefacts of all models on this machine.

    Attributes:
        folder: the cache folder; made when first written to.
    """

    folder: Path

    @property
    def memo(self) -> DigestMemo:
        """The memory of large files' hashes."""
        return DigestMemo(self.folder / "digests.json")

    def model_key(self, model: Checkpoint) -> str:
        """16 hex digits for a model's weights and configuration."""
        hashes = "\n".join(model.weights_hash(component, self.memo) for component in COMPONENTS)
        return hashlib.sha256(hashes.encode()).hexdigest()[:16]

    def model_folder(self, model: Checkpoint) -> Path:
        """Where a model's artefacts are kept."""
        return self.folder / self.model_key(model)

    @contextlib.contextmanager
    def lock(self, folder: Path, name: str) -> Iterator[None]:
        """Let one process at a time build an artefact; the others wait, then find it done."""
        with output_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(str(folder / f".{name}.lock"))
            try:
                lock.acquire(timeout=2)
            except Timeout:
                _LOG.warning("another process is making '%s'; waiting for it", folder / name)
                lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def graph_identity(self, graph: Graph) -> dict[str, Any]:
        """What a graph's manifest must say for the graph to be the one meant."""
        return {
            "graph_version": GRAPH_VERSION,
            "component": graph.component,
            "taps": list(graph.taps),
            "precision": graph.precision,
            "weights": graph.model.weights_hash(graph.component, self.memo),
        }

    def shipped_graph(self, model: Checkpoint, component: str, taps: tuple[str, ...] = ()) -> Graph | None:
        """The trusted graph that lies beside a checkpoint's own files, if it brought one.

        Raises:
            ArtefactError: there is one, but it cannot be trusted; it is not ours to overwrite.
        """
        try:
            return self._graph_in(model.folder, Graph(model, component, taps))
        except ArtefactError as error:
            raise ArtefactError(f"{error}; this file came with the model: install or download it again") from error

    def cached_graph(
        self, model: Checkpoint, component: str, taps: tuple[str, ...] = (), precision: str = "fp32"
    ) -> Graph | None:
        """The trusted graph, or half-precision variant of it, in the cache; None if it was never made.

        Raises:
            ArtefactError: there is one, but it is stale, foreign, truncated or tampered with.
        """
        return self._graph_in(self.model_folder(model), Graph(model, component, taps, precision=precision))

    def _graph_in(self, folder: Path, graph: Graph) -> Graph | None:
        stem = file_stem(graph.name)
        manifest = folder / f"{stem}.json"
        if not manifest.is_file():
            return None
        Manifest.load(manifest).check(folder, self.graph_identity(graph), self.memo.digest)
        return replace(graph, path=folder / f"{stem}.onnx")

    def place_weights(self, model: Checkpoint, component: str, folder: Path) -> tuple[Path, ...]:
        """Put a component's weight files under ``folder``, by hard link where the file system allows it, else a copy.

        Runtimes refuse symbolic links that leave the graph's folder, so a link has to be a hard one.
        """
        return self.place_files(model.weight_files(component), folder / component)

    def place_files(self, sources: Sequence[Path], folder: Path) -> tuple[Path, ...]:
        """Put files into a folder of artefacts, as `place_weights` does."""
        placed = []
        for source in sources:
            target = folder / source.name
            placed.append(target)
            with output_errors(target):
                target.parent.mkdir(parents=True, exist_ok=True)
                if target.exists() and self.memo.digest(target) == self.memo.digest(source):
                    continue
                with atomic_path(target) as scratch:
                    try:
                        os.link(source.resolve(), scratch)  # a hub snapshot is made of symbolic links
                    except OSError:
                        shutil.copyfile(source, scratch)
        return tuple(placed)

    def save_graph_manifest(
        self, graph: Graph, weights: tuple[Path, ...], extra: Mapping[str, Any], report: Mapping[str, Any]
    ) -> None:
        """Write the manifest that makes a graph trusted; the last step of an export."""
        if graph.path is None:
            raise ArtefactError(f"{graph.name} has no file to write a manifest for")
        folder = graph.path.parent
        files = {}
        for path in (graph.path, *weights):
            files[path.relative_to(folder).as_posix()] = FileRecord(path.stat().st_size, self.memo.digest(path))
        made_from = {**self.graph_identity(graph), **extra}
        Manifest("graph", made_from, files, report).save(folder / f"{file_stem(graph.name)}.json")
