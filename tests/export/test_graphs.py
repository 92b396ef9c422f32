"""The exported graph: only what feeds the taps, no copy of the weights, free axes, and the numbers of torch."""

import json
from pathlib import Path

import numpy as np
import pytest

import difftap.export.trace as tracing
from difftap.artifacts.tensors import locate_tensors
from difftap.backbones.checkpoint import Checkpoint
from difftap.backbones.sd_unet import depth
from difftap.engine import Cache, Graph, Profile, get_backend
from difftap.engine.graphfiles import cached_graph
from difftap.engine.noise import example_feeds
from difftap.errors import BackendError, ModelError
from difftap.export import export_graph, open_model
from difftap.export.parity import TensorParity
from difftap.recipe import ModelReference
from tests.harness import MINI_TAPS, compare, write_mini

onnx = pytest.importorskip("onnx")


@pytest.fixture(scope="module")
def vae(mini, mini_cache) -> Graph:
    return cached_graph(mini_cache, Checkpoint.load(mini), "vae")


@pytest.fixture(scope="module")
def up1(mini, mini_cache) -> Graph:
    return cached_graph(mini_cache, Checkpoint.load(mini), "unet", MINI_TAPS)


@pytest.fixture(scope="module")
def attention(tmp_path_factory) -> Graph:
    """A graph cut after one attention layer, of a half-precision checkpoint whose weights lie in several files."""
    folder = write_mini(tmp_path_factory.mktemp("half"), 1, half=True, shard="80KB")
    model = Checkpoint.load(folder)
    assert len(model.weight_files("unet")) > 1
    graph, parity = export_graph(Cache(tmp_path_factory.mktemp("half-cache")), model, "unet", ("down1.attn0",))
    assert max(one.relative for one in parity.values()) <= 1e-4
    return graph


def load(graph: Graph):
    return onnx.load(graph.path, load_external_data=False)


def weights(graph: Graph) -> set[str]:
    """Names in the checkpoint of the tensors that the graph refers to."""
    found = set()
    places = {
        (p.path.name, p.offset): name for name, p in locate_tensors(graph.model.weight_files(graph.component)).items()
    }
    for tensor in load(graph).graph.initializer:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        if entries:
            found.add(places[Path(entries["location"]).name, int(entries["offset"])])
    return found


def owner(name: str) -> str:
    """The module of a parameter."""
    return name.rpartition(".")[0]


@pytest.mark.parametrize("which", ["up1", "attention"])
def test_nothing_that_comes_after_the_deepest_tap_is_in_the_file(which, request):
    graph = request.getfixturevalue(which)
    downs = len(graph.model.unet["down_block_types"])
    last = "up_blocks.1" if which == "up1" else "down_blocks.1.attentions.0"
    everything = set(locate_tensors(graph.model.weight_files("unet")))
    blocks = {name for name in everything if name.startswith(("down_blocks", "up_blocks", "mid_block"))}

    def runs_before_the_cut(name):
        return depth(owner(name), downs) <= depth(last, downs) or owner(name).startswith(last)

    inside = {name for name in blocks if runs_before_the_cut(name)}
    assert blocks - inside, "this test would hold for an uncut graph"
    used = weights(graph)
    # What the output does not depend on is not wanted either: a tap in the encoder's middle needs all before it.
    assert used & blocks == inside
    assert used - blocks == {name for name in everything - blocks if name.startswith(("conv_in", "time_embedding"))}
    later = {
        "up1": ("up_blocks.2", "conv_out", "conv_norm_out"),
        "attention": ("down_blocks.1.downsamplers", "down_blocks.2", "mid", "up_", "conv_out"),
    }
    names = [tensor.name for tensor in load(graph).graph.initializer] + [node.name for node in load(graph).graph.node]
    for start in later[which]:
        assert not [name for name in used if name.startswith(start)]
        assert not [name for name in names if f".{start}" in name], start


