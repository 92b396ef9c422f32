"""The two TensorRT backends: what they tell the library, and how their engines behave, with a stand-in for it."""

from __future__ import annotations

import dataclasses
import logging
import shutil
import sys

import numpy as np
import pytest

from difftap.backbones.checkpoint import Checkpoint
from difftap.engine import Cache, Graph, Profile, choose_device, get_backend
from difftap.engine.backend import DeviceArray
from difftap.engine.backends.tensorrt import TensorRTBackend
from difftap.engine.backends.tensorrt_rtx import TensorRTRTXBackend
from difftap.engine.builds import ensure_built
from difftap.engine.graphfiles import cached_graph
from difftap.engine.noise import example_feeds
from difftap.engine.trt.gpu import Gpu
from difftap.errors import BackendError, NonFiniteError
from difftap.pipeline.engines import list_artifacts, verify_artifact
from difftap.pipeline.environment import Environment, RecipeEngines
from difftap.recipe import load_recipe
from tests.engine.fake_trt import Fake, Flag, HostMemory
from tests.harness import MINI_TAPS

PROFILE = Profile(size=(24, 16), ensemble=2, tokens=5, batch=6)
H100, L4, TURING = Gpu("NVIDIA H100", (9, 0)), Gpu("NVIDIA L4", (8, 9)), Gpu("Tesla T4", (7, 5))
KINDS = {"tensorrt": TensorRTBackend, "tensorrt-rtx": TensorRTRTXBackend}


@pytest.fixture
def gpu(monkeypatch):
    """Sets the GPU that this machine seems to have."""

    def choose(found):
        for module in ("trt.bindings", "backends.tensorrt", "backends.tensorrt_rtx"):
            monkeypatch.setattr(f"difftap.engine.{module}.find_gpu", lambda: found)

    choose(L4)
    return choose


@pytest.fixture(params=KINDS)
def backend(request, gpu, monkeypatch):
    return stand_in(request.param, monkeypatch)


def stand_in(name, monkeypatch):
    made = KINDS[name]()
    made.fake, made.host = Fake(made.module), HostMemory()
    monkeypatch.setattr(made, "bindings", lambda: made.fake)
    monkeypatch.setattr(made, "memory", lambda: made.host)
    return made


@pytest.fixture(scope="module")
def graphs(mini, mini_cache) -> dict[str, Graph]:
    model = Checkpoint.load(mini)
    return {"vae": cached_graph(mini_cache, model, "vae"), "unet": cached_graph(mini_cache, model, "unet", MINI_TAPS)}


def built(backend, graph, tmp_path, profile=PROFILE, device="cuda"):
    return ensure_built(Cache(tmp_path), graph, backend, profile, device)


def opened(backend, graph, tmp_path, profile=PROFILE, device="cuda"):
    return backend.open(graph, profile, device, None, built(backend, graph, tmp_path, profile, device))


def feeds_of(graph, batch):
    return {name: array[:batch] for name, array in example_feeds(graph, PROFILE).items()}


@pytest.mark.parametrize("component", ["vae", "unet"])
def test_every_batch_size_gives_what_onnxruntime_gives(backend, graphs, tmp_path, component):
    graph = graphs[component]
    with opened(backend, graph, tmp_path) as engine, get_backend("ort").open(graph, PROFILE, "cpu", 1) as other:
        for batch in (1, 3, 3, 6, 1):
            got, want = engine.run(feeds_of(graph, batch)), other.run(feeds_of(graph, batch))
            assert list(got) == [spec.name for spec in engine.outputs]
            for name, value in got.items():
                assert value.flags.c_contiguous and value.dtype == np.float32
                assert np.allclose(value, want[name], rtol=1e-4, atol=1e-4 * np.abs(want[name]).max()), (name, batch)
        with pytest.raises(BackendError, match="a batch of 7 images"):
            engine.run({name: np.concatenate([v, v[:1]]) for name, v in feeds_of(graph, 6).items()})
    with pytest.raises(BackendError, match="is closed"):
        engine.run(feeds_of(graph, 1))


