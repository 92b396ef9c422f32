"""What a Ray worker does with its shard, without Ray."""

import pickle
from types import SimpleNamespace

import pytest

from difftap.features.extract import ExtractSettings
from difftap.features.extract.cluster import _Task, _Worker
from difftap.features.extract.stream import stream
from difftap.features.sources import open_source
from difftap.features.store import Encoding, FeatureStore, open_writer
from difftap.features.store.care import verify
from difftap.features.store.encoding import shapes_of
from tests.harness import FakePipeline, write_picture


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
