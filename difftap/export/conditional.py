"""Exporting what conditional prompts need, so that matching with them needs no torch.

Three small graphs, through the same export as the large ones: the conditional head (beside the prompt file, which
holds its weights), the model's text encoder and a DINOv2 network (in the cache, pointing into their own weights).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from difftap.artifacts.files import atomic_path
from difftap.artifacts.manifest import FileRecord, Manifest
from difftap.artifacts.tensors import TensorLocation
from difftap.backbones.checkpoint import Checkpoint
from difftap.engine.backend import Graph, Profile, TensorSpec
from difftap.engine.cache import GRAPH_VERSION, Cache
from difftap.engine.registry import get_backend
from difftap.errors import ArtefactError, BackendError, ModelError, first_line, require
from difftap.export.graphs import MAX_RELATIVE
from difftap.export.parity import TensorParity

if TYPE_CHECKING:
    import torch


__all__ = [
    "PartGraph",
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

_LOG = logging.getLogger("difftap")


@dataclass(frozen=True)
class PartGraph(Graph):
    """A graph with inputs and outputs of its own.

    Attributes:
        takes: its inputs.
        gives: its outputs.
    """

    takes: tuple[TensorSpec, ...] = ()
    gives: tuple[TensorSpec, ...] = ()

    @property
    def name(self) -> str:
        """Its component's name."""
        return self.component

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """What the network is fed."""
        return self.takes

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """What it gives."""
        return self.gives


def _export(
    graph: PartGraph,
    module: torch.nn.Module,
    weights: Mapping[str, TensorLocation],
    path: Path,
    files: Sequence[Path],
    made_from: Mapping[str, Any],
) -> PartGraph:
    """Trace a module to ``path``, hold it against torch on seeded inputs, and write its manifest last.

    Raises:
        BackendError: it differs from torch by more than `MAX_RELATIVE`; nothing is left behind.
    """
    torch = require("torch", "export", f"exporting the {graph.component}")
    for name in ("onnx", "onnxscript"):
        require(name, "export", f"exporting the {graph.component}")
    from difftap.export.trace import trace

    proto = trace(graph, module, weights, path.parent)
    rng = np.random.default_rng(0)
    feeds = {
        spec.name: rng.standard_normal([2 if axis == "B" else int(axis) for axis in spec.shape]).astype(np.float32)
        for spec in graph.inputs
    }
    (output,) = graph.outputs
    with torch.inference_mode():
        wanted = module(*(torch.from_numpy(feeds[spec.name]) for spec in graph.inputs)).numpy()
    with atomic_path(path) as scratch:
        scratch.write_bytes(proto.SerializeToString(deterministic=True))
        trial = _at(graph, scratch)
        with get_backend("ort").open(trial, Profile((8, 8), batch=2), "cpu", None) as engine:
            got = engine.run(feeds)[output.name]
        parity = TensorParity.of(np.moveaxis(got, -1, 1), np.moveaxis(wanted, -1, 1))
        if parity.relative > MAX_RELATIVE:
            raise BackendError(
                f"the exported {graph.component} differs from torch by a relative error of {parity.relative:.2e}; "
                f"allowed: {MAX_RELATIVE:.0e}"
            )
    records = {one.relative_to(path.parent).as_posix(): FileRecord.of(one) for one in (path, *files)}
    Manifest("graph", made_from, records, {"parity": {output.name: parity.to_dict()}}).save(path.with_suffix(".json"))
    return _at(graph, path)


def _at(graph: PartGraph, path: Path) -> PartGraph:
    return PartGraph(graph.model, graph.component, path=path, takes=graph.takes, gives=graph.gives)


def _known(graph: PartGraph, path: Path, made_from: Mapping[str, Any], cache: Cache | None) -> PartGraph | None:
    """The graph at a path if it is there and can be trusted.

    Raises:
        ArtefactError: it is there and cannot.
    """
    manifest = path.with_suffix(".json")
    if not manifest.is_file():
        return None
    checks = (path.parent, made_from, cache.memo.digest) if cache else (path.parent, made_from)
    Manifest.load(manifest).check(*checks)
    return _at(graph, path)