def test_results_outlive_the_next_run(backend, graphs, tmp_path):
    with opened(backend, graphs["vae"], tmp_path) as engine:
        first = engine.run(feeds_of(graphs["vae"], 1))
        kept = {name: value.copy() for name, value in first.items()}
        engine.run({"image": np.ones((1, 3, 16, 24), np.float32)})
        assert all((first[name] == kept[name]).all() for name in kept)


def test_one_engine_feeds_the_other_without_the_host(backend, graphs, tmp_path):
    with opened(backend, graphs["vae"], tmp_path) as vae, opened(backend, graphs["unet"], tmp_path) as unet:
        posterior = vae.run_on_device(feeds_of(graphs["vae"], 2))
        assert all(isinstance(value, DeviceArray) for value in posterior.values())
        feeds = feeds_of(graphs["unet"], 2)
        chained = unet.run({**feeds, **posterior})
        copied = unet.run({**feeds, **{name: value.numpy() for name, value in posterior.items()}})
        for name, value in copied.items():
            assert (chained[name] == value).all()


def test_weights_stay_in_the_models_own_file_and_are_put_back(backend, graphs, tmp_path):
    folder = built(backend, graphs["vae"], tmp_path)
    assert [path.name for path in folder.iterdir()] == ["stripped.plan"]
    assert {Flag.STRIP_PLAN, Flag.REFIT_IDENTICAL} <= backend.fake.configs[-1].flags
    assert "refit" in backend.fake.calls  # tried when it was built
    with backend.open(graphs["vae"], PROFILE, "cuda", None, folder) as engine:
        engine.run(feeds_of(graphs["vae"], 1))
    backend.fake.fails.add("refit")
    with pytest.raises(BackendError, match=r"cannot put the weights of '.*' back into the engine; build it again"):
        backend.open(graphs["vae"], PROFILE, "cuda", None, folder)


def test_an_engine_whose_weights_cannot_be_put_back_is_built_whole(backend, graphs, tmp_path, caplog):
    backend.fake.fails.add("refit")
    with caplog.at_level(logging.WARNING):
        folder = built(backend, graphs["vae"], tmp_path)
    assert [path.name for path in folder.iterdir()] == ["plan"]
    assert "building it with its weights inside" in caplog.text
    with backend.open(graphs["vae"], PROFILE, "cuda", None, folder) as engine:
        engine.run(feeds_of(graphs["vae"], 1))  # finite: nothing had to be put back


def test_shapes_are_fixed_but_for_the_batch(backend, graphs, tmp_path):
    built(backend, graphs["unet"], tmp_path)
    (ranges,) = backend.fake.configs[-1].profiles
    assert ranges["noise"] == ((1, 2, 4, 8, 12), (6, 2, 4, 8, 12), (6, 2, 4, 8, 12))
    assert ranges["timestep"] == ((1,), (6,), (6,))
    built(backend, graphs["unet"], tmp_path, dataclasses.replace(PROFILE, batch=1))
    assert backend.fake.configs[-1].profiles == []


def test_fp32_is_not_tf32(backend, graphs, tmp_path):
    built(backend, graphs["vae"], tmp_path)
    assert Flag.TF32 not in backend.fake.configs[-1].flags
    built(backend, graphs["vae"], tmp_path, dataclasses.replace(PROFILE, precision="fp16"))
    assert Flag.TF32 in backend.fake.configs[-1].flags


