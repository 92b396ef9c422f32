"""Exporting the networks of conditional prompts, so that matching with such prompts needs no torch.

There are three small graphs, exported in the same way as the large ones: the conditional head (beside the prompt file,
which holds its weights), the model's text encoder, and a DINOv2 network (both in the cache, referring to their own
weight files).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from difftap.artifacts.cache import Cache, Making
from difftap.artifacts.tensors import TensorLocation
from difftap.backbones.checkpoint import Checkpoint
from difftap.backbones.weights import load_transformer, transformer_weights
from difftap.engine.backend import Graph, Profile, TensorSpec
from difftap.engine.graphfiles import GRAPH_VERSION, model_folder
from difftap.engine.registry import get_backend
from difftap.errors import ArtifactError, BackendError, ModelError, first_line, require
from difftap.export.graphs import MAX_RELATIVE
from difftap.export.parity import TensorParity

if TYPE_CHECKING:
    import torch

    from difftap.engine.torch_prompts import ConditionalHead

__all__ = [
    "dino_facts",
    "dino_folder",
    "dino_graph",
    "export_heads",
    "head_graph",
    "image_network",
    "numpy_tokens",
    "text_graph",
    "weights_of",
]


def _write(
    graph: Graph,
    module: torch.nn.Module,
    weights: Mapping[str, TensorLocation],
    scratch: Path,
    files: Sequence[Path],
) -> Making:
    """Trace a module to a scratch file beside its weights, and compare it with torch on seeded inputs.

    Raises:
        BackendError: it differs from torch by more than `MAX_RELATIVE`.
    """
    torch = require("torch", "export", f"exporting the {graph.component}")
    for name in ("onnx", "onnxscript"):
        require(name, "export", f"exporting the {graph.component}")
    from difftap.export.trace import trace

    proto = trace(graph, module, weights, scratch.parent)
    rng = np.random.default_rng(0)
    # A batch of two different entries, so that a mixed-up batch axis shows as an error.
    feeds = {
        spec.name: rng.standard_normal([2 if axis == "B" else int(axis) for axis in spec.shape]).astype(np.float32)
        for spec in graph.inputs
    }
    (output,) = graph.outputs
    with torch.inference_mode():
        wanted = module(*(torch.from_numpy(feeds[spec.name]) for spec in graph.inputs)).numpy()
    scratch.write_bytes(proto.SerializeToString(deterministic=True))
    with get_backend("ort").open(replace(graph, path=scratch), Profile((8, 8), batch=2), "cpu", None) as engine:
        got = engine.run(feeds)[output.name]
    parity = TensorParity.of(np.moveaxis(got, -1, 1), np.moveaxis(wanted, -1, 1))  # cosines are over axis 1
    if parity.relative > MAX_RELATIVE:
        raise BackendError(
            f"the exported {graph.component} differs from torch by a relative error of {parity.relative:.2e}; "
            f"allowed: {MAX_RELATIVE:.0e}"
        )
    return Making(files, report={"parity": {output.name: parity.to_dict()}})


def weights_of(folder: Path, cache: Cache) -> tuple[tuple[Path, ...], str]:
    """List the safetensors files of a transformers folder, and hash them together with its configuration.

    Raises:
        ModelError: it has no such files, or no configuration.
    """
    files = transformer_weights(folder)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        # Entries about the program that wrote the file change no number.
        plain = {key: value for key, value in config.items() if not key.startswith("_") and "version" not in key}
        parts = [cache.memo.digest(path) for path in files]
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(f"'{folder}' cannot be read ({error}); get the network again") from error
    return files, hashlib.sha256("\n".join([*parts, json.dumps(plain, sort_keys=True)]).encode()).hexdigest()


def _plain_names(located: Mapping[str, TensorLocation], *prefixes: str) -> dict[str, TensorLocation]:
    """Remove prefixes from tensors' names, so that they are the names within the exported module."""
    found = {}
    for name, place in located.items():
        for prefix in prefixes:
            name = name.removeprefix(prefix)
        found[name] = place
    return found


