"""Extraction on Ray: a worker's shard, a run that is given up, the driver (all without Ray), a worker killed."""

import functools
import json
import pickle
import queue
import subprocess
import sys
from types import SimpleNamespace

import pytest

from difftap.errors import BackendError, ImageError, InputError
from difftap.features.extract import ExtractSettings, cluster, extract_to_store
from difftap.features.extract.cluster import Cluster, _Task, _Worker, extract_on_cluster, watched
from difftap.features.extract.stream import stream
from difftap.features.sources import Item, Source, open_source
from difftap.features.store import Encoding, FeatureStore, open_writer
from difftap.features.store.care import verify
from difftap.features.store.encoding import shapes_of
from difftap.pipeline.environment import Runtime
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


class StandIn:
    """What difftap asks of the package ``ray``, and notes of how it was asked."""

    def __init__(self, cpus=8.0, gpus=0.0, machines=1):
        self.have = {"CPU": cpus, **({"GPU": gpus} if gpus else {})}
        self.machines = machines
        self.up = False
        self.begun, self.actors, self.tasks = [], [], []
        self.trouble = None  # raised in place of an answer
        self.exceptions = SimpleNamespace(
            RayError=type("RayError", (Exception,), {}), GetTimeoutError=type("GetTimeoutError", (Exception,), {})
        )
        context = SimpleNamespace()
        self.data = SimpleNamespace(
            DataContext=SimpleNamespace(get_current=lambda: context),
            ActorPoolStrategy=lambda size: size,
            from_items=self._rows,
        )

    def is_initialized(self):
        return self.up

    def init(self, **options):
        if self.trouble is not None:
            raise self.trouble
        self.up = True
        self.begun.append(options)

    def shutdown(self):
        self.up = False

    def cluster_resources(self):
        return self.have

    def available_resources(self):
        return {"CPU": 1.0}

    def nodes(self):
        dead, none = {"Alive": False, "Resources": {"CPU": 8.0}}, {"Alive": True, "Resources": {}}
        return [{"Alive": True, "Resources": {"CPU": 8.0}}] * self.machines + [dead, none]

    def remote(self, **options):
        def made(what):
            def answer(*given):
                if isinstance(what, type):
                    one = what(*given)
                    return SimpleNamespace(beat=SimpleNamespace(remote=one.beat), read=SimpleNamespace(remote=one.read))
                self.tasks.append((options, given))
                return what(*pickle.loads(pickle.dumps(given)))

            return SimpleNamespace(remote=answer)

        return made

    def get(self, answer, timeout):
        if self.trouble is not None:
            raise self.trouble
        return answer

    def _rows(self, rows, override_num_blocks):
        assert override_num_blocks == len(rows)

        def map_batches(kind, *, fn_constructor_args, batch_size, compute, num_cpus, num_gpus):
            assert batch_size == 1
            self.actors.append((compute, num_cpus, num_gpus))
            worker = kind(*fn_constructor_args)

            def iter_batches(batch_size, prefetch_batches):
                for row in rows:
                    yield worker({"task": [row["task"]]})

            return SimpleNamespace(iter_batches=iter_batches)

        return SimpleNamespace(map_batches=map_batches)


@pytest.fixture
def ray(monkeypatch):
    """Puts a stand-in in Ray's place."""

    def choose(**options):
        made = StandIn(**options)
        monkeypatch.setitem(sys.modules, "ray", made)
        monkeypatch.setitem(sys.modules, "ray.data", made.data)
        return made

    return choose


class Broken:
    """An image that cannot be read, as a picklable place."""

    def load(self):
        raise ImageError("no picture")


def extract(source, path, *, workers=None, address=None, progress=lambda count: None, **settings):
    return extract_on_cluster(
        FakePipeline().recipe, Runtime(), source, path, ExtractSettings(**settings), Cluster(address, workers),
        opener=FakePipeline, progress=progress,
    )  # fmt: skip


def with_bad(count, *bad):
    items = list(numbered_pictures(count))
    return Source("made", [Item(item.key, Broken()) if k in bad else item for k, item in enumerate(items)])


def rows_of(path):
    return {row.key: row.sha256 for row in FeatureStore.open(path).rows}


def test_the_store_is_what_one_process_makes_and_a_second_run_adds_the_rest(ray, tmp_path):
    made, safe = ray(), []
    first = extract(with_bad(7, 2), tmp_path / "s.zarr", shard=3, progress=safe.append)
    assert (first.written, first.failed, first.skipped) == (6, 1, 0)
    assert first.reasons == ("0000002: no picture",)
    assert safe == [0, 3, 3, 1]  # what was there already, then shard by shard
    assert made.actors == [(2, 1.0, None)]  # two workers a machine, though three tasks
    assert not made.up
    second = extract(numbered_pictures(10), tmp_path / "s.zarr", shard=3)  # the failed one is not tried again
    assert (second.written, second.failed, second.skipped) == (3, 1, 6)
    assert list(verify(FeatureStore.open(tmp_path / "s.zarr"))) == []
    extract_to_store(FakePipeline(), with_bad(10, 2), tmp_path / "one.zarr", ExtractSettings(shard=3))
    assert rows_of(tmp_path / "s.zarr") == rows_of(tmp_path / "one.zarr")
    assert len(rows_of(tmp_path / "s.zarr")) == 9


