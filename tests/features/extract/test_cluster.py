"""Extraction on Ray: what a worker does with its shard, when a run is given up (both without Ray), a worker killed."""

import json
import pickle
import queue
import subprocess
import sys
from types import SimpleNamespace

import pytest

from difftap.errors import BackendError, ImageError
from difftap.features.extract import ExtractSettings, extract_to_store
from difftap.features.extract.cluster import _Task, _Worker, watched
from difftap.features.extract.stream import stream
from difftap.features.sources import open_source
from difftap.features.store import Encoding, FeatureStore, open_writer
from difftap.features.store.care import verify
from difftap.features.store.encoding import shapes_of
from tests.features.extract.ray_case import COUNT
from tests.harness import FakePipeline, numbered_pictures, write_picture

pytest.importorskip("zarr")


class Died(BaseException):
    """The worker's end."""


class Beats:
    """Counts finished images; ends the worker at one of them."""

    def __init__(self, end=None):
        self.count, self.end = 0, end
        self.beat = SimpleNamespace(remote=self.one)

    def one(self):
        self.count += 1
        if self.count == self.end:
            raise Died


@pytest.fixture
def driver(tmp_path, monkeypatch):
    """In a folder of its own, with photos that lie there, and a store that has room for a shard of six."""
    (tmp_path / "photos").mkdir()
    for number in range(5):
        write_picture(tmp_path / "photos" / f"{number}.png", seed=number)
    (tmp_path / "photos" / "bad.png").write_text("no picture")
    monkeypatch.chdir(tmp_path)
    source, pipeline = open_source("photos"), FakePipeline()
    conditions, fields = pipeline.conditions, pipeline.recipe.feature_fields()
    with open_writer(tmp_path / "s.zarr", conditions, fields, Encoding(), shard=6) as writer:
        writer.reserve(1)
        writer.prepare(shapes_of(next(stream(pipeline, source)).features), {})
    monkeypatch.chdir("/")  # where a cluster's workers may stand
    return tmp_path, source


def work(folder, source, beats, every=30.0):
    worker = _Worker(FakePipeline, str(folder / "s.zarr"), ExtractSettings(every=every), str(folder), beats)
    [done] = worker({"task": [pickle.dumps(_Task(0, tuple(source)))]})["done"]
    return pickle.loads(done)


def test_paths_are_relative_to_where_the_driver_is(driver):
    folder, source = driver
    done = work(folder, source, Beats())
    assert (done["shard"], done["written"], list(done["failed"])) == (0, 5, ["bad.png"])
    store = FeatureStore.open(folder / "s.zarr")
    assert store.keys() == [f"{number}.png" for number in range(5)]
    assert list(verify(store)) == []


@pytest.mark.parametrize("end", [1, 3, 6])
def test_another_worker_goes_on_within_the_shard(driver, end):
    folder, source = driver
    with pytest.raises(Died):
        work(folder, source, Beats(end), every=0.0)
    safe = len(FeatureStore.open(folder / "s.zarr"))
    assert safe == min(end - 1, 5)
    beats = Beats()
    done = work(folder, source, beats)
    assert (done["written"], list(done["failed"])) == (5, ["bad.png"])
    assert beats.count == 6 - (end - 1)
    store = FeatureStore.open(folder / "s.zarr")
    assert store.keys() == [f"{number}.png" for number in range(5)]
    assert list(verify(store)) == []


STALL = 5.0


def watch(results=(), counts=lambda now: 0):
    """What is yielded when results are there from the start; at each look one second goes by."""
    now = [0.0]
    waiting = queue.Queue()
    for one in results:
        waiting.put(one)

    def clock():
        return now[0]

    def count():
        now[0] += 1
        return counts(now[0])

    return watched(waiting, count, lambda: "stands still", STALL, clock, 0.001), now


def test_a_run_in_which_nothing_moves_is_given_up():
    given, now = watch()
    with pytest.raises(BackendError, match="stands still"):
        next(given)
    assert now[0] == STALL + 1


def test_finished_images_are_movement_though_no_shard_is_reported():
    given, now = watch(counts=lambda now: int(min(now, 40)) // 4)  # one every four seconds, until the fortieth
    with pytest.raises(BackendError, match="stands still"):
        next(given)
    assert now[0] == 40 + STALL + 1


def test_a_count_that_cannot_be_asked_for_is_no_movement():
    def lost(now):
        raise RuntimeError("the actor is gone")

    given, now = watch(counts=lost)
    with pytest.raises(BackendError, match="stands still"):
        next(given)
    assert now[0] == STALL + 1


def test_reports_are_movement():
    given, now = watch([{"shard": 0}, {"shard": 1}])
    assert next(given) == {"shard": 0}
    now[0] = 100.0
    assert next(given) == {"shard": 1}
    with pytest.raises(BackendError, match="stands still"):
        next(given)
    assert now[0] == 100 + STALL + 1


def test_it_ends_when_all_is_reported():
    given, _ = watch([{"shard": 0}, None])
    assert list(given) == [{"shard": 0}]


@pytest.mark.parametrize(
    ("report", "kind", "words"),
    [
        (
            RuntimeError("no more actors\nat all"),
            BackendError,
            "Ray gave up: no more actors; what was finished is safe",
        ),
        ({"kind": "ImageError", "error": "no picture"}, ImageError, "^no picture$"),
    ],
)
def test_what_a_worker_reports_is_raised(report, kind, words):
    given, _ = watch([report])
    with pytest.raises(kind, match=words):
        next(given)


@pytest.mark.slow  # Ray takes some 20 s to start, be killed and recover
def test_a_worker_killed_during_the_run(tmp_path):
    pytest.importorskip("ray")
    done = subprocess.run(
        [sys.executable, "-m", "tests.features.extract.ray_case", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told == {"written": COUNT, "failed": 0, "killed": 1, "safe": COUNT}
    store = FeatureStore.open(tmp_path / "s.zarr")
    assert sorted(store.keys()) == [item.key for item in numbered_pictures(COUNT)]
    assert list(verify(store)) == []
    extract_to_store(FakePipeline(), numbered_pictures(COUNT), tmp_path / "whole.zarr", ExtractSettings(shard=8))
    whole = FeatureStore.open(tmp_path / "whole.zarr")
    assert {row.key: row.sha256 for row in store.rows} == {row.key: row.sha256 for row in whole.rows}