def text_graph(model: Checkpoint, cache: Cache, length: int, width: int) -> Graph:
    """Export the text encoder of a model: a graph from a sequence of vectors ``(B, L, W)`` to ``(B, L, D)``.

    Raises:
        MissingExtraError: it has to be exported, and torch or transformers is not installed.
        ModelError: it cannot be loaded.
    """
    shape = ("B", length, width)
    out = ("B", length, model.prompt_width)
    graph = Graph(
        model, "text", takes=(TensorSpec("sequence", "float32", shape),), gives=(TensorSpec("hidden", "float32", out),)
    )
    files, digest = weights_of(model.folder / "text_encoder", cache)
    path = model_folder(cache, model) / f"text.{length}.onnx"
    identity = {"graph_version": GRAPH_VERSION, "component": "text", "weights": digest, "length": length}

    def make(scratch: Path) -> Making:
        require("torch", "export", f"exporting the text encoder of model '{model.name}'")
        transformers = require("transformers", "export", f"exporting the text encoder of model '{model.name}'")
        from difftap.artifacts.tensors import locate_tensors
        from difftap.engine.torch_prompts import TextEncoder

        folder = model.folder / "text_encoder"
        # Eager attention: a fused one cannot be traced.
        text = load_transformer(transformers.CLIPTextModel, folder, f"the text encoder of '{model.folder}'", "eager")
        placed = cache.place_files(files, scratch.parent / "text_encoder")
        located = _plain_names(locate_tensors(placed), "text_model.")
        return _write(graph, TextEncoder(text), located, scratch, placed)

    return replace(graph, path=cache.get_or_make("graph", path, identity, make))


def dino_folder(name: str) -> Path:
    """Find the folder of a DINOv2 network: a local folder, or the download of a hub id.

    Raises:
        ModelError: there is no such folder, or it cannot be downloaded.
    """
    if Path(name).is_dir():
        return Path(name)
    if name.count("/") != 1 or name.startswith("."):
        raise ModelError(
            f"no folder '{name}' for image tokens; allowed: 'own', a DINOv2 folder, or a hub id owner/name"
        )
    hub = require("huggingface_hub", "export", f"downloading '{name}'")
    try:
        return Path(hub.snapshot_download(name, allow_patterns=["config.json", "*.safetensors"]))
    except Exception as error:  # the hub's, its HTTP client's and the system's errors share no base class
        raise ModelError(f"'{name}' cannot be downloaded: {first_line(error)}; give a local folder") from error


def dino_facts(name: str, cache: Cache) -> tuple[str, int, int]:
    """Read the properties of a DINOv2 network that image tokens depend on.

    Returns:
        hash of its weights and configuration; side of its input in pixels, for 16 x 16 patches; channels of its tokens.

    Raises:
        ModelError: it cannot be found or downloaded, or is a network of another kind.
    """
    folder = dino_folder(name)
    _, digest = weights_of(folder, cache)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config.get("model_type") != "dinov2":
        raise ModelError(f"'{name}' holds a {config.get('model_type')!r} network; allowed for image tokens: dinov2")
    try:
        return digest, 16 * int(config.get("patch_size", 14)), int(config.get("hidden_size", 768))
    except (TypeError, ValueError) as error:
        raise ModelError(f"'{folder / 'config.json'}' makes no sense ({error}); get the network again") from error


def image_network(folder: Path) -> torch.nn.Module:
    """Load a DINOv2 network as a frozen module from images ``(B, 3, S, S)`` to tokens ``(B, N, C)``.

    Raises:
        ModelError: it cannot be loaded.
    """
    require("torch", "export", "image tokens")
    transformers = require("transformers", "export", "image tokens")
    from difftap.engine.torch_prompts import ImageTokens

    return ImageTokens(load_transformer(transformers.Dinov2Model, folder, f"the network in '{folder}'", "eager")).eval()


