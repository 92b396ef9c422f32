"""What every registered backend owes: names, dtypes, shapes, errors. A new backend is tested by being there."""

from dataclasses import replace

import numpy as np
import pytest

from difftap.backbones.checkpoint import Checkpoint
from difftap.engine import BACKENDS, Backend, Engine, Graph, Profile, choose_device, get_backend
from difftap.engine.backend import PRECISIONS, Calibration
from difftap.engine.graphfiles import cached_graph
from difftap.engine.noise import example_feeds
from difftap.errors import BackendError, InputError, NonFiniteError
from tests.harness import MINI_TAPS, compare

# Largest relative error and least mean cosine against float32 torch: a rounding is 2^-11 in fp16, 2^-8 in bf16.
TOLERANCES = {
    "fp32": (1e-4, 1 - 1e-6),
    "bf16x3": (1e-3, 1 - 1e-6),
    "fp16": (5e-3, 0.9999),
    "bf16": (0.1, 0.995),
    "int8": (0.2, 0.98),
}
PROFILE = Profile(size=(24, 16), ensemble=2, tokens=5, batch=3)


def _lacking(name: str) -> str | None:
    """Why a backend takes no part here."""
    found = get_backend(name)
    return found.missing() or (None if "cpu" in found.devices() else f"{name} runs on no CPU")


PRESENT = [name for name in BACKENDS if not _lacking(name)]
# What a processor or a runtime has not is no test; a backend that is not installed is one test that says so.
ABSENT = [pytest.param(name, marks=pytest.mark.skip(reason=str(_lacking(name)))) for name in BACKENDS if _lacking(name)]
KINDS = [
    (name, precision)
    for name in PRESENT
    for precision in PRECISIONS
    if precision in get_backend(name).precisions("cpu")
]


@pytest.fixture(scope="module", params=[*PRESENT, *ABSENT])
def backend(request) -> Backend:
    return get_backend(request.param)


@pytest.fixture(scope="module")
def graphs(mini, mini_cache) -> dict[str, Graph]:
    model = Checkpoint.load(mini)
    found = {"vae": cached_graph(mini_cache, model, "vae"), "unet": cached_graph(mini_cache, model, "unet", MINI_TAPS)}
    assert all(found.values())
    return found


class ExampleCalibration(Calibration):
    """Three images of noise."""

    key = "0" * 16

    def __call__(self, graph, profile):
        for seed in range(3):
            yield example_feeds(graph, replace(profile, batch=1), seed)


@pytest.fixture(scope="module", params=KINDS, ids="-".join)
def kind(request) -> tuple[Backend, Profile]:
    name, precision = request.param
    return get_backend(name), replace(PROFILE, precision=precision)


@pytest.fixture(scope="module", params=["vae", "unet"])
def engine(request, kind, graphs, tmp_path_factory):
    backend, profile = kind
    graph, built = graphs[request.param], None
    if backend.builds(profile, "cpu"):
        built = tmp_path_factory.mktemp("built")
        backend.build(graph, profile, "cpu", built, ExampleCalibration())
    with backend.open(graph, profile, "cpu", 1, built) as opened:
        yield opened


def feeds_of(engine: Engine, batch: int):
    return {name: array[:batch] for name, array in example_feeds(engine.graph, PROFILE).items()}


def test_names_dtypes_and_shapes(engine, graphs):
    for batch in (1, 3):
        outputs = engine.run(feeds_of(engine, batch))
        assert list(outputs) == [spec.name for spec in engine.outputs]
        want = {"mean": (4, 8, 12), "std": (4, 8, 12), "up1": (16, 8, 12), "down1.attn0": (16, 4, 6)}
        for name, value in outputs.items():
            assert value.dtype == np.float32
            assert value.shape == (batch, *want[name])
            assert value.flags.c_contiguous
            assert value.std() > 0


def test_images_of_a_batch_do_not_mix(engine):
    together = engine.run(feeds_of(engine, 3))
    for i in range(3):
        alone = engine.run({name: array[i : i + 1] for name, array in feeds_of(engine, 3).items()})
        for name, value in alone.items():
            assert np.allclose(value[0], together[name][i], rtol=1e-4, atol=1e-5 * np.abs(value).max())


def test_the_same_feeds_give_the_same_bytes(engine):
    first, second = engine.run(feeds_of(engine, 2)), engine.run(feeds_of(engine, 2))
    for name in first:
        assert (first[name] == second[name]).all()


def test_feeds_need_not_be_contiguous_and_are_left_alone(engine):
    feeds = feeds_of(engine, 1)
    kept = {name: array.copy() for name, array in feeds.items()}
    odd = {name: np.asfortranarray(array) for name, array in feeds.items()}
    for (name, value), other in zip(engine.run(odd).items(), engine.run(feeds).values(), strict=True):
        assert (value == other).all(), name
    for name in feeds:
        assert (feeds[name] == kept[name]).all()