def test_a_basis_is_found_by_a_worker(ray, tmp_path):
    ray()
    settings = {"encoding": Encoding("float32", pca=2), "sample": 3, "shard": 3}
    extract(numbered_pictures(5), tmp_path / "s.zarr", **settings)
    extract_to_store(FakePipeline(), numbered_pictures(5), tmp_path / "one.zarr", ExtractSettings(**settings))
    assert rows_of(tmp_path / "s.zarr") == rows_of(tmp_path / "one.zarr")


@pytest.mark.parametrize(
    ("have", "workers", "share"),
    [
        # workers, CPUs and GPUs of each: half the cores are left to Ray's own tasks; at most one core is asked for
        ({"cpus": 8.0}, None, (2, 1.0, None)),
        ({"cpus": 8.0, "machines": 3}, None, (6, 0.67, None)),
        ({"cpus": 8.0, "gpus": 4.0}, None, (4, 1.0, 1.0)),
        ({"cpus": 8.0, "gpus": 1.0}, 4, (4, 1.0, 0.25)),
        ({"cpus": 2.0}, 4, (4, 0.25, None)),
    ],
)
def test_what_a_worker_asks_ray_for(ray, tmp_path, have, workers, share):
    made = ray(**have)
    extract(numbered_pictures(40), tmp_path / "s.zarr", workers=workers, shard=4)
    assert made.actors == [share]
    assert made.begun[0]["address"] == "local"
    assert made.tasks[0][0] == {"num_cpus": share[1], "num_gpus": share[2] or 0.0, "max_retries": 3}


def test_rows_of_a_shard_leave_no_worker_without_work():
    # rows that fit, images, workers: at least four shards a worker
    for (fit, images, workers), rows in {
        (100, 1000, 2): 100,
        (100, 80, 2): 10,
        (100, 81, 2): 11,
        (100, 3, 2): 1,
    }.items():
        assert cluster._fair(fit, images, workers) == rows


def test_the_next_images_are_looked_at_where_the_first_are_no_good(ray, tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "_LOOKED_AT", 2)
    made = ray()
    run = extract(with_bad(7, 0, 1, 2, 3), tmp_path / "s.zarr", shard=4)
    assert (run.written, run.failed) == (3, 4)
    assert [[item.key for item in given[3]] for _, given in made.tasks] == [
        ["0000000", "0000001"], ["0000002", "0000003"], ["0000004", "0000005"]
    ]  # fmt: skip
    with pytest.raises(InputError, match="none of the 2 images could be used where a worker looked"):
        extract(with_bad(2, 0, 1), tmp_path / "none.zarr")


def test_what_cannot_be_is_said_in_one_line(ray, tmp_path):
    made = ray()
    made.up = True
    with pytest.raises(InputError, match="connected to Ray already"):
        extract(numbered_pictures(1), tmp_path / "s.zarr")
    made.up, made.trouble = False, ConnectionError("refused\nby the head")
    with pytest.raises(BackendError, match=r"Ray cannot be started here: refused$"):
        extract(numbered_pictures(1), tmp_path / "s.zarr")
    with pytest.raises(BackendError, match=r"reached at 'ray://x': refused; .* RAY_AUTH_MODE=token"):
        extract(numbered_pictures(1), tmp_path / "s.zarr", address="ray://x")
    made = ray()
    get = made.get
    for kind, words in (
        ("GetTimeoutError", r"no image was finished in 600 s, .*\(1 CPU, 0 GPU free of 8 CPU, 0 GPU in the cluster\)"),
        ("RayError", "a Ray worker failed before the first image: gone"),
    ):
        made.get = functools.partial(_raise, getattr(made.exceptions, kind)("gone"))
        with pytest.raises(BackendError, match=words):
            extract(numbered_pictures(1), tmp_path / "s.zarr")
    made.get = get
    with pytest.raises(InputError, match="99 components are asked for"):  # a worker's own error comes as it is
        extract(numbered_pictures(1), tmp_path / "s.zarr", encoding=Encoding(pca=99))
    with pytest.raises(ImageError, match="no picture"):
        extract(with_bad(3, 1), tmp_path / "s.zarr", strict=True)
    assert not made.up


def _raise(error, *_given, **_options):
    raise error


def test_a_worker_that_does_not_see_the_store(tmp_path):
    worker = cluster._Worker(FakePipeline, str(tmp_path / "s.zarr"), ExtractSettings(), ".", None)
    [done] = worker({"task": [pickle.dumps(cluster._Task(0, ()))]})["done"]
    with pytest.raises(BackendError, match="does not see the store"):
        cluster.raise_told(pickle.loads(done))


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
