"""Arithmetic counted from the graph: against counts by hand, and against the published figures at full size."""

import json

import numpy as np
import pytest

from difftap.backbones.checkpoint import Checkpoint
from difftap.bench.flops import axes_of, count_graph, count_macs
from difftap.engine import Graph, Profile
from difftap.engine.graphfiles import cached_graph
from difftap.errors import ArtifactError, MissingExtraError
from difftap.recipe import ModelReference
from tests.harness import MINI_TAPS

onnx = pytest.importorskip("onnx")


def hand_count(module, *inputs) -> int:
    """Multiply-adds of a torch module, by hooks on its layers and by counting what attention multiplies."""
    torch = pytest.importorskip("torch")
    total = 0

    def seen(layer, taken, given):
        nonlocal total
        if isinstance(layer, torch.nn.Conv2d):
            total += given.numel() * layer.weight[0].numel()
        elif isinstance(layer, torch.nn.Linear):
            total += given.numel() * layer.in_features

    plain = torch.nn.functional.scaled_dot_product_attention

    def attention(query, key, value, *rest, **more):
        nonlocal total
        total += query.numel() * key.shape[-2] + query.shape[:-1].numel() * key.shape[-2] * value.shape[-1]
        return plain(query, key, value, *rest, **more)

    for layer in module.modules():
        layer.register_forward_hook(seen)
    torch.nn.functional.scaled_dot_product_attention = attention
    try:
        with torch.inference_mode():
            module(*inputs)
    finally:
        torch.nn.functional.scaled_dot_product_attention = plain
    return total


@pytest.mark.parametrize("component", ["vae", "unet"])
@pytest.mark.parametrize("size", [(24, 16), (40, 32)])
def test_the_graph_s_count_is_that_of_torch_s_layers(mini, mini_cache, component, size):
    torch = pytest.importorskip("torch")
    from difftap.engine.noise import example_feeds
    from difftap.engine.torch_model import build

    model = Checkpoint.load(mini)
    taps = () if component == "vae" else MINI_TAPS
    graph = cached_graph(mini_cache, model, component, taps)
    profile = Profile(size, ensemble=1 if component == "vae" else 3, tokens=5)
    feeds = [torch.from_numpy(array) for array in example_feeds(graph, profile).values()]
    wanted = hand_count(build(model, component, taps, stop_early=True), *feeds)
    assert count_graph(graph, profile) == wanted


def test_members_multiply_the_unet(pocket):
    folder = pocket.folder
    axes = {"B": 1, "h": 16, "w": 8, "T": 4}
    one, three = (count_macs(folder / "unet.up2.onnx", {**axes, "E": count}) for count in (1, 3))
    assert three == 3 * one > 0


@pytest.mark.parametrize(("size", "vae", "unet"), [(512, 558, 219.8), (768, 1305, 562.9)], ids=["512", "768"])
@pytest.mark.slow
def test_stable_diffusion_costs_what_the_papers_tables_say(size, vae, unet, tmp_path_factory):
    import os
    from pathlib import Path

    from difftap.backbones.find import open_model
    from difftap.engine import Cache
    from difftap.export.graphs import ensure_graph

    cache = Cache(Path(os.environ.get("DIFFTAP_SLOW_CACHE", tmp_path_factory.getbasetemp() / "full")))
    model = open_model(ModelReference("sd15", random_weights=0), cache)
    encoder, network = ensure_graph(cache, model, "vae"), ensure_graph(cache, model, "unet", ("up1",))
    assert count_graph(encoder, Profile((size, size))) / 1e9 == pytest.approx(vae, rel=1e-3)
    assert count_graph(network, Profile((size, size), tokens=77)) / 1e9 == pytest.approx(unet, rel=1e-3)


def test_each_kind_of_node(tmp_path):
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT

    def count(nodes, inputs, output, constants=()):
        graph = helper.make_graph(
            nodes,
            "one",
            [helper.make_tensor_value_info(name, kind, shape) for name, shape in inputs.items()],
            [helper.make_tensor_value_info(output, kind, None)],
            [onnx.numpy_helper.from_array(value, name) for name, value in constants],
        )
        path = tmp_path / "one.onnx"
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]), path)
        return count_macs(path, {"N": 3})

    weight = np.zeros((6, 2, 3, 3), np.float32)
    conv = helper.make_node("Conv", ["x", "w"], ["y"], group=2, pads=[1, 1, 1, 1])
    assert count([conv], {"x": ["N", 4, 5, 7]}, "y", [("w", weight)]) == 3 * 6 * 5 * 7 * 2 * 9
    matmul = helper.make_node("MatMul", ["a", "b"], ["y"])
    assert count([matmul], {"a": [2, "N", 4], "b": [4, 5]}, "y") == 2 * 3 * 4 * 5
    gemm = helper.make_node("Gemm", ["a", "b"], ["y"], transA=1)
    assert count([gemm], {"a": [4, "N"], "b": [4, 5]}, "y") == 3 * 4 * 5
    relu = helper.make_node("Relu", ["a"], ["y"])
    assert count([relu], {"a": [4, "N"]}, "y") == 0
    # A reshape steered by computed integers, as exporters write them.
    shape = [
        helper.make_node("Shape", ["a"], ["s"], end=1),
        helper.make_node("Concat", ["s", "rest"], ["t"], axis=0),
        helper.make_node("Reshape", ["a", "t"], ["r"]),
        helper.make_node("MatMul", ["r", "b"], ["y"]),
    ]
    rest = np.array([2, 5], np.int64)
    assert count(shape, {"a": ["N", 10], "b": [5, 7]}, "y", [("rest", rest)]) == 3 * 2 * 5 * 7
    with pytest.raises(ArtifactError, match="axis 'M' is free; known: N"):
        count([relu], {"a": ["M", 4]}, "y")


def test_a_graph_without_a_file_or_onnx(pocket, monkeypatch):
    with pytest.raises(ArtifactError, match="export it first"):
        count_graph(Graph(pocket, "vae"), Profile((64, 64)))
    monkeypatch.setitem(__import__("sys").modules, "onnx", None)
    with pytest.raises(MissingExtraError, match=r"difftap\[bench\]"):
        count_macs(pocket.folder / "vae.onnx", {})


def test_axes_are_the_letters_of_the_graph(pocket):
    axes = axes_of(Graph(pocket, "unet", ("up2",)), Profile((64, 32), ensemble=3, tokens=7, batch=5))
    assert axes == {"B": 1, "E": 3, "T": 7, "W": 64, "H": 32, "w": 8, "h": 4}
    assert json.dumps(axes)
