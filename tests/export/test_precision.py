"""Half-precision variants of graphs: as close as their type allows, typed through and through, refused on overflow."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from difftap.artifacts.tensors import locate_tensors
from difftap.backbones.checkpoint import Checkpoint
from difftap.engine import Cache, Graph, Profile, get_backend
from difftap.engine.graphfiles import cached_graph, model_folder, place_weights, shipped_graph
from difftap.engine.noise import example_feeds
from difftap.errors import InputError, NonFiniteError, OutputError
from difftap.export.parity import TensorParity
from difftap.export.precision import ATTENTIONS, HALVES, narrow, to_half
from difftap.export.variants import ensure_variant
from tests.harness import MINI_TAPS

onnx = pytest.importorskip("onnx")
PROFILE = Profile((32, 16), ensemble=2, tokens=3, batch=2)


def opened(graph: Graph):
    return get_backend("ort").open(graph, PROFILE, "cpu", 1)


def outputs(graph: Graph):
    with opened(graph) as engine:
        return engine.run(example_feeds(graph, PROFILE))


@pytest.fixture(params=["vae", "unet"])
def exported(request, mini, mini_cache) -> Graph:
    graph = cached_graph(mini_cache, Checkpoint.load(mini), request.param, MINI_TAPS if request.param == "unet" else ())
    assert graph is not None
    return graph


@settings(deadline=None)  # the first call imports torch
@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1))
def test_bf16_rounds_as_torch_does(values):
    torch = pytest.importorskip("torch")
    array = np.array(values, np.float32)
    want = torch.from_numpy(array).to(torch.bfloat16).view(torch.uint16).numpy()
    assert (narrow(array, "bf16") == want).all()


def test_not_a_number_stays_one_in_bf16():
    bits = narrow(np.array([np.nan, -np.nan], np.float32), "bf16").astype(np.uint32) << 16
    assert np.isnan(bits.view(np.float32)).all()


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_fp16_agrees_with_fp32(exported, attention, tmp_path):
    variant = ensure_variant(Cache(tmp_path), exported, "fp16", attention)
    for name, want in outputs(exported).items():
        parity = TensorParity.of(outputs(variant)[name], want)
        assert 1e-6 < parity.relative < 3e-3, name  # 2^-11 a rounding; no error at all would mean no fp16
        assert parity.cosine_min > 0.99999, name


@pytest.mark.parametrize("kind", HALVES)
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_every_node_is_typed_as_its_operator_allows_and_the_sums_stay_float(exported, kind, attention):
    proto = onnx.load(exported.path, load_external_data=False)
    before = proto.SerializeToString(deterministic=True)
    half, _ = to_half(proto, kind, attention)
    assert proto.SerializeToString(deterministic=True) == before
    typed = onnx.shape_inference.infer_shapes(half, check_type=True, strict_mode=True)
    kinds = {value.name: value.type.tensor_type.elem_type for value in typed.graph.value_info}
    kinds |= {tensor.name: tensor.data_type for tensor in half.graph.initializer}
    narrow_type = onnx.TensorProto.FLOAT16 if kind == "fp16" else onnx.TensorProto.BFLOAT16
    for node in half.graph.node:
        if node.op_type in ("Conv", "Gemm"):
            assert kinds[node.input[0]] == kinds[node.input[1]] == narrow_type
        elif node.op_type in ("InstanceNormalization", "LayerNormalization"):
            assert kinds[node.input[0]] == onnx.TensorProto.FLOAT
        elif node.op_type == "Softmax":
            assert kinds[node.input[0]] == (narrow_type if attention == "half" else onnx.TensorProto.FLOAT)
    for old, new in zip(
        (*proto.graph.input, *proto.graph.output), (*half.graph.input, *half.graph.output), strict=True
    ):
        assert (old.name, old.type) == (new.name, new.type)


def test_bf16_runs_in_a_runtime_that_takes_it(exported, tmp_path):
    openvino = pytest.importorskip("openvino")
    variant = ensure_variant(Cache(tmp_path), exported, "bf16")
    model = openvino.Core().read_model(variant.path)
    model.reshape(
        {name: list(array.shape) for name, array in example_feeds(exported, PROFILE).items() if _has(model, name)}
    )
    feeds = {name: array for name, array in example_feeds(exported, PROFILE).items() if _has(model, name)}
    got = openvino.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(feeds)
    for name, want in outputs(exported).items():
        parity = TensorParity.of(got[name], want)
        assert 1e-5 < parity.relative < 3e-2, name


def _has(model, name: str) -> bool:
    return name in {value.get_any_name() for value in model.inputs}


def test_variants_share_one_narrower_copy_of_the_weights(mini, mini_cache, tmp_path, caplog):
    cache, model = Cache(tmp_path), Checkpoint.load(mini)
    graph = cached_graph(mini_cache, model, "unet", MINI_TAPS)
    variant = ensure_variant(cache, graph, "fp16")
    home = model_folder(cache, model)
    half = home / "unet" / "unet.fp16.safetensors"
    full = home / "unet" / "diffusion_pytorch_model.safetensors"
    assert 0.4 < half.stat().st_size / full.stat().st_size < 0.6
    assert variant.path.stat().st_size < 1.3 * graph.path.stat().st_size
    written = half.stat().st_mtime_ns
    assert ensure_variant(cache, graph, "fp16") == variant
    ensure_variant(cache, graph, "fp16", "float")
    assert half.stat().st_mtime_ns == written
    data = bytearray(half.read_bytes())
    data[-3] ^= 1
    half.write_bytes(data)  # tampered with: written again, and what pointed into it is made again
    with caplog.at_level(logging.WARNING, "difftap"):
        assert ensure_variant(cache, graph, "fp16") == variant
    assert half.read_bytes() != bytes(data) and "again" in caplog.text
    outputs(variant)


def test_a_checkpoint_in_the_half_type_is_not_copied(pocket, tmp_path):
    cache = Cache(tmp_path)
    graph = shipped_graph(cache, pocket, "vae")
    variant = ensure_variant(cache, graph, "fp16")
    assert [p.name for p in (model_folder(cache, pocket) / "vae").glob("*.safetensors")] == [
        "diffusion_pytorch_model.safetensors"
    ]
    for name, want in outputs(graph).items():
        assert TensorParity.of(outputs(variant)[name], want).relative < 3e-3


def _scaled(source: Path, folder: Path, factors: dict[str, float]) -> Checkpoint:
    """A copy of a checkpoint with some of its UNet's weights multiplied, each where it was in the file."""
    shutil.copytree(source, folder)
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    places = locate_tensors([path])
    data = bytearray(path.read_bytes())
    for part, factor in factors.items():
        chosen = [place for name, place in places.items() if part in name]
        assert chosen
        for place in chosen:
            where = slice(place.offset, place.offset + place.length)
            data[where] = (np.frombuffer(data[where], np.float32) * np.float32(factor)).tobytes()
    path.write_bytes(data)
    return Checkpoint.load(folder)