def _ensure(
    graph: PartGraph, path: Path, made_from: Mapping[str, Any], cache: Cache, export: Callable[[], PartGraph]
) -> PartGraph:
    """A trusted graph: the one that is there, else a new export."""
    try:
        known = _known(graph, path, made_from, cache)
        if known is not None:
            return known
    except ArtefactError as error:
        _LOG.warning("%s; exporting it again", error)
    with cache.lock(path.parent, path.stem):
        with contextlib.suppress(ArtefactError):
            known = _known(graph, path, made_from, cache)
            if known is not None:
                return known
        return export()


def weights_of(folder: Path, cache: Cache) -> tuple[tuple[Path, ...], str]:
    """A transformers folder's safetensors files, and a hash over them and its configuration.

    Raises:
        ModelError: there are none, or there is no configuration.
    """
    files = tuple(sorted(folder.glob("*.safetensors")))
    if not files:
        raise ModelError(f"'{folder}' holds no safetensors weights (pickled ones are refused); get the network again")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        plain = {key: value for key, value in config.items() if not key.startswith("_") and "version" not in key}
        parts = [cache.memo.digest(path) for path in files]
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(f"'{folder}' cannot be read ({error}); get the network again") from error
    return files, hashlib.sha256("\n".join([*parts, json.dumps(plain, sort_keys=True)]).encode()).hexdigest()


def _plain_names(located: Mapping[str, TensorLocation], *prefixes: str) -> dict[str, TensorLocation]:
    """Tensors under the names their module has for them."""
    found = {}
    for name, place in located.items():
        for prefix in prefixes:
            name = name.removeprefix(prefix)
        found[name] = place
    return found


def text_graph(model: Checkpoint, cache: Cache, length: int, width: int) -> PartGraph:
    """The text encoder of a model as a graph: a sequence of vectors ``(B, L, W)`` to ``(B, L, D)``.

    Raises:
        MissingExtraError: it has to be exported, and torch or transformers is not installed.
        ModelError: it cannot be loaded.
    """
    shape = ("B", length, width)
    out = ("B", length, int(model.unet["cross_attention_dim"]))
    graph = PartGraph(
        model, "text", takes=(TensorSpec("sequence", "float32", shape),), gives=(TensorSpec("hidden", "float32", out),)
    )
    files, digest = weights_of(model.folder / "text_encoder", cache)
    folder = cache.model_folder(model)
    made_from = {"graph_version": GRAPH_VERSION, "component": "text", "weights": digest, "length": length}

    def export() -> PartGraph:
        torch = require("torch", "export", f"exporting the text encoder of model '{model.name}'")
        transformers = require("transformers", "export", f"exporting the text encoder of model '{model.name}'")
        from difftap.artifacts.tensors import locate_tensors
        from difftap.engine.torch_prompts import TextEncoder

        text = _loaded(transformers.CLIPTextModel, model.folder / "text_encoder", torch)
        placed = cache.place_files(files, folder / "text_encoder")
        located = _plain_names(locate_tensors(placed), "text_model.")
        return _export(graph, TextEncoder(text), located, folder / f"text.{length}.onnx", placed, made_from)

    return _ensure(graph, folder / f"text.{length}.onnx", made_from, cache, export)


def _loaded(kind: Any, folder: Path, torch: Any) -> torch.nn.Module:
    """A transformers network, frozen, in fp32, with plain attention: a fused one cannot be traced."""
    from safetensors import SafetensorError

    try:
        network = kind.from_pretrained(
            str(folder), local_files_only=True, use_safetensors=True, dtype=torch.float32, attn_implementation="eager"
        )
    except (OSError, ValueError, TypeError, RuntimeError, KeyError, SafetensorError) as error:
        raise ModelError(f"the network in '{folder}' cannot be loaded ({first_line(error)})") from error
    frozen: torch.nn.Module = network.eval().requires_grad_(False)
    return frozen


def dino_folder(name: str) -> Path:
    """The folder of a DINOv2 network: given as such, or by a hub id.

    Raises:
        ModelError: it is neither, or cannot be had.
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
    """A DINOv2 network's hash, its input's side for 16 x 16 patches, and its tokens' channels.

    Raises:
        ModelError: it is none, or cannot be had.
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
    """A DINOv2 network as a module from images to tokens, frozen.

    Raises:
        ModelError: it is of another kind, or cannot be loaded.
    """
    torch = require("torch", "export", "image tokens")
    transformers = require("transformers", "export", "image tokens")
    from difftap.engine.torch_prompts import ImageTokens

    return ImageTokens(_loaded(transformers.Dinov2Model, folder, torch)).eval()


