"""Where graphs lie in the cache, and what makes one the graph that is meant.

The cache holds one folder a model, named by its weights: hard links to (or copies of) the checkpoint's own weight
files, and the graphs that refer to them. So two graphs of one model, cut at different taps, share one copy of the
weights. A checkpoint folder may also carry its graphs itself, as the embedded model does; those are looked for first.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

from difftap.artifacts.cache import Cache
from difftap.backbones.checkpoint import Checkpoint
from difftap.engine.graph import Graph
from difftap.errors import ArtefactError

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
"""Raised whenever the export step would write other graphs from the same checkpoint."""


def file_stem(name: str) -> str:
    """Turn a graph's name into a file name: long ones (many taps, deep module paths) are cut and end in a hash."""
    return name if len(name) <= 80 else f"{name[:60]}~{hashlib.sha256(name.encode()).hexdigest()[:12]}"


def model_key(cache: Cache, model: Checkpoint) -> str:
    """Give 16 hex digits that stand for a model's weights and configuration."""
    hashes = "\n".join(model.weights_hash(component, cache.memo) for component in model.components)
    return hashlib.sha256(hashes.encode()).hexdigest()[:16]


def model_folder(cache: Cache, model: Checkpoint) -> Path:
    """Say where a model's graphs and engines are kept."""
    return cache.folder / model_key(cache, model)


def graph_identity(cache: Cache, graph: Graph) -> dict[str, Any]:
    """Say what a graph's manifest must hold for the graph to be the one meant."""
    return {
        "graph_version": GRAPH_VERSION,
        "component": graph.component,
        "taps": list(graph.taps),
        "precision": graph.precision,
        "weights": graph.model.weights_hash(graph.component, cache.memo),
    }


def shipped_graph(cache: Cache, model: Checkpoint, component: str, taps: tuple[str, ...] = ()) -> Graph | None:
    """Find the trusted graph that lies beside a checkpoint's own files, if it brought one.

    Raises:
        ArtefactError: there is one, but it cannot be trusted; it is not ours to overwrite.
    """
    try:
        return _graph_in(cache, model.folder, Graph(model, component, taps))
    except ArtefactError as error:
        raise ArtefactError(f"{error}; this file came with the model: install or download it again") from error


def cached_graph(
    cache: Cache, model: Checkpoint, component: str, taps: tuple[str, ...] = (), precision: str = "fp32"
) -> Graph | None:
    """Find the trusted graph, or half-precision variant of it, in the cache; None if it was never made.

    Raises:
        ArtefactError: there is one, but it is stale, foreign, truncated or tampered with.
    """
    return _graph_in(cache, model_folder(cache, model), Graph(model, component, taps, precision=precision))


def _graph_in(cache: Cache, folder: Path, graph: Graph) -> Graph | None:
    path = folder / f"{file_stem(graph.name)}.onnx"
    found = cache.find(path.with_suffix(".json"), graph_identity(cache, graph))
    return None if found is None else replace(graph, path=path)


def place_weights(cache: Cache, model: Checkpoint, component: str, folder: Path) -> tuple[Path, ...]:
    """Put a component's weight files where a graph in ``folder`` looks for them."""
    return cache.place_files(model.weight_files(component), folder / component)


def placed_weights(graph: Graph, folder: Path) -> tuple[Path, ...]:
    """Name the weight files that a graph in ``folder`` points into."""
    return tuple(folder / graph.component / path.name for path in graph.model.weight_files(graph.component))