def dino_graph(
    model: Checkpoint, cache: Cache, network: str, weights: str, side: int, count: int, channels: int
) -> Graph:
    """Export a DINOv2 network: a graph from images ``(B, 3, S, S)`` to tokens ``(B, N, C)``.

    Raises:
        MissingExtraError: it has to be exported, and torch or transformers is not installed.
        ModelError: it has to be exported, and the network is missing or has other weights.
    """
    graph = Graph(
        model,
        "tokens",
        takes=(TensorSpec("image", "float32", ("B", 3, side, side)),),
        gives=(TensorSpec("tokens", "float32", ("B", count, channels)),),
    )
    path = cache.folder / f"dinov2-{weights[:16]}" / f"tokens.{side}.onnx"
    identity = {"graph_version": GRAPH_VERSION, "component": "tokens", "weights": weights, "side": side}

    def make(scratch: Path) -> Making:
        from difftap.artifacts.tensors import locate_tensors

        folder = dino_folder(network)
        files, digest = weights_of(folder, cache)
        if digest != weights:
            raise ModelError(
                f"'{network}' holds other weights than the prompts were learned with ({digest[:16]}, not "
                f"{weights[:16]}); get that network again"
            )
        placed = cache.place_files(files, scratch.parent / "weights")
        located = _plain_names(locate_tensors(placed), "dinov2.")
        return _write(graph, image_network(folder), located, scratch, placed)

    return replace(graph, path=cache.get_or_make("graph", path, identity, make))


def head_graph(
    model: Checkpoint,
    cache: Cache,
    prompt_file: Path,
    sha256: str,
    branch: int,
    count: int,
    channels: int,
    length: int,
    width: int,
) -> Graph:
    """Find the exported conditional head of a branch, beside the prompt file.

    Raises:
        ArtifactError: it is missing, stale, or not whole.
    """
    graph = _head(model, branch, count, channels, length, width)
    path = prompt_file.with_name(f"{graph.component}.onnx")
    if cache.find(path.with_suffix(".json"), _head_identity(graph, sha256)) is None:
        raise ArtifactError(f"'{path}' is missing; run the same 'difftap tune' again: it exports it anew")
    return replace(graph, path=path)


def _head_identity(graph: Graph, sha256: str) -> dict[str, object]:
    return {"graph_version": GRAPH_VERSION, "component": graph.component, "prompts": sha256}


def _head(model: Checkpoint, branch: int, count: int, channels: int, length: int, width: int) -> Graph:
    shape = ("B", count, channels)
    return Graph(
        model,
        f"cpm.{branch}",
        takes=(TensorSpec("source", "float32", shape), TensorSpec("target", "float32", shape)),
        gives=(TensorSpec("sequence", "float32", ("B", length, width)),),
    )


def export_heads(
    model: Checkpoint, cache: Cache, prompt_file: Path, sha256: str, heads: Sequence[ConditionalHead]
) -> list[Graph]:
    """Export every branch's conditional head, beside the prompt file that holds its weights.

    Raises:
        BackendError: a head differs from torch by more than `MAX_RELATIVE`.
    """
    from difftap.artifacts.tensors import locate_tensors
    from difftap.engine.torch_prompts import HeadPart

    located = locate_tensors([prompt_file])
    made = []
    for branch, head in enumerate(heads):
        own = {name: place for name, place in located.items() if name.startswith(f"{branch}.head.")}
        names = _plain_names(own, f"{branch}.")  # "head.channels.weight"
        width = head.shared.shape[1]
        length = len(head.start) + len(head.shared) + len(head.positions) + len(head.end)
        graph = _head(model, branch, head.tokens.in_features, head.channels.in_features // 2, length, width)
        path = prompt_file.with_name(f"{graph.component}.onnx")
        write = partial(_write, graph, HeadPart(head.cpu().eval()), names, files=[prompt_file])
        cache.make("graph", path, _head_identity(graph, sha256), write)
        made.append(replace(graph, path=path))
    return made


def numpy_tokens(network: torch.nn.Module, device: str) -> Callable[[NDArray[np.float32]], NDArray[np.float32]]:
    """Wrap a token network as a function on arrays: from one image ``(3, S, S)`` to its tokens ``(N, C)``."""
    import torch

    network.to(device)

    def tokens(image: NDArray[np.float32]) -> NDArray[np.float32]:
        with torch.inference_mode():
            found: NDArray[np.float32] = network(torch.from_numpy(image[None]).to(device))[0].float().cpu().numpy()
        return found

    return tokens
