"""Exporting a graph: trace, write, hold against torch, and only then make it trusted."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import Any

from difftap.artifacts.files import atomic_path
from difftap.backbones.checkpoint import Checkpoint
from difftap.engine.backend import Graph, Profile
from difftap.engine.cache import Cache, file_stem
from difftap.errors import ArtefactError, BackendError, require
from difftap.export.parity import TensorParity, measure

__all__ = ["MAX_RELATIVE", "ensure_graph", "export_graph"]

_LOG = logging.getLogger("difftap")
MAX_RELATIVE = 1e-4
"""Largest relative error of an fp32 graph against torch; an export beyond it is refused."""


def parity_profile(graph: Graph) -> Profile:
    """The shapes of the parity check: small, not square, several images and members, so that a mixed-up axis shows."""
    step = graph.model.size_step
    high = step * max(2, 128 // step)
    return Profile((high * 3 // 2 // step * step, high), ensemble=2, tokens=7, batch=2)


def check_parity(graph: Graph) -> dict[str, TensorParity]:
    """A graph on onnxruntime's CPU against the torch reference, at the small shapes of `parity_profile`."""
    return measure(graph, parity_profile(graph), "ort", "cpu", None)


def export_graph(
    cache: Cache, model: Checkpoint, component: str, taps: tuple[str, ...] = (), folder: Path | None = None
) -> tuple[Graph, dict[str, TensorParity]]:
    """Export one network of a model.

    Args:
        cache: where graphs are kept.
        model: the checkpoint.
        component: ``vae`` or ``unet``.
        taps: the UNet graph's outputs.
        folder: write here instead, beside weights that already lie here (to ship graphs with a checkpoint).

    Returns:
        The trusted graph, and each output's parity with torch.

    Raises:
        BackendError: the graph differs from torch by more than `MAX_RELATIVE`; nothing is left behind.
    """
    for module in ("torch", "diffusers", "onnx", "onnxscript"):
        require(module, "export", f"exporting the {component} of model '{model.name}'")
    _LOG.info("exporting the %s of model '%s' (half a minute or more, once)", component, model.name)
    from difftap.artifacts.tensors import locate_tensors
    from difftap.engine.torch_model import build
    from difftap.export.trace import trace

    home = folder or cache.model_folder(model)
    if folder is None:
        weights = cache.place_weights(model, component, home)
    else:
        weights = tuple(folder / component / path.name for path in model.weight_files(component))
    path = home / f"{file_stem(Graph(model, component, taps).name)}.onnx"
    graph = Graph(model, component, taps, path)
    proto = trace(graph, build(model, component, taps), locate_tensors(weights), home)
    # The manifest comes last: until it is there, or if the check fails, the graph is not trusted by anyone.
    with atomic_path(path) as scratch:
        scratch.write_bytes(proto.SerializeToString(deterministic=True))
        parity = check_parity(Graph(model, component, taps, scratch))
        worst = max(parity.values(), key=lambda p: p.relative)
        if worst.relative > MAX_RELATIVE:
            raise BackendError(
                f"the exported {graph.name} of model '{model.name}' differs from torch by a relative error of "
                f"{worst.relative:.2e}; allowed: {MAX_RELATIVE:.0e}"
            )
    report: dict[str, Any] = {"parity": {name: value.to_dict() for name, value in parity.items()}}
    made_with = {
        module: require(module, "export", "exporting").__version__ for module in ("torch", "diffusers", "onnx")
    }
    cache.save_graph_manifest(graph, weights, {"made_with": made_with}, report)
    return graph, parity


def ensure_graph(cache: Cache, model: Checkpoint, component: str, taps: tuple[str, ...] = ()) -> Graph:
    """A trusted graph: the one that is there, else a new export.

    A graph in the cache that is stale, cut short or tampered with is exported again, with a warning. One that was
    shipped beside the checkpoint is refused: it is not ours to overwrite.
    """
    shipped = cache.shipped_graph(model, component, taps)
    if shipped is not None:
        return shipped
    name = Graph(model, component, taps).name
    try:
        known = cache.cached_graph(model, component, taps)
        if known is not None:
            return known
    except ArtefactError as error:
        _LOG.warning("%s; exporting it again", error)
    with cache.lock(cache.model_folder(model), file_stem(name)):
        with contextlib.suppress(ArtefactError):
            known = cache.cached_graph(model, component, taps)  # another process may have made it meanwhile
            if known is not None:
                return known
        return export_graph(cache, model, component, taps)[0]
