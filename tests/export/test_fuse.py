"""Attention as one operator: every attention is recognised, the numbers stay, and what differs is left alone."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from difftap.artifacts.manifest import Manifest
from difftap.engine import Cache, Graph, Profile, get_backend
from difftap.engine.graphfiles import shipped_graph
from difftap.engine.noise import example_feeds
from difftap.export.fuse import fuse_attention
from difftap.export.parity import TensorParity
from difftap.export.variants import ensure_variant

onnx = pytest.importorskip("onnx")
PROFILE = Profile((96, 64), ensemble=2, tokens=3, batch=2)


@pytest.fixture(scope="module")
def unet(pocket, tmp_path_factory) -> Graph:
    graph = shipped_graph(Cache(tmp_path_factory.mktemp("none")), pocket, "unet", ("down2.attn0",))
    assert graph is not None
    return graph


@pytest.fixture
def proto(unet):
    return onnx.load(unet.path, load_external_data=False)


def counts(model) -> Counter:
    return Counter(node.op_type for node in model.graph.node)


def outputs(graph: Graph, feeds):
    with get_backend("ort").open(graph, PROFILE, "cpu", 1) as engine:
        return engine.run(feeds)


def test_every_attention_is_fused_and_nothing_of_it_is_left(proto):
    before = counts(proto)
    fused, count, of = fuse_attention(proto)
    assert counts(proto) == before
    assert count == of == before["Softmax"] > 0
    after = counts(fused)
    assert after["MultiHeadAttention"] == count
    assert after["Softmax"] == 0
    assert after["MatMul"] == before["MatMul"] - 2 * count
    widths = {tuple(a.i for a in n.attribute) for n in fused.graph.node if n.op_type == "MultiHeadAttention"}
    assert all(heads > 1 for (heads,) in widths)


@pytest.mark.parametrize(("precision", "limit"), [("fp32", 1e-5), ("fp16", 3e-3)])
def test_the_fused_graph_gives_the_same_numbers(unet, precision, limit, tmp_path):
    cache = Cache(tmp_path)
    variant = ensure_variant(cache, unet, precision, "fused")
    feeds = example_feeds(unet, PROFILE)
    for name, want in outputs(unet, feeds).items():
        assert TensorParity.of(outputs(variant, feeds)[name], want).relative < limit
    report = Manifest.load(variant.path.with_suffix(".json")).report
    assert report["fused_attentions"] == report["attentions"] > 0
    assert ensure_variant(cache, unet, precision, "fused") == variant


def test_attention_of_another_shape_is_left_as_it_is(proto):
    total = counts(proto)["Softmax"]
    scales = {node.input[1] for node in proto.graph.node if node.op_type == "Mul"}
    for tensor in proto.graph.initializer:  # a scale that is no fourth root of 1/d
        if tensor.name in scales and tensor.data_type == onnx.TensorProto.FLOAT and list(tensor.dims) == [1]:
            tensor.raw_data = np.float32(0.5123).tobytes()
    fused, count, of = fuse_attention(proto)
    assert (count, of) == (0, total)
    assert counts(fused) == counts(proto)
    assert not any(entry.domain == "com.microsoft" for entry in fused.opset_import)
