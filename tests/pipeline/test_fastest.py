"""``--backend auto``: chosen by measurement, remembered, measured again when its grounds change."""

import dataclasses
import json
import logging
import time

import pytest

from difftap import Pipeline, Runtime, load_recipe
from difftap.artifacts.manifest import Manifest
from difftap.backbones.checkpoint import Checkpoint, pocket_folder
from difftap.engine import BACKENDS, Cache, Engine, Profile, registry
from difftap.engine.backends.ort import OrtBackend
from difftap.engine.builds import engine_manifest_path
from difftap.errors import BackendError
from difftap.images import Image
from difftap.pipeline import fastest as auto
from difftap.pipeline.environment import prepare_graph
from difftap.pipeline.fastest import AUTO, choose, forget_choices, resolve, stored_choices
from tests.harness import picture

SMALL = dataclasses.replace(load_recipe("pocket"), size=(64, 64))


class _Slowed(Engine):
    """ONNX Runtime with a pause."""

    pause = 0.0

    def __init__(self, inner, pause):
        super().__init__(inner.graph, inner.profile, inner.device)
        self._inner = inner
        self.pause = pause

    def _run(self, feeds):
        time.sleep(self.pause)
        return self._inner._run(feeds)


class Slow(OrtBackend):
    """A backend that works, slowly."""

    name = "slow"
    opened = 0

    def open(self, *given):
        type(self).opened += 1
        return _Slowed(super().open(*given), 0.1)


class Unbuilt(OrtBackend):
    """A backend whose engines have to be built."""

    name = "unbuilt"

    def builds(self, profile, device):
        return True


class Stale(Unbuilt):
    """A backend whose engines were built with another version."""

    name = "stale"

    def build(self, *given):
        raise AssertionError("choosing builds nothing")


class FallsBack(OrtBackend):
    """A backend whose GPU turns out to be none."""

    name = "falls"

    def open(self, *given):
        engine = super().open(*given)
        engine.device = "elsewhere"
        return engine


class Broken(OrtBackend):
    """A backend that cannot open anything."""

    name = "broken"

    def open(self, *given):
        raise BackendError("this runtime opens nothing")


@pytest.fixture
def backends(monkeypatch):
    """A function that makes the registry hold these backends alone."""

    def hold(*kinds):
        known = {kind.name: kind() for kind in kinds}
        for module in (auto, registry):
            monkeypatch.setattr(module, "BACKENDS", dict.fromkeys(known, ""))
        monkeypatch.setattr(auto, "get_backend", known.__getitem__)
        monkeypatch.setattr("difftap.pipeline.environment.get_backend", known.__getitem__)
        auto._stamp.cache_clear()

    yield hold
    auto._stamp.cache_clear()


def runtime(tmp_path, **more):
    return Runtime(AUTO, threads=1, cache=tmp_path / "auto", **more)


def test_the_fastest_is_chosen_and_remembered(backends, tmp_path, caplog):
    backends(Slow, Broken, OrtBackend, Unbuilt)
    caplog.set_level(logging.DEBUG, "difftap")
    Slow.opened = 0
    choice = choose(SMALL, runtime(tmp_path))
    assert (choice.backend, choice.device) == ("ort", "cpu")
    trials = {one.backend: one for one in choice.trials}
    assert trials["slow"].seconds > trials["ort"].seconds + 0.1
    assert trials["broken"].reason == "this runtime opens nothing"
    assert "difftap engines build --backend unbuilt" in trials["unbuilt"].reason
    assert Slow.opened == 2
    told = [record for record in caplog.records if record.levelno == logging.INFO]
    assert any("ort on cpu is the fastest here" in record.getMessage() for record in told)
    caplog.clear()
    assert choose(SMALL, runtime(tmp_path)) == choice
    assert Slow.opened == 2
    assert [record.levelno for record in caplog.records if "auto" in record.getMessage()] == [logging.DEBUG]
    [(stored, holds)] = stored_choices(Cache(tmp_path / "auto"))
    assert (stored, holds) == (choice, True)


def test_what_would_have_to_be_built_or_runs_elsewhere_is_left_out(backends, tmp_path):
    backends(Stale, OrtBackend, FallsBack)
    cache, backend = Cache(tmp_path / "auto"), Stale()
    model = Checkpoint.load(pocket_folder(), "pocket")
    graph = prepare_graph(cache, backend, model, "vae", (), Profile((64, 64)), "cpu")
    path = engine_manifest_path(cache, graph, backend, Profile((64, 64)), "cpu")
    path.parent.mkdir(parents=True)
    Manifest("engine", {"backend": "stale", "backend_version": "0.1"}, {}).save(path)
    choice = choose(SMALL, runtime(tmp_path))
    assert choice.backend == "ort"
    trials = {one.backend: one for one in choice.trials}
    assert "difftap engines build --backend stale --precision fp32" in trials["stale"].reason
    assert path.is_file()  # and what is there is left alone
    assert trials["falls"].reason == "falls back to elsewhere"