@pytest.mark.parametrize("which", ["vae", "up1", "attention"])
def test_the_graph_holds_no_copy_of_the_weights(which, request):
    graph = request.getfixturevalue(which)
    inline = {t.name: int(np.prod(t.dims)) for t in load(graph).graph.initializer if not t.external_data}
    assert max(inline.values(), default=0) <= 64, inline
    attributes = [a.t for node in load(graph).graph.node for a in node.attribute if a.HasField("t")]
    assert max((int(np.prod(t.dims)) for t in attributes), default=0) <= 64
    places = {
        Path(entry.value) for t in load(graph).graph.initializer for entry in t.external_data if entry.key == "location"
    }
    assert places
    for place in places:
        assert not place.is_absolute()
        assert ".." not in place.parts
        assert place.suffix == ".safetensors"
        assert (graph.path.parent / place).is_file()


@pytest.mark.parametrize("which", ["vae", "up1", "attention"])
def test_free_axes_are_named_by_their_letters(which, request):
    graph = request.getfixturevalue(which)
    proto = load(graph).graph
    shapes = {
        v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim]
        for v in (*proto.input, *proto.output)
    }
    want = {spec.name: list(spec.shape) for spec in graph.inputs}
    for name, shape in shapes.items():
        if name in want:
            assert shape == want[name], name
        else:
            assert shape[0] == "B", name
    if which == "vae":
        assert shapes == {"image": ["B", 3, "H", "W"], "mean": ["B", 4, "h", "w"], "std": ["B", 4, "h", "w"]}
    else:
        assert shapes["noise"] == ["B", "E", 4, "h", "w"]
        assert shapes["prompt"] == ["B", "T", 6]
        assert [output.name for output in proto.output] == list(graph.taps)


PROFILES = [Profile((8, 8)), Profile((40, 24), 4, 9, 1), Profile((24, 16), 1, 1, 3), Profile((16, 64), 3, 77, 2)]


@pytest.mark.parametrize("which", ["vae", "up1", "attention"])
def test_any_size_ensemble_and_prompt_length_gives_torchs_numbers(which, request):
    graph = request.getfixturevalue(which)
    for seed, profile in enumerate(PROFILES):
        with (
            get_backend("ort").open(graph, profile, "cpu", 1) as engine,
            get_backend("torch").open(graph, profile, "cpu", 1) as torch,
        ):
            for name, parity in compare(engine, torch, example_feeds(graph, profile, seed)).items():
                assert parity.relative <= 1e-4, (profile, name)


@pytest.mark.parametrize("which", ["vae", "up1", "attention"])
def test_the_file_says_nothing_of_the_machine_it_was_made_on(which, request):
    graph = request.getfixturevalue(which)
    content = graph.path.read_bytes()
    for trace in (
        str(graph.path.parent),
        str(graph.model.folder),
        str(Path.cwd()),
        str(Path.home()),
        "site-packages",
        'File "',
        "/torch/",
        "diffusers/",
        ".py",
        "pkg.torch",
    ):
        assert trace.encode() not in content, trace


@pytest.mark.parametrize("which", ["vae", "up1", "attention"])
def test_the_manifest_holds_the_parity_report(which, request):
    graph = request.getfixturevalue(which)
    manifest = json.loads(
        graph.path.with_suffix("").with_name(graph.path.name.removesuffix(".onnx") + ".json").read_text()
    )
    report = manifest["report"]["parity"]
    assert list(report) == sorted(spec.name for spec in graph.outputs)
    for one in report.values():
        assert 0 <= one["relative"] <= 1e-5
        assert one["cosine_min"] <= one["cosine_mean"] <= 1 + 1e-9
        assert one["cosine_min"] > 1 - 1e-6
        assert one["max_abs"] > 0, "compared with itself"
    assert manifest["made_from"]["taps"] == list(graph.taps)
    assert manifest["made_from"]["made_with"]["torch"]
    assert len(manifest["files"]) == 1 + len(graph.model.weight_files(graph.component))


