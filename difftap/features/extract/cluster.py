"""A data set's features into a store with Ray: the same stages in many processes, on one machine or on many.

The driver lists the images, cuts them into tasks of a shard each, and holds the store's lock. A Ray Data stage of
stateful actors, each with engines of its own, takes the tasks: an actor extracts its shard's images, writes them, then
writes the shard's page of the journal. Only keys, places and counts go through Ray. An actor that dies is started anew
by Ray, and its task goes on from the shard's page.

Every machine must see the images and the store under the same paths.
"""

from __future__ import annotations

import logging
import os
import pickle
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from difftap import errors
from difftap.errors import BackendError, DifftapError, InputError, first_line, require
from difftap.features.extract.extraction import (
    ExtractionSummary,
    ExtractSettings,
    check_components,
    fit_bases,
    remaining,
    rows_per_shard,
    stored_stream,
    tell,
)
from difftap.features.extract.stream import stream
from difftap.features.sources import Item, Source
from difftap.features.store.encoding import shapes_of
from difftap.features.store.place import Place
from difftap.features.store.schema import ShardEntry, read_provenance, tap_arrays
from difftap.features.store.writer import Shard, open_writer
from difftap.machine import available_cores
from difftap.pipeline.environment import Runtime
from difftap.pipeline.fastest import AUTO
from difftap.pipeline.pipeline import Pipeline
from difftap.prompts.learned import pinned
from difftap.recipe import Recipe

__all__ = ["POLL", "Cluster", "extract_on_cluster", "raise_told", "told_of", "watched"]

# ---- a run that stands still told from a slow one, and errors that travel as data

POLL = 1.0
"""Seconds between looks at whether anything moves."""


def told_of(error: DifftapError) -> dict[str, str]:
    """Write an error down as data: Ray would wrap it."""
    return {"kind": type(error).__name__, "error": str(error)}


def raise_told(told: dict[str, str]) -> None:
    """Raise what `told_of` took down."""
    kind = getattr(errors, told["kind"], BackendError)
    raise kind(told["error"])


def watched(
    results: queue.Queue[Any],
    count: Callable[[], int],
    standing: Callable[[], str],
    stall: float,
    clock: Callable[[], float] = time.monotonic,
    poll: float = POLL,
) -> Iterator[Any]:
    """Yield what comes through a queue, until None comes; give up when nothing moves for too long.

    Args:
        results: what workers report, or the error that ended them all.
        count: how many images are finished, reported or not; it may fail, and then nothing is known.
        standing: what to say when the run is given up.
        stall: seconds in which neither a report nor a finished image has come.
        clock: tells the time in seconds.
        poll: seconds between looks.

    Raises:
        BackendError: nothing moves, or Ray gave up.
        DifftapError: a worker reports one.
    """
    moved, seen = clock(), 0
    while True:
        try:
            done = results.get(timeout=poll)
        except queue.Empty:
            with suppress(Exception):  # the actor that counts may be on its way to another machine
                now = count()
                if now != seen:
                    moved, seen = clock(), now
            if clock() - moved > stall:
                raise BackendError(standing()) from None
            continue
        moved = clock()
        if done is None:
            return
        if isinstance(done, BaseException):
            raise BackendError(f"Ray gave up: {first_line(done)}; what was finished is safe") from done
        if "kind" in done:
            raise_told(done)
        yield done


_OBJECTS = 80 << 20  # bytes of a local cluster's object store: near the least that Ray takes; only metadata goes there
_LOOKED_AT = 256  # images that a worker may try before it finds one that can be used


@dataclass(frozen=True)
class Cluster:
    """Which Ray, and how much of it.

    Attributes:
        address: of a running cluster; None for a local one that lives as long as the run.
        workers: actors; None for one a GPU, or two a machine where there is none.
        stall: seconds without a finished image after which the run is given up.
    """

    address: str | None = None
    workers: int | None = None
    stall: float = 600.0


Opener = Callable[[], Any]
"""Opens the pipeline, in a worker."""


@dataclass(frozen=True)
class PipelineOpener:
    """Opens a `difftap.Pipeline` where it is called."""

    recipe: Recipe
    runtime: Runtime

    def __call__(self) -> Pipeline:
        """Open it."""
        return Pipeline.open(self.recipe, self.runtime)