def test_agrees_with_torch(engine, graphs):
    reference = get_backend("torch")
    if reference.missing():
        pytest.skip(reference.missing())
    with reference.open(engine.graph, PROFILE, "cpu", 1) as other:
        for name, parity in compare(engine, other, feeds_of(engine, 2)).items():
            relative, cosine = TOLERANCES[engine.profile.precision]
            assert parity.relative <= relative, name
            assert parity.cosine_mean >= cosine, name
            # No error at all would mean that it computes in float32 after all.
            least = {"fp32": 0.0, "bf16x3": 3e-6}.get(engine.profile.precision, 1e-5)
            assert parity.relative >= least, name


def test_wrong_feeds_are_refused_by_name(engine):
    good = feeds_of(engine, 1)
    first = engine.inputs[0].name
    cases = [
        ({}, "got none"),
        ({name: array for name, array in good.items() if name != first}, f"takes the inputs {first}"),
        ({**good, "extra": good[first]}, "extra"),
        ({**good, first: good[first].astype(np.float64)}, f"input '{first}' of .* is float64 .* wanted float32"),
        ({**good, first: good[first][0]}, f"input '{first}'"),
        ({**good, first: good[first][..., :-1]}, r"wanted float32 \(1, "),
        ({name: array[:0] for name, array in good.items()}, "a batch of 0 images; this engine takes 1 to 3"),
        (
            {name: np.concatenate([array] * 4) for name, array in good.items()},
            "a batch of 4 images; this engine takes 1 to 3",
        ),
    ]
    for feeds, words in cases:
        with pytest.raises(BackendError, match=words) as caught:
            engine.run(feeds)
        assert "\n" not in str(caught.value)
    if engine.graph.component == "unet":
        with pytest.raises(BackendError, match="timestep"):
            engine.run({**good, "timestep": good["timestep"].astype(np.int32)})
        with pytest.raises(BackendError, match="noise"):
            engine.run({**good, "noise": good["noise"][:, :1]})


def test_outputs_that_are_not_finite_are_refused(engine):
    for bad in (np.nan, np.inf):
        feeds = feeds_of(engine, 1)
        name = engine.inputs[0].name
        feeds[name] = feeds[name].copy()
        feeds[name][0, 0, 3, 4] = bad
        with pytest.raises(NonFiniteError, match="not finite"):
            engine.run(feeds)


def test_a_backend_says_what_it_is(backend):
    assert backend.version()
    assert "cpu" in backend.devices()
    assert choose_device(backend, "auto") == backend.devices()[0]
    with pytest.raises(BackendError, match=f"'{backend.name}' has no device 'tpu' here; present: .*cpu"):
        choose_device(backend, "tpu")


@pytest.mark.parametrize("name", [name for name in PRESENT if get_backend(name).needs_graph])
def test_a_graph_that_cannot_be_opened(name, graphs, tmp_path):
    backend = get_backend(name)
    graph = graphs["vae"]
    broken = tmp_path / "vae.onnx"
    for content in (None, b"", graph.path.read_bytes()[:500], b"no graph at all"):
        if content is not None:
            broken.write_bytes(content)
        with pytest.raises(BackendError, match="cannot open") as caught:
            backend.open(Graph(graph.model, "vae", (), broken), PROFILE, "cpu", 1)
        assert "\n" not in str(caught.value)


def test_an_unknown_backend_lists_the_known_ones():
    with pytest.raises(InputError, match=r"no backend 'onnx'; allowed: ort, .*torch"):
        get_backend("onnx")


def test_a_runtime_that_is_not_installed_says_how_to_get_it(monkeypatch):
    import sys

    for name, module, words in (
        ("ort", "onnxruntime", "pip install onnxruntime"),
        ("openvino", "openvino", r"pip install 'difftap\[openvino\]'"),
        ("torch", "torch", "difftap.export"),
    ):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, module, None)
            with pytest.raises(BackendError, match=words):
                choose_device(get_backend(name), "auto")


def test_onnxruntime_has_a_gpu_only_where_there_is_a_driver(monkeypatch):
    """onnxruntime-gpu names its provider on every machine, and without a driver falls back to the CPU by itself."""
    import onnxruntime

    providers = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: providers)
    for driver, devices in ((True, ("cuda", "cpu")), (False, ("cpu",))):
        monkeypatch.setattr("difftap.engine.backends.ort.cuda_driver", lambda driver=driver: driver)
        assert get_backend("ort").devices() == devices


@pytest.mark.parametrize(
    ("device", "can", "precisions"),
    [
        ("cpu", ("FP32", "BIN"), ("fp32",)),
        ("cpu", ("FP32", "BF16", "INT8"), ("fp32", "bf16x3", "bf16", "int8")),
        ("intel-gpu", ("FP32", "BF16", "FP16"), ("fp32", "bf16", "fp16")),  # bf16x3 is for CPUs
    ],
)
def test_openvinos_precisions_are_those_the_processor_is_good_at(monkeypatch, device, can, precisions):
    backend = get_backend("openvino")
    monkeypatch.setattr(backend, "_capabilities", lambda device: can)
    assert backend.precisions(device) == precisions
    for precision in PRECISIONS:
        assert backend.builds(replace(PROFILE, precision=precision), device) == (precision == "int8")