def test_it_is_measured_again_when_its_grounds_change(backends, tmp_path, monkeypatch):
    backends(Slow, OrtBackend)
    Slow.opened = 0
    choose(SMALL, runtime(tmp_path))
    choose(dataclasses.replace(SMALL, seed=5), runtime(tmp_path))  # the same engines
    assert Slow.opened == 2
    choose(dataclasses.replace(SMALL, ensemble=4), runtime(tmp_path))
    choose(SMALL, runtime(tmp_path), afresh=True)
    assert Slow.opened == 6
    monkeypatch.setattr(auto, "cpu", lambda: "another processor")
    auto._stamp.cache_clear()
    assert [holds for _, holds in stored_choices(Cache(tmp_path / "auto"))] == [False, False]
    choose(SMALL, runtime(tmp_path))
    assert Slow.opened == 8
    forget_choices(Cache(tmp_path / "auto"))
    assert stored_choices(Cache(tmp_path / "auto")) == []


def test_one_backend_alone_is_not_measured(backends, tmp_path):
    backends(Slow)
    Slow.opened = 0
    choice = choose(SMALL, runtime(tmp_path))
    assert choice.backend == "slow"
    assert Slow.opened == 0
    assert "no other backend can be measured here" in choice.why


class BuildsOnly(OrtBackend):
    """A backend for a GPU that is not here."""

    name = "builds-only"

    def devices(self):
        return ("cuda",)

    def cannot_run(self, device):
        return "its engines are for another machine"


def test_a_backend_that_only_builds_here_is_no_candidate(backends, tmp_path):
    backends(BuildsOnly, Slow)
    choice = choose(SMALL, runtime(tmp_path))
    assert (choice.backend, choice.device) == ("slow", "cpu")
    assert "its engines are for another machine" in [trial.reason for trial in choice.trials]


def test_the_pipeline_runs_on_what_was_chosen(backends, tmp_path):
    backends(Slow, OrtBackend)
    image = Image(picture(1))
    with Pipeline.open(SMALL, runtime(tmp_path)) as pipeline:
        assert pipeline.conditions["backend"]["name"] == "ort"
        automatic = next(pipeline.extract([image])).data
    with Pipeline.open(SMALL, Runtime("ort", threads=1)) as pipeline:
        assert (next(pipeline.extract([image])).data == automatic).all()
    plain = Runtime("torch", "cpu")
    assert resolve(SMALL, plain) is plain


def test_a_damaged_memory_is_no_memory(backends, tmp_path):
    backends(OrtBackend)
    file = tmp_path / "auto" / "choices.json"
    file.parent.mkdir()
    for content in ("", "[]", '{"a": {"backend": "ort"}}', "{", json.dumps({"a": 5})):
        file.write_text(content)
        assert stored_choices(Cache(tmp_path / "auto")) == []
        assert choose(SMALL, runtime(tmp_path)).backend == "ort"


def test_a_full_disk_costs_the_memory_alone(backends, tmp_path, monkeypatch, caplog):
    from difftap.errors import OutputError

    backends(OrtBackend)

    def full(path, data):
        raise OutputError("cannot write: the disk is full")

    monkeypatch.setattr(auto, "write_atomic", full)
    with caplog.at_level(logging.WARNING, "difftap"):
        assert choose(SMALL, runtime(tmp_path)).backend == "ort"
    assert "cannot be remembered" in caplog.text


def test_nobody_can(backends, tmp_path):
    backends(OrtBackend)
    with pytest.raises(BackendError, match="no backend here has precision fp8 on device auto: ort: has no precision"):
        choose(SMALL, runtime(tmp_path, precision="fp8"))
    backends(Broken, type("Other", (Broken,), {"name": "other"}))
    with pytest.raises(BackendError, match=r"could be measured.*opens nothing; name one by --backend"):
        choose(SMALL, runtime(tmp_path))


def test_every_runtime_s_version_is_a_ground():
    assert "onnxruntime" in auto._RUNTIMES
    assert set(auto._stamp()) == {"difftap", "backends", "cpu", "gpu", "versions"}
    assert auto._stamp()["backends"] == list(BACKENDS)