@pytest.mark.parametrize(
    ("step", "words"),
    [
        ("parse", "cannot open '.*vae.onnx': not a graph"),
        ("build", "cannot build vae for 24x16.*: no tactic"),
        ("deserialize", "cannot open '.*': wrong version"),
        ("context", "cannot make vae ready for 24x16.*; try a smaller --batch"),
        ("execute", "failed on vae"),
    ],
)
def test_each_failure_is_one_line(backend, graphs, tmp_path, step, words):
    folder = None if step in ("parse", "build") else built(backend, graphs["vae"], tmp_path)
    backend.fake.fails.add(step)
    with pytest.raises(BackendError, match=words) as caught:
        folder = folder or built(backend, graphs["vae"], tmp_path)
        backend.open(graphs["vae"], PROFILE, "cuda", None, folder).run(feeds_of(graphs["vae"], 1))
    assert "\n" not in str(caught.value)
    if step in ("parse", "build"):
        assert not list(tmp_path.rglob("*plan*")) and not list(tmp_path.rglob("*.engine.json"))


def test_outputs_that_are_not_finite_are_refused(backend, graphs, tmp_path):
    with opened(backend, graphs["vae"], tmp_path) as engine:
        engine._engine.whole = False
        with pytest.raises(NonFiniteError, match="not finite"):
            engine.run(feeds_of(graphs["vae"], 1))


def test_small_batches_run_as_captured_graphs(gpu, graphs, tmp_path, monkeypatch):
    backend = stand_in("tensorrt", monkeypatch)
    with opened(backend, graphs["vae"], tmp_path) as engine:
        want = engine.run(feeds_of(graphs["vae"], 2))
        assert (backend.host.captured, backend.host.replayed) == (1, 0)
        got = engine.run(feeds_of(graphs["vae"], 2))
        assert (backend.host.captured, backend.host.replayed) == (1, 1)
        assert all((got[name] == want[name]).all() for name in want)
        engine.run(feeds_of(graphs["vae"], 6))  # too large to be worth it, and the captured one is of other shapes
        engine.run(feeds_of(graphs["vae"], 6))
        assert (backend.host.captured, backend.host.replayed) == (1, 1)
        engine.run(feeds_of(graphs["vae"], 2))
        assert backend.host.captured == 2

    def refuse(launch):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(backend.host, "capture", refuse)
    with opened(backend, graphs["vae"], tmp_path) as engine:
        assert all((engine.run(feeds_of(graphs["vae"], 2))[name] == want[name]).all() for name in want for _ in "ab")


def test_tensorrt_levels_of_compatibility_and_timings(gpu, graphs, tmp_path, monkeypatch):
    backend = stand_in("tensorrt", monkeypatch)
    for device, level in (("cuda", "none"), ("cuda-same", "same"), ("cuda-ampere", "ampere")):
        built(backend, graphs["vae"], tmp_path, device=device)
        assert backend.fake.configs[-1].hardware_compatibility_level == level
    (timings,) = tmp_path.rglob("*.timings")
    assert timings.read_bytes() == b"timed..."  # each build was given what the one before had timed
    timings.write_bytes(b"another driver's")
    built(backend, graphs["unet"], tmp_path)
    assert timings.read_bytes() == b"timed."


def test_an_engine_for_another_gpu_is_built_again_with_the_reason(gpu, graphs, tmp_path, monkeypatch, caplog):
    backend = stand_in("tensorrt", monkeypatch)
    built(backend, graphs["vae"], tmp_path)
    built(backend, graphs["vae"], tmp_path, device="cuda-ampere")
    gpu(H100)
    with caplog.at_level(logging.WARNING):
        built(backend, graphs["vae"], tmp_path)
    assert "made for gpu = 'NVIDIA L4 (8.9)', not 'NVIDIA H100 (9.0)'; making it again" in caplog.text
    count = backend.fake.calls.count("build")
    built(backend, graphs["vae"], tmp_path, device="cuda-ampere")
    assert backend.fake.calls.count("build") == count


def test_tensorrt_needs_a_gpu_and_says_so(gpu, monkeypatch):
    backend = stand_in("tensorrt", monkeypatch)
    gpu(None)
    with pytest.raises(BackendError, match="torch sees none here; backend 'tensorrt-rtx' builds without one"):
        choose_device(backend, "auto")
    gpu(TURING)
    assert "cuda-ampere" not in backend.devices() and "bf16" not in backend.precisions("cuda")
    gpu(Gpu("NVIDIA A100", (8, 0)))  # the first of its kind
    assert "cuda-ampere" in backend.devices() and "bf16" in backend.precisions("cuda")