def test_parity_against_the_slow_way():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 2, 3, 4, 5))
    got = TensorParity.of(a, b)
    cosines = [
        sum(a[i, c, y, x] * b[i, c, y, x] for c in range(3))
        / np.linalg.norm(a[i, :, y, x])
        / np.linalg.norm(b[i, :, y, x])
        for i in range(2) for y in range(4) for x in range(5)
    ]  # fmt: skip
    assert got.cosine_mean == pytest.approx(np.mean(cosines))
    assert got.cosine_min == pytest.approx(min(cosines))
    assert got.max_abs == pytest.approx(np.abs(a - b).max())
    assert got.relative == pytest.approx(((a - b) ** 2).sum() ** 0.5 / (b**2).sum() ** 0.5)
    assert got.relative_max == pytest.approx(np.abs(a - b).max() / np.abs(b).max())
    assert TensorParity.of(b, b).relative == 0
    assert TensorParity.of(a, np.zeros_like(a)).relative == np.inf
    assert TensorParity.of(np.zeros_like(a), np.zeros_like(a)).relative == 0


def _scaled(proto):
    """The same graph, its first output 1.001 times too large."""
    name = proto.graph.output[0].name
    for node in proto.graph.node:
        for i, output in enumerate(node.output):
            if output == name:
                node.output[i] = "honest"
        for i, entry in enumerate(node.input):
            if entry == name:
                node.input[i] = "honest"
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.float32(1.001), "factor"))
    proto.graph.node.append(onnx.helper.make_node("Mul", ["honest", "factor"], [name]))
    return proto


def _swapped(proto):
    """The same graph, its outputs under each other's names."""
    names = [output.name for output in proto.graph.output]
    other = dict(zip(names, reversed(names), strict=True))
    for node in proto.graph.node:
        for i, output in enumerate(node.output):
            node.output[i] = other.get(output, output)
        for i, entry in enumerate(node.input):
            node.input[i] = other.get(entry, entry)
    return proto


@pytest.mark.parametrize("spoil", [_scaled, _swapped])
def test_a_wrong_graph_is_refused_and_nothing_is_left(vae, tmp_path, monkeypatch, spoil):
    monkeypatch.setattr(tracing, "trace", lambda *_: spoil(load(vae)))
    cache = Cache(tmp_path / "new")
    with pytest.raises(
        BackendError, match=r"the exported vae of model .* differs from torch by a relative error of .*allowed: 1e-04"
    ):
        export_graph(cache, vae.model, "vae")
    left = [path.name for path in cache.folder.rglob("*") if path.is_file()]
    assert left == ["diffusion_pytorch_model.safetensors"]
    assert cached_graph(cache, vae.model, "vae") is None


def test_an_honest_graph_passes_the_same_way(vae, tmp_path, monkeypatch):
    monkeypatch.setattr(tracing, "trace", lambda *_: load(vae))
    cache = Cache(tmp_path / "new")
    graph, _ = export_graph(cache, vae.model, "vae")
    assert cached_graph(cache, vae.model, "vae") == graph


def test_damaged_safetensors_headers_are_model_errors(mini, tmp_path):
    whole = Checkpoint.load(mini).weight_files("vae")[0].read_bytes()
    path = tmp_path / "a.safetensors"
    for content in (b"", b"abc", whole[:50], whole[:-10], b"\xff" * 8 + whole[8:], whole[:8] + b"[" + whole[9:]):
        path.write_bytes(content)
        with pytest.raises(ModelError, match="not a whole safetensors file"):
            locate_tensors([path])


def test_an_unknown_module_path_is_a_model_error(mini, tmp_path):
    with pytest.raises(ModelError, match=r"no module 'up_blocks.1.nonsense' for tap"):
        export_graph(Cache(tmp_path / "new"), Checkpoint.load(mini), "unet", ("up_blocks.1.nonsense",))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd15", "sd21"])
def test_full_size_graphs_are_torchs_to_a_ten_thousandth(name, tmp_path):
    cache = Cache(tmp_path / "cache")
    model = open_model(ModelReference(name, random_weights=0), cache)
    for component, taps in (("vae", ()), ("unet", ("up1",))):
        graph, parity = export_graph(cache, model, component, taps)
        assert set(parity) == {spec.name for spec in graph.outputs}
        for output, one in parity.items():
            assert one.relative <= 1e-4, output
            assert one.cosine_min >= 1 - 1e-6, output
        assert graph.path.stat().st_size < 5_000_000, "the graph holds weights"
