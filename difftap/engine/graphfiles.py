"""Where graphs lie in the cache, and what identifies them.

The cache has one folder per model, named by the hash of its weights. It holds hard links to (or copies of) the
checkpoint's own weight files, and the graphs, which refer to them. So two graphs of one model, cut at different taps,
share one copy of the weights. A checkpoint folder may also bring its graphs itself, as the embedded model does; these
are looked for first.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

from difftap.artifacts.cache import Cache
from difftap.backbones.checkpoint import Checkpoint
from difftap.engine.graph import Graph
from difftap.errors import ArtifactError

__all__ = [
    "GRAPH_VERSION",
    "cached_graph",
    "file_stem",
    "graph_identity",
    "model_folder",
    "model_key",
    "place_weights",
    "placed_weights",
    "shipped_graph",
]

GRAPH_VERSION = 1
"""Increase it whenever the export step would write other graphs from the same checkpoint: old ones are then renewed."""


def file_stem(name: str) -> str:
    """Turn a graph's name into a file name; a long one (many taps, deep module paths) is cut and ends in a hash."""
    # File systems allow 255 bytes, and profile, endings and the suffix of a scratch file are still to be added.
    return name if len(name) <= 80 else f"{name[:60]}~{hashlib.sha256(name.encode()).hexdigest()[:12]}"


def model_key(cache: Cache, model: Checkpoint) -> str:
    """Give 16 hex digits that identify a model's weights and configuration."""
    hashes = "\n".join(model.weights_hash(component, cache.memo) for component in model.components)
    return hashlib.sha256(hashes.encode()).hexdigest()[:16]


def model_folder(cache: Cache, model: Checkpoint) -> Path:
    """Give the folder of a model's graphs and engines."""
    return cache.folder / model_key(cache, model)


def graph_identity(cache: Cache, graph: Graph) -> dict[str, object]:
    """Give what a graph's file must have been made from."""
    return {
        "graph_version": GRAPH_VERSION,
        "component": graph.component,
        "taps": list(graph.taps),
        "precision": graph.precision,
        "weights": graph.model.weights_hash(graph.component, cache.memo),
    }


def shipped_graph(cache: Cache, model: Checkpoint, component: str, taps: tuple[str, ...] = ()) -> Graph | None:
    """Find the graph that lies beside a checkpoint's own files, if there is one.

    Raises:
        ArtifactError: it cannot be trusted; it belongs to the checkpoint, so it is not made again.
    """
    try:
        return _graph_in(cache, model.folder, Graph(model, component, taps))
    except ArtifactError as error:
        raise ArtifactError(f"{error}; this file came with the model: install or download it again") from error


def cached_graph(
    cache: Cache, model: Checkpoint, component: str, taps: tuple[str, ...] = (), precision: str = "fp32"
) -> Graph | None:
    """Find a graph, or a half-precision variant of one, in the cache; None if it was never made.

    Raises:
        ArtifactError: it is stale, foreign, truncated or tampered with.
    """
    return _graph_in(cache, model_folder(cache, model), Graph(model, component, taps, precision=precision))


def _graph_in(cache: Cache, folder: Path, graph: Graph) -> Graph | None:
    path = folder / f"{file_stem(graph.name)}.onnx"
    found = cache.find(path.with_suffix(".json"), graph_identity(cache, graph))
    return None if found is None else replace(graph, path=path)


def place_weights(cache: Cache, model: Checkpoint, component: str, folder: Path) -> tuple[Path, ...]:
    """Put a component's weight files where a graph in ``folder`` expects them."""
    return cache.place_files(model.weight_files(component), folder / component)


def placed_weights(graph: Graph, folder: Path) -> tuple[Path, ...]:
    """List the weight files that a graph in ``folder`` refers to."""
    return tuple(folder / graph.component / path.name for path in graph.model.weight_files(graph.component))