@dataclass(frozen=True)
class _Task:
    """A shard and the images that go into it."""

    shard: int
    items: tuple[Item, ...]


def extract_on_cluster(
    recipe: Recipe,
    runtime: Runtime,
    source: Source,
    path: str | Path,
    settings: ExtractSettings | None = None,
    cluster: Cluster | None = None,
    *,
    opener: Opener | None = None,
    progress: Callable[[int], None] = lambda count: None,
) -> ExtractionSummary:
    """Extract a data set into a feature store with Ray, or go on where an earlier run was stopped.

    Args:
        recipe, runtime: what each worker opens, as `difftap.Pipeline.open` takes it.
        source: the images; every machine must find them under the same paths.
        path: the store, on a file system that all machines share, or an fsspec address.
        settings: how.
        cluster: which Ray.
        opener: what opens a pipeline in a worker, in place of the first arguments; it must be picklable.
        progress: called with the number of records that have just become safe.

    Raises:
        MissingExtraError: Ray is not installed.
        OutputError, BackendError, ImageError: as `difftap.features.extract.extract_to_store` does.
        BackendError: also where no cluster can be reached or started, or the run stands still.
    """
    settings, cluster = settings or ExtractSettings(), cluster or Cluster()
    recipe = pinned(recipe)
    began = time.monotonic()
    with _connected(cluster) as (ray, share):
        threads = runtime.threads or share.threads
        opener = opener or PipelineOpener(recipe, replace(runtime, threads=threads))
        items = list(source)
        folder = os.getcwd()  # noqa: PTH109 - sent as text
        found = _look(ray, share, (opener, settings, folder), items, cluster.stall)
        if isinstance(opener, PipelineOpener) and opener.runtime.backend == AUTO:  # what one chose, all take
            chosen = found.conditions["backend"]
            opener = replace(opener, runtime=replace(opener.runtime, backend=chosen["name"], device=chosen["device"]))
        with open_writer(
            path,
            found.conditions,
            recipe.feature_fields(),
            settings.encoding,
            shard=settings.shard or _fair(found.shard, len(items), share.workers),
            every=settings.every,
            overwrite=settings.overwrite,
        ) as writer:
            rest, skipped, failed = remaining(source, writer, retry=settings.retry)
            progress(len(source) - len(rest))
            size, first = writer.provenance.shard, writer.next_shard
            tasks = [
                _Task(first + number, tuple(rest[start : start + size]))
                for number, start in enumerate(range(0, len(rest), size))
            ]
            writer.reserve(len(tasks))
            if tasks and not writer.ready:
                if not found.shapes:
                    raise InputError(
                        f"none of the {len(items)} images could be used where a worker looked at them, so nothing "
                        "tells how large the maps are; do all machines find the images under the same paths?"
                    )
                writer.prepare(found.shapes, found.bases)
            place = str(Path(path).resolve()) if Place(path).folder is not None else str(path)
            written = 0
            for done in _results(ray, share, tasks, (opener, place, settings, folder), cluster.stall):
                failed.update(done["failed"])
                written += done["written"]
                progress(done["written"] + len(done["failed"]))
            writer.finish()
    return ExtractionSummary(written, len(failed), skipped, time.monotonic() - began, tell(failed))


