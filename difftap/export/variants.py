"""Variants of exported graphs (half precision, fused attention), kept in the cache beside the plain float32 ones.

A variant's weights are a copy in the half type: one file per component and type, shared by all variants whatever their
taps. Casts in the graph would save that file. But then every runtime would read twice the bytes and fold gigabytes at
each opening, and builders that strip and refit weights would find no weights of the type that they compute in. If the
checkpoint itself has the half type, the graph points into its own files.
"""

from __future__ import annotations

import json
import logging
import os
import struct
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from difftap.artifacts.cache import Cache, Making
from difftap.artifacts.tensors import TensorLocation, locate_tensors
from difftap.engine.backend import Graph
from difftap.engine.graphfiles import file_stem, graph_identity, model_folder, place_weights
from difftap.errors import ArtifactError, require
from difftap.export.fuse import fuse_attention
from difftap.export.precision import narrow, to_half

__all__ = ["HALF_VERSION", "ensure_variant"]

_LOG = logging.getLogger("difftap")
HALF_VERSION = 1
"""Increase it whenever another variant would be made from the same graph: old ones are then renewed."""
_KINDS = {"fp16": "F16", "bf16": "BF16"}


def ensure_variant(cache: Cache, graph: Graph, precision: str, attention: str = "softmax") -> Graph:
    """Give a variant of a trusted float32 graph: the one in the cache, or else a new one.

    Args:
        cache: where variants are kept; the graph itself may lie beside its checkpoint.
        graph: the float32 graph, with its file.
        precision: ``fp16``, ``bf16``, or ``fp32`` (with fused attention only).
        attention: the part of attention that stays in float32, as for `difftap.export.precision.to_half`; or ``fused``
            to replace attention by one operator of onnxruntime's (`difftap.export.fuse`).

    Raises:
        InputError: there is no such precision.
        MissingExtraError: onnx is not installed.
        OutputError: the cache cannot be written.
    """
    name = precision if attention == "softmax" else f"{precision}-{attention}"
    variant = Graph(graph.model, graph.component, graph.taps, precision=name)
    path = model_folder(cache, graph.model) / f"{file_stem(variant.name)}.onnx"
    identity = {**graph_identity(cache, variant), "half_version": HALF_VERSION, "attention": attention}
    cache.get_or_make("graph", path, identity, partial(_write, cache, graph, precision, attention))
    return replace(variant, path=path)


def _write(cache: Cache, graph: Graph, precision: str, attention: str, scratch: Path) -> Making:
    """Write a variant of a graph to a scratch file in the model's folder, with its weights beside it."""
    onnx = require("onnx", "export", f"making the {precision} variant of a graph")
    if graph.path is None:
        raise ArtifactError(f"{graph.name} has no file to make a variant of")
    folder = scratch.parent
    files = place_weights(cache, graph.model, graph.component, folder)
    proto, wanted = onnx.load(graph.path, load_external_data=False), dict[str, str]()
    report: dict[str, int] = {}
    if attention == "fused":
        proto, count, of = fuse_attention(proto)
        report = {"fused_attentions": count, "attentions": of}
        _LOG.debug("%s: %d of %d attentions fused", graph.name, count, of)
    if precision != "fp32":
        proto, wanted = to_half(proto, precision, "half" if attention == "fused" else attention)
    places = locate_tensors(files)
    # A graph names its weights as the network does, which is not always as the file does. The place is unique.
    by_offset = {(_relative(place.path, folder), place.offset): name for name, place in places.items()}
    if precision == "fp32" or all(place.dtype == _KINDS[precision] for place in places.values()):
        halves, used = places, files  # no copy is needed
    else:
        half = _ensure_weights(cache, graph, files, places, precision)
        halves, used = locate_tensors([half]), (*files, half)
    for tensor in proto.graph.initializer:
        if tensor.name in wanted:
            entries = {entry.key: entry for entry in tensor.external_data}
            place = halves[by_offset[entries["location"].value, int(entries["offset"].value)]]
            for key, value in (
                ("location", _relative(place.path, folder)),
                ("offset", place.offset),
                ("length", place.length),
            ):
                entries[key].value = str(value)
    scratch.write_bytes(proto.SerializeToString(deterministic=True))
    return Making(used, report=report)


def _relative(path: Path, folder: Path) -> str:
    return Path(os.path.relpath(path, folder)).as_posix()


def _ensure_weights(
    cache: Cache, graph: Graph, files: tuple[Path, ...], places: Mapping[str, TensorLocation], precision: str
) -> Path:
    """Give the file with one component's weights in the half type; write it the first time."""
    path = files[0].parent / f"{graph.component}.{precision}.safetensors"
    manifest = path.parent.parent / f"{graph.component}.{precision}.weights.json"
    made_from = {
        "half_version": HALF_VERSION,
        "precision": precision,
        "weights": graph.model.weights_hash(graph.component, cache.memo),
    }

    def make(scratch: Path) -> Making:
        _LOG.info("writing the %s weights of model '%s' in %s", graph.component, graph.model.name, precision)
        _write_half(scratch, places, precision)
        return Making()

    return cache.get_or_make("weights", path, made_from, make, manifest=manifest)


def _write_half(path: Path, places: Mapping[str, TensorLocation], precision: str) -> None:
    """Write a safetensors file tensor by tensor, so that only one of them is in memory.

    `difftap.artifacts.tensors` describes the format.
    """
    header: dict[str, object] = {}
    end = 0
    floats = {name: place for name, place in places.items() if place.dtype in ("F32", "F16", "BF16")}
    for name, place in floats.items():
        length = 2 * int(np.prod(place.shape, dtype=np.int64))
        header[name] = {"dtype": _KINDS[precision], "shape": list(place.shape), "data_offsets": [end, end + length]}
        end += length
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that tensors begin at multiples of 8 bytes, as the format wants
    with open(path, "wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for place in floats.values():
            out.write(narrow(_read(place), precision).tobytes())


def _read(place: TensorLocation) -> NDArray[np.float32]:
    """Read one tensor's values as float32, flat ``(numel,)``."""
    with open(place.path, "rb") as handle:
        handle.seek(place.offset)
        raw = handle.read(place.length)
    if place.dtype == "BF16":
        return (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32)  # the upper half of float32's bits
    return np.frombuffer(raw, {"F32": "<f4", "F16": "<f2"}[place.dtype]).astype(np.float32, copy=False)