def dino_graph(
    model: Checkpoint, cache: Cache, network: str, weights: str, side: int, count: int, channels: int
) -> PartGraph:
    """A DINOv2 network as a graph: images ``(B, 3, S, S)`` to tokens ``(B, N, C)``.

    Raises:
        MissingExtraError: it has to be exported, and torch or transformers is not installed.
        ModelError: it has to be exported, and is not there or is another one.
    """
    graph = PartGraph(
        model,
        "tokens",
        takes=(TensorSpec("image", "float32", ("B", 3, side, side)),),
        gives=(TensorSpec("tokens", "float32", ("B", count, channels)),),
    )
    home = cache.folder / f"dinov2-{weights[:16]}"
    made_from = {"graph_version": GRAPH_VERSION, "component": "tokens", "weights": weights, "side": side}

    def export() -> PartGraph:
        from difftap.artifacts.tensors import locate_tensors

        folder = dino_folder(network)
        files, digest = weights_of(folder, cache)
        if digest != weights:
            raise ModelError(
                f"'{network}' holds other weights than the prompts were learned with ({digest[:16]}, not "
                f"{weights[:16]}); get that network again"
            )
        placed = cache.place_files(files, home / "weights")
        located = _plain_names(locate_tensors(placed), "dinov2.")
        return _export(graph, image_network(folder), located, home / f"tokens.{side}.onnx", placed, made_from)

    return _ensure(graph, home / f"tokens.{side}.onnx", made_from, cache, export)


def head_graph(
    model: Checkpoint, prompt_file: Path, sha256: str, branch: int, count: int, channels: int, length: int, width: int
) -> PartGraph:
    """A branch's conditional head, which lies beside the prompt file.

    Raises:
        ArtefactError: it is missing, stale, or not whole.
    """
    graph = _head(model, branch, count, channels, length, width)
    path = prompt_file.with_name(f"{graph.component}.onnx")
    known = _known(graph, path, {"graph_version": GRAPH_VERSION, "component": graph.component, "prompts": sha256}, None)
    if known is None:
        raise ArtefactError(f"'{path}' is missing; run the same 'difftap tune' again: it exports it anew")
    return known


def _head(model: Checkpoint, branch: int, count: int, channels: int, length: int, width: int) -> PartGraph:
    shape = ("B", count, channels)
    return PartGraph(
        model,
        f"cpm.{branch}",
        takes=(TensorSpec("source", "float32", shape), TensorSpec("target", "float32", shape)),
        gives=(TensorSpec("sequence", "float32", ("B", length, width)),),
    )


def export_heads(
    model: Checkpoint, prompt_file: Path, sha256: str, heads: Sequence[torch.nn.Module]
) -> list[PartGraph]:
    """Export every branch's conditional head beside the prompt file that holds its weights."""
    from difftap.artifacts.tensors import locate_tensors
    from difftap.engine.torch_prompts import HeadPart

    located = locate_tensors([prompt_file])
    made = []
    for branch, head in enumerate(heads):
        own = {name: place for name, place in located.items() if name.startswith(f"{branch}.head.")}
        width = head.shared.shape[1]
        length = len(head.start) + len(head.shared) + len(head.positions) + len(head.end)
        graph = _head(model, branch, head.tokens.in_features, head.channels.in_features // 2, length, width)
        made_from = {"graph_version": GRAPH_VERSION, "component": graph.component, "prompts": sha256}
        names = _plain_names(own, f"{branch}.")  # "head.channels.weight"
        module = HeadPart(head.cpu().eval())
        path = prompt_file.with_name(f"{graph.component}.onnx")
        made.append(_export(graph, module, names, path, [prompt_file], made_from))
    return made


def numpy_tokens(network: torch.nn.Module, device: str) -> Callable[[NDArray[np.float32]], NDArray[np.float32]]:
    """A token network as a function of one image ``(3, S, S)``, giving ``(N, C)``."""
    import torch

    network.to(device)

    def tokens(image: NDArray[np.float32]) -> NDArray[np.float32]:
        with torch.inference_mode():
            found: NDArray[np.float32] = network(torch.from_numpy(image[None]).to(device))[0].float().cpu().numpy()
        return found

    return tokens
