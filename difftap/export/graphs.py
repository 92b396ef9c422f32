"""Exporting a graph: trace it, write it, compare it with torch; only then it is trusted."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import partial
from pathlib import Path

from difftap.artifacts.cache import Cache, Making
from difftap.backbones.checkpoint import Checkpoint
from difftap.engine.backend import Graph, Profile
from difftap.engine.graphfiles import (
    file_stem,
    graph_identity,
    model_folder,
    place_weights,
    placed_weights,
    shipped_graph,
)
from difftap.errors import BackendError, require
from difftap.export.parity import TensorParity, measure

__all__ = ["MAX_RELATIVE", "ensure_graph", "export_graph"]

_LOG = logging.getLogger("difftap")
MAX_RELATIVE = 1e-4
"""Largest relative error of an fp32 graph against torch; an export with a larger one is refused."""


def parity_profile(graph: Graph) -> Profile:
    """Choose the shapes for the parity check: small, not square, with several images and members.

    All lengths differ where they can, so that exchanged axes show as an error.
    """
    step = graph.model.size_step
    high = step * max(2, 128 // step)
    return Profile((high * 3 // 2 // step * step, high), ensemble=2, tokens=7, batch=2)


def check_parity(graph: Graph) -> dict[str, TensorParity]:
    """Compare a graph on onnxruntime's CPU with the torch reference, at the small shapes of `parity_profile`."""
    return measure(graph, parity_profile(graph), "ort", "cpu", None)


def _write(cache: Cache, graph: Graph, scratch: Path, *, placed: bool = False) -> Making:
    """Trace one network to a scratch file beside the folder of its weights, and compare it with torch.

    Args:
        cache: puts the weights there.
        graph: what is exported.
        scratch: the file to write.
        placed: whether the weights are there already.

    Raises:
        MissingExtraError: a package for exporting is not installed.
        BackendError: it differs from torch by more than `MAX_RELATIVE`.
    """
    model, component, home = graph.model, graph.component, scratch.parent
    for module in ("torch", "diffusers", "onnx", "onnxscript"):
        require(module, "export", f"exporting the {component} of model '{model.name}'")
    _LOG.info("exporting the %s of model '%s' (half a minute or more, once)", component, model.name)
    from difftap.artifacts.tensors import locate_tensors
    from difftap.engine.torch_model import build
    from difftap.export.trace import trace

    weights = placed_weights(graph, home) if placed else place_weights(cache, model, component, home)
    proto = trace(graph, build(model, component, graph.taps), locate_tensors(weights), home)
    scratch.write_bytes(proto.SerializeToString(deterministic=True))  # the same export gives the same bytes
    # Compared before there is a manifest, so that a graph with errors is never trusted.
    parity = check_parity(replace(graph, path=scratch))
    worst = max(parity.values(), key=lambda p: p.relative)
    if worst.relative > MAX_RELATIVE:
        raise BackendError(
            f"the exported {graph.name} of model '{model.name}' differs from torch by a relative error of "
            f"{worst.relative:.2e}; allowed: {MAX_RELATIVE:.0e}"
        )
    # Recorded, but not compared later: a newer torch does not make all graphs stale.
    versions = {module: require(module, "export", "exporting").__version__ for module in ("torch", "diffusers", "onnx")}
    report = {"parity": {name: value.to_dict() for name, value in parity.items()}}
    return Making(weights, {"made_with": versions}, report)


def _named(model: Checkpoint, component: str, taps: tuple[str, ...], folder: Path) -> tuple[Graph, Path]:
    """Give a graph and the path of its file in a folder."""
    graph = Graph(model, component, taps)
    path = folder / f"{file_stem(graph.name)}.onnx"
    return replace(graph, path=path), path


def export_graph(
    cache: Cache, model: Checkpoint, component: str, taps: tuple[str, ...] = (), folder: Path | None = None
) -> tuple[Graph, dict[str, TensorParity]]:
    """Export one network of a model, even if it has been exported before.

    Args:
        cache: where graphs are kept.
        model: the checkpoint.
        component: one of the checkpoint's: ``vae`` or ``unet``.
        taps: the outputs; none for the encoder.
        folder: write to this folder instead, which holds the weights already (to ship graphs with a checkpoint).

    Returns:
        the trusted graph, and each output's parity with torch.

    Raises:
        BackendError: the graph differs from torch by more than `MAX_RELATIVE`; no graph is left behind.
    """
    graph, path = _named(model, component, taps, folder or model_folder(cache, model))
    write = partial(_write, cache, graph, placed=folder is not None)
    made = cache.make("graph", path, graph_identity(cache, graph), write)
    return graph, {name: TensorParity(**one) for name, one in made.report["parity"].items()}


def ensure_graph(cache: Cache, model: Checkpoint, component: str, taps: tuple[str, ...] = ()) -> Graph:
    """Give a trusted graph: the checkpoint's own, or the one in the cache, or else a new export.

    A graph in the cache that is stale, cut short or tampered with is exported again, with a warning.

    Raises:
        ArtifactError: the checkpoint's own graph cannot be trusted; it is not overwritten.
        BackendError: as for `export_graph`.
    """
    shipped = shipped_graph(cache, model, component, taps)
    if shipped is not None:
        return shipped
    graph, path = _named(model, component, taps, model_folder(cache, model))
    cache.get_or_make("graph", path, graph_identity(cache, graph), partial(_write, cache, graph))
    return graph