@pytest.mark.parametrize(
    ("found", "device", "words"),
    [
        (None, "cuda", "can be built here .* but not run: torch sees no NVIDIA GPU"),
        (H100, "cuda", r"here is NVIDIA H100 \(9.0\); Hopper is not among .*: use backend 'tensorrt'"),
        (TURING, "cuda", "use --device cuda-turing"),
        (L4, "cuda-turing", "run on compute capability 7.5; here is NVIDIA L4 .*; use --device cuda"),
        (Gpu("NVIDIA B200", (10, 0)), "cuda", "use backend 'tensorrt', or ort"),
    ],
)
def test_rtx_engines_are_built_anywhere_and_run_on_their_gpus(gpu, graphs, tmp_path, monkeypatch, found, device, words):
    backend = stand_in("tensorrt-rtx", monkeypatch)
    gpu(found)
    folder = built(backend, graphs["vae"], tmp_path, device=device)
    wanted = [75] if device == "cuda-turing" else [80, 86, 89, 120, 121]
    assert list(backend.fake.configs[-1].capabilities.values()) == wanted
    assert [path.name for path in folder.iterdir()] == ["plan" if found is None else "stripped.plan"]
    with pytest.raises(BackendError, match=words):
        backend.open(graphs["vae"], PROFILE, device, None, folder)
    assert choose_device(backend, "auto") == ("cuda-turing" if found == TURING else "cuda")


def test_rtx_keeps_the_kernels_compiled_for_a_gpu(gpu, graphs, tmp_path, monkeypatch):
    backend = stand_in("tensorrt-rtx", monkeypatch)
    for kernels in (b"k", b"kk"):
        with opened(backend, graphs["vae"], tmp_path) as engine:
            config = engine._context.config
            assert (config.cuda_graph_strategy, config.dynamic_shapes_kernel_specialization_strategy) == (
                "whole",
                "eager",
            )
        (path,) = tmp_path.rglob("*.kernels")
        assert path.read_bytes() == kernels
    folder = built(backend, graphs["vae"], tmp_path)
    assert path not in folder.iterdir()  # or the engine would not be what its manifest says
    assert backend.fake.calls.count("build") == 1


def test_an_engine_built_without_a_gpu_is_measured_where_there_is_one(gpu, graphs, mini_cache, tmp_path, monkeypatch):
    backend = get_backend("tensorrt-rtx")  # the one that the command line would use
    fake = Fake("tensorrt_rtx")
    monkeypatch.setattr(backend, "bindings", lambda: fake)
    monkeypatch.setattr(backend, "memory", HostMemory)
    cache = Cache(tmp_path / "cache")
    shutil.copytree(mini_cache.folder, cache.folder)
    model = graphs["vae"].model
    recipe = dataclasses.replace(load_recipe("pocket"), model=str(model.folder), size=(24, 16))
    engines = RecipeEngines(Environment(cache, model, backend, "cuda", 1), recipe)
    gpu(None)
    graph = engines.environment.graph("vae", (), engines.encoder_profile())
    engines.built(graph, engines.encoder_profile())

    def found():
        return next(one for one in list_artifacts(cache) if "rtx" in one.path.name)

    assert "sees no NVIDIA GPU" in verify_artifact(found(), cache=cache)
    assert found().not_run and not found().parity
    gpu(L4)
    assert "measured for the first time: relative" in verify_artifact(found(), cache=cache)
    assert not found().not_run and set(found().parity) == {"mean", "std"}
    assert verify_artifact(found(), cache=cache) is None


@pytest.mark.parametrize("name", KINDS)
def test_a_missing_package_says_how_to_get_it(name, monkeypatch):
    monkeypatch.setitem(sys.modules, KINDS[name].module, None)
    with pytest.raises(BackendError, match=rf"pip install 'difftap\[{name}\]'"):
        choose_device(get_backend(name), "auto")