def _fair(shard: int, images: int, workers: int) -> int:
    """Rows a shard: fewer than fit where there are so few images that workers would have nothing to do."""
    return max(1, min(shard, -(-images // (4 * workers))))


@dataclass(frozen=True)
class _Share:
    """What a worker asks Ray for. Whole CPUs would leave none for the tasks that feed the workers."""

    workers: int
    cpus: float
    gpus: float
    threads: int = 1


@contextmanager
def _connected(cluster: Cluster) -> Iterator[tuple[Any, _Share]]:
    """Connect to Ray, or start it; leave it, or stop it, at the end."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    ray = require("ray", "ray", "--ray")
    require("ray.data", "ray", "--ray")
    for name in ("ray", "ray.data"):  # what went wrong is told by us, in one line
        logging.getLogger(name).setLevel(logging.CRITICAL)
    if ray.is_initialized():
        raise InputError("this process is connected to Ray already; call ray.shutdown() first")
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    try:
        if cluster.address is None:
            ray.init(
                address="local",  # or it would join one that is noted to run on this machine
                num_cpus=max(2, available_cores()),
                object_store_memory=_OBJECTS,
                include_dashboard=False,
                **quiet,
            )
        else:
            ray.init(address=cluster.address, **quiet)
    except Exception as error:  # Ray's kinds are many
        with suppress(Exception):
            ray.shutdown()
        where = f"reached at '{cluster.address}'" if cluster.address else "started here"
        token = "; one with token authentication needs RAY_AUTH_MODE=token" if cluster.address else ""
        raise BackendError(f"Ray cannot be {where}: {first_line(error)}{token}") from error
    try:
        have = ray.cluster_resources()
        gpus = int(have.get("GPU", 0))
        machines = sum(bool(one["Alive"]) and "CPU" in one["Resources"] for one in ray.nodes())
        workers = cluster.workers or gpus or 2 * max(1, machines)
        cores = float(have.get("CPU", 1))
        cpus = max(0.01, round(min(1.0, 0.5 * cores / workers), 2))
        yield ray, _Share(workers, cpus, min(1.0, gpus / workers), max(1, int(cores) // workers))
    finally:
        ray.shutdown()


@dataclass(frozen=True)
class _Found:
    """What only a worker can tell: where and what it runs, and the maps' shapes."""

    conditions: dict[str, Any]
    shard: int
    shapes: dict[str, tuple[int, int, int]]
    bases: dict[str, Any]


def _enter(folder: str) -> None:
    """Go where the driver is: a cluster's workers stand where it was started, and paths may be relative."""
    with suppress(OSError):  # not on this machine; then only whole paths lead anywhere
        os.chdir(folder)


def _probe(opener: Opener, settings: ExtractSettings, folder: str, items: Sequence[Item]) -> Any:
    """Look at the first images in a worker; the error, if any, as data: Ray would wrap it."""
    _enter(folder)
    try:
        with closing(opener()) as pipeline:
            shapes: dict[str, tuple[int, int, int]] = {}
            bases: dict[str, Any] = {}
            if settings.encoding.pca is not None:
                shapes, bases = fit_bases(pipeline, items, settings)
            else:
                with closing(stream(pipeline, items, 1)) as outcomes:
                    shapes = next((shapes_of(one.features) for one in outcomes if one.features is not None), {})
            check_components(pipeline.recipe, pipeline.model, settings.encoding)
            shard = rows_per_shard(pipeline.recipe, pipeline.model, settings.encoding)
            return _Found(pipeline.conditions, shard, shapes, bases)
    except DifftapError as error:
        return told_of(error)


def _look(
    ray: Any, share: _Share, job: tuple[Opener, ExtractSettings, str], items: Sequence[Item], stall: float
) -> _Found:
    """Ask a worker about the first images; about the next ones, where none of them can be used.

    Not all are sent at once: the list of a large data set would fill the object store.
    """
    settings = job[1]
    size = max(_LOOKED_AT, 4 * settings.sample if settings.encoding.pca is not None else 0)
    found = _ask(ray, share, (*job, items[:size]), stall)
    for start in range(size, len(items), size):
        if found.shapes:
            break
        found = _ask(ray, share, (*job, items[start : start + size]), stall)
    return found


def _ask(ray: Any, share: _Share, question: tuple[Any, ...], stall: float) -> _Found:
    """Run the probe in a worker."""
    task = ray.remote(num_cpus=share.cpus, num_gpus=share.gpus, max_retries=3)(_probe).remote(*question)
    try:
        found = ray.get(task, timeout=stall)
    except ray.exceptions.GetTimeoutError as error:
        raise BackendError(_standing(ray, stall)) from error
    except ray.exceptions.RayError as error:
        raise BackendError(f"a Ray worker failed before the first image: {first_line(error)}") from error
    if isinstance(found, dict):
        raise_told(found)
    answer: _Found = found
    return answer


def _standing(ray: Any, stall: float) -> str:
    def told(resources: dict[str, float]) -> str:
        return ", ".join(f"{resources.get(name, 0):g} {name}" for name in ("CPU", "GPU"))

    with suppress(Exception):
        free, have = told(ray.available_resources()), told(ray.cluster_resources())
        return (
            f"no image was finished in {stall:g} s, so the run was given up ({free} free of {have} in the cluster); "
            "what was finished is safe; give fewer --ray-workers or a longer --stall, and run it again"
        )
    return f"no image was finished in {stall:g} s, and the cluster does not answer; what was finished is safe"


def _results(ray: Any, share: _Share, tasks: Sequence[_Task], job: tuple[Any, ...], stall: float) -> Iterator[Any]:
    """Run the tasks in a Ray Data stage of actors; yields what each reports, as they finish."""
    if not tasks:
        return
    beats = ray.remote(num_cpus=0, max_restarts=-1)(_Beats).remote()
    results: queue.Queue[Any] = queue.Queue()

    def consume() -> None:
        try:
            context = ray.data.DataContext.get_current()
            context.enable_progress_bars = False
            context.print_on_execution_start = False
            rows = [{"task": pickle.dumps(task)} for task in tasks]
            made = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
                _Worker,
                fn_constructor_args=(*job, beats),
                batch_size=1,
                compute=ray.data.ActorPoolStrategy(size=min(share.workers, len(rows))),
                num_cpus=share.cpus,
                num_gpus=share.gpus or None,
            )
            for batch in made.iter_batches(batch_size=None, prefetch_batches=0):
                for row in batch["done"]:
                    results.put(pickle.loads(row))  # noqa: S301 - what our own worker made
            results.put(None)
        except BaseException as error:  # raised by who waits for results
            results.put(error)

    threading.Thread(target=consume, name="ray-results", daemon=True).start()
    yield from watched(
        results,
        lambda: ray.get(beats.read.remote(), timeout=POLL),
        lambda: _standing(ray, stall),
        stall,
    )


class _Beats:
    """Counts the images that workers finish, so that a run that stands still can be told from a slow one."""

    def __init__(self) -> None:
        self._count = 0

    def beat(self) -> None:
        """One more."""
        self._count += 1

    def read(self) -> int:
        """How many so far."""
        return self._count


class _Worker:
    """A stateful actor: engines opened once, then one shard after the other."""

    def __init__(self, opener: Opener, path: str, settings: ExtractSettings, folder: str, beats: Any) -> None:
        _enter(folder)
        self._settings = settings
        self._place = Place(path)
        self._beats = beats
        self._pipeline: Any = None
        self._opener = opener

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Extract the shards of a batch of tasks; what became of each, pickled."""
        import numpy as np

        done = np.empty(len(batch["task"]), object)
        for number, task in enumerate(batch["task"]):
            try:
                if self._pipeline is None:
                    self._pipeline = self._opener()
                told: dict[str, Any] = self._extract(pickle.loads(task))  # noqa: S301 - what our own driver made
            except DifftapError as error:
                told = told_of(error)
            done[number] = pickle.dumps(told)
        return {"done": done}

    def _extract(self, task: _Task) -> dict[str, Any]:
        """One shard: what an earlier try of it committed is kept."""
        group = self._place.open(read_only=False)
        if group is None:
            raise BackendError(f"a worker does not see the store '{self._place}'; put it where all machines have it")
        provenance = read_provenance(group, self._place)
        page = ShardEntry.parse(
            str(group["journal"][task.shard]), f"page {task.shard} of the journal in '{self._place}'"
        )
        arrays = tap_arrays(group, provenance, self._place)
        shard = Shard(group, self._place, provenance, arrays, task.shard, page)
        known = {row.key for row in page.rows} | {failure.key for failure in page.failures}
        failed = {failure.key: failure.error for failure in page.failures}
        rest = [item for item in task.items if item.key not in known]
        since = time.monotonic()
        bases = {array.name: array.basis for array in arrays if array.basis is not None}
        with closing(stored_stream(self._pipeline, rest, self._settings, provenance, bases)) as outcomes:
            for outcome in outcomes:
                if outcome.stored is None:
                    failed[outcome.item.key] = str(outcome.fault)
                    shard.fail(outcome.item.key, str(outcome.fault))
                    if self._settings.strict and outcome.fault is not None:
                        shard.commit()
                        raise outcome.fault
                else:
                    shard.add(outcome.item.key, outcome.stored)
                self._beats.beat.remote()
                if time.monotonic() - since >= self._settings.every:
                    shard.commit()
                    since = time.monotonic()
        shard.commit()
        return {"shard": task.shard, "written": len(task.items) - len(failed), "failed": failed}