def _with_weights(graph: Graph, model: Checkpoint, cache: Cache) -> Graph:
    """The same graph over another checkpoint's weights: their places in the file are the same."""
    home = model_folder(cache, model)
    place_weights(cache, model, graph.component, home)
    shutil.copyfile(graph.path, home / graph.path.name)
    return replace(graph, model=model, path=home / graph.path.name)


def test_what_overflows_is_refused(mini, mini_cache, tmp_path):
    graph = cached_graph(mini_cache, Checkpoint.load(mini), "unet", MINI_TAPS)
    cache = Cache(tmp_path / "cache")
    # A normalisation follows the first convolution, so float32 does not mind how large its weights are.
    huge = _with_weights(graph, _scaled(mini, tmp_path / "huge", {"conv_in.weight": 1e6}), cache)
    assert outputs(huge)
    with pytest.raises(NonFiniteError, match=r"of unet\..*fp16 .*not finite; use a precision with more range"):
        outputs(ensure_variant(cache, huge, "fp16"))


def test_scaled_logits_do_not_overflow_where_scaling_after_would_and_float_ones_do_not_at_all():
    """Run in numpy's own fp16: runtimes without fp16 kernels compute in float32 between casts, which would hide it."""
    from onnx import TensorProto, helper
    from onnx.reference import ReferenceEvaluator

    scale = helper.make_tensor("scale", TensorProto.FLOAT, [1], [64**-0.25])
    nodes = [
        helper.make_node("MatMul", ["x", "wq"], ["q"]),
        helper.make_node("MatMul", ["y", "wk"], ["k"]),
        helper.make_node("Mul", ["q", "scale"], ["qs"]),
        helper.make_node("Mul", ["k", "scale"], ["ks"]),
        helper.make_node("MatMul", ["qs", "ks"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["share"], axis=-1),
        helper.make_node("MatMul", ["share", "v"], ["out"]),
    ]
    eye = [helper.make_tensor(n, TensorProto.FLOAT, [s, s], np.eye(s).ravel()) for n, s in (("wq", 64), ("wk", 5))]
    sides = {"x": [3, 64], "y": [64, 5], "v": [5, 7], "out": [3, 7]}
    values = {name: helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in sides.items()}
    # y @ wk: keys come transposed, so their layer multiplies from the right.
    graph = helper.make_graph(nodes, "attention", [values[n] for n in "xyv"], [values["out"]], [scale, *eye])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])

    def run(attention: str, size: float) -> bool:
        half, _ = to_half(proto, "fp16", attention)
        feeds = {n: np.full(sides[n], size if n in "xy" else 1, np.float32) for n in "xyv"}
        with np.errstate(all="ignore"):
            return bool(np.isfinite(ReferenceEvaluator(half).run(None, feeds)[0]).all())

    # 64 products of 60 x 60 are 230400, beyond fp16's 65504; scaled, 28800.
    assert all(run(attention, 60) for attention in ATTENTIONS)
    # 64 products of 200 x 200, scaled, are 320000.
    assert not run("half", 200) and not run("softmax", 200)
    assert run("float", 200)


def test_unknown_kinds_are_refused(exported):
    proto = onnx.load(exported.path, load_external_data=False)
    with pytest.raises(InputError, match="half type is 'fp8'; allowed: fp16, bf16"):
        to_half(proto, "fp8")
    with pytest.raises(InputError, match="attention is 'flash'; allowed: half, softmax, float"):
        to_half(proto, "fp16", "flash")


def test_a_full_disk_leaves_nothing_that_looks_like_a_variant(exported, tmp_path, monkeypatch):
    cache = Cache(tmp_path)

    def full(*_args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("difftap.export.variants._read", full)
    with pytest.raises(OutputError, match="the disk is full"):
        ensure_variant(cache, exported, "fp16")
    found = [p for p in tmp_path.rglob("*") if p.is_file() and "fp16" in p.name and not p.name.endswith(".lock")]
    assert not found
    assert cached_graph(cache, exported.model, exported.component, exported.taps, "fp16") is None


def test_a_variants_manifest_says_what_it_is(exported, tmp_path):
    variant = ensure_variant(Cache(tmp_path), exported, "bf16")
    made_from = json.loads(variant.path.with_suffix(".json").read_text())["made_from"]
    assert (made_from["precision"], made_from["attention"]) == ("bf16", "softmax")
