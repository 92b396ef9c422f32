"""Extract a data set into a store with Ray: the same stages in many processes, on one machine or on many.

The driver lists the images, cuts them into tasks of one shard each, and holds the store's lock. A Ray Data stage of
stateful actors takes the tasks. Each actor has its own engines; it extracts its shard's images, writes them, and then
writes the shard's page of the journal. Only keys, places and counts go through Ray, never features. If an actor dies,
Ray starts it again, and its task continues from the shard's page.

All machines must see the images and the store under the same paths.
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
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from difftap import errors
from difftap.artifacts.files import JsonObject
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
from difftap.features.store.encoding import Basis, shapes_of
from difftap.features.store.place import Place
from difftap.features.store.schema import ShardEntry, read_provenance, tap_arrays
from difftap.features.store.writer import Shard, open_writer
from difftap.machine import available_cores
from difftap.pipeline.environment import Runtime
from difftap.pipeline.fastest import AUTO
from difftap.pipeline.pipeline import Pipeline, Provider
from difftap.prompts.learned import pinned
from difftap.recipe import Recipe

if TYPE_CHECKING:
    from ray.actor import ActorHandle

__all__ = ["POLL", "Cluster", "extract_on_cluster", "raise_told", "told_of", "watched"]

# ---- telling a stalled run from a slow one, and errors that travel as data

POLL = 1.0
"""Seconds between two checks for progress."""


def told_of(error: DifftapError) -> dict[str, str]:
    """Turn an error into data, because Ray would wrap an exception in one of its own."""
    return {"kind": type(error).__name__, "error": str(error)}


def raise_told(told: JsonObject) -> None:
    """Raise the error that `told_of` turned into data."""
    kind = getattr(errors, told["kind"], BackendError)
    raise kind(told["error"])


def watched(
    results: queue.Queue[JsonObject | BaseException | None],
    count: Callable[[], int],
    standing: Callable[[], str],
    stall: float,
    clock: Callable[[], float] = time.monotonic,
    poll: float = POLL,
) -> Iterator[JsonObject]:
    """Yield the reports from a queue until None comes; give up if there is no progress for too long.

    Args:
        results: the workers' reports, or the error that ended them all, or None at the end.
        count: gives the number of finished images, reported or not. It may raise; then the number is unknown.
        standing: gives the text of the error if the run is given up.
        stall: give up after this many seconds without a report or a finished image.
        clock: gives the time in seconds.
        poll: seconds between two checks.

    Raises:
        BackendError: there is no progress, or Ray failed.
        DifftapError: a worker reports an error.
    """
    moved, seen = clock(), 0
    while True:
        try:
            done = results.get(timeout=poll)
        except queue.Empty:
            with suppress(Exception):  # the counting actor may be restarting on another machine
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


_OBJECTS = 80 << 20  # bytes of a local cluster's object store, near Ray's minimum, since only metadata goes there
_LOOKED_AT = 256  # images that a worker gets at once to find one that can be used


@dataclass(frozen=True)
class Cluster:
    """Which Ray cluster to use, and how much of it.

    Attributes:
        address: address of a running cluster; None for a local one that lives as long as the run.
        workers: number of actors; None for one per GPU, or two per machine if there is no GPU.
        stall: give up after this many seconds without a finished image.
    """

    address: str | None = None
    workers: int | None = None
    stall: float = 600.0


Opener = Callable[[], Provider]
"""Opens the pipeline in a worker."""


@dataclass(frozen=True)
class PipelineOpener:
    """Open a `difftap.Pipeline` in the process that calls this; it travels to workers, which a pipeline cannot."""

    recipe: Recipe
    runtime: Runtime

    def __call__(self) -> Pipeline:
        """Open the pipeline."""
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
    """Extract a data set into a feature store with Ray, or continue a run that was stopped.

    Args:
        recipe: the recipe that each worker opens.
        runtime: where each worker runs it.
        source: the images; every machine must find them under the same paths.
        path: the store, on a file system that all machines share, or an fsspec address.
        settings: how to extract.
        cluster: which Ray cluster.
        opener: opens the pipeline in a worker, instead of ``recipe`` and ``runtime``; it must be picklable.
        progress: called with the number of records that became safe since the last call.

    Returns:
        what the run did.

    Raises:
        MissingExtraError: Ray is not installed.
        OutputError, BackendError, ImageError: as for `difftap.features.extract.extract_to_store`.
        BackendError: also if no cluster can be reached or started, or the run makes no progress.
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
        # All workers must use the backend that the first one chose: one store holds the features of one backend.
        if isinstance(opener, PipelineOpener) and opener.runtime.backend == AUTO:
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
            # Absolute, because a worker starts in another folder.
            place = str(Path(path).resolve()) if Place(path).folder is not None else str(path)
            written = 0
            for done in _results(ray, share, tasks, (opener, place, settings, folder), cluster.stall):
                failed.update(done["failed"])
                written += done["written"]
                progress(done["written"] + len(done["failed"]))
            writer.finish()
    return ExtractionSummary(written, len(failed), skipped, time.monotonic() - began, tell(failed))


def _fair(shard: int, images: int, workers: int) -> int:
    """Give the rows of a shard: fewer than fit if there are so few images that some workers would have no shard."""
    return max(1, min(shard, -(-images // (4 * workers))))


@dataclass(frozen=True)
class _Share:
    """What each worker asks Ray for. It asks for a part of a CPU, or none is left for the tasks that feed workers."""

    workers: int
    cpus: float
    gpus: float
    threads: int = 1


@contextmanager
def _connected(cluster: Cluster) -> Iterator[tuple[ModuleType, _Share]]:
    """Connect to a Ray cluster or start one; disconnect or stop it at the end."""
    # No telemetry; GPUs stay visible to actors that ask for none; no log lines of Ray's own processes.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    ray = require("ray", "ray", "--ray")
    require("ray.data", "ray", "--ray")
    for name in ("ray", "ray.data"):  # our errors say in one line what went wrong
        logging.getLogger(name).setLevel(logging.CRITICAL)
    if ray.is_initialized():
        raise InputError("this process is connected to Ray already; call ray.shutdown() first")
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    try:
        if cluster.address is None:
            ray.init(
                address="local",  # without it, Ray would join a cluster that already runs on this machine
                num_cpus=max(2, available_cores()),
                object_store_memory=_OBJECTS,
                include_dashboard=False,
                **quiet,
            )
        else:
            ray.init(address=cluster.address, **quiet)
    except Exception as error:  # Ray raises errors of many kinds
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
        cpus = max(0.01, round(min(1.0, 0.5 * cores / workers), 2))  # all workers together ask for half of the cores
        yield ray, _Share(workers, cpus, min(1.0, gpus / workers), max(1, int(cores) // workers))
    finally:
        ray.shutdown()


@dataclass(frozen=True)
class _Found:
    """What only a worker can find out, since the driver opens no engines.

    Attributes:
        conditions: the pipeline's conditions.
        shard: rows per shard of a new store.
        shapes: the shape ``(C, h, w)`` of each map, by array name; empty if no image could be used.
        bases: the PCA bases, by array name.
    """

    conditions: JsonObject
    shard: int
    shapes: dict[str, tuple[int, int, int]]
    bases: dict[str, Basis]


def _enter(folder: str) -> None:
    """Change to the driver's folder, because paths may be relative and a worker starts in another one."""
    with suppress(OSError):  # this machine has no such folder; then only absolute paths work
        os.chdir(folder)


def _probe(opener: Opener, settings: ExtractSettings, folder: str, items: Sequence[Item]) -> _Found | dict[str, str]:
    """Run some images in a worker, to find out what `_Found` holds; return an error as data (`told_of`)."""
    _enter(folder)
    try:
        with closing(opener()) as pipeline:
            shapes: dict[str, tuple[int, int, int]] = {}
            bases: dict[str, Basis] = {}
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
    ray: ModuleType, share: _Share, job: tuple[Opener, ExtractSettings, str], items: Sequence[Item], stall: float
) -> _Found:
    """Let a worker run the first images; if none of them can be used, the next ones, and so on.

    They are sent in parts, because the list of a large data set would fill Ray's object store.
    """
    settings = job[1]
    # A PCA needs `sample` images that can be used; four times as many are sent, since some may be unusable.
    size = max(_LOOKED_AT, 4 * settings.sample if settings.encoding.pca is not None else 0)
    found = _ask(ray, share, (*job, items[:size]), stall)
    for start in range(size, len(items), size):
        if found.shapes:
            break
        found = _ask(ray, share, (*job, items[start : start + size]), stall)
    return found


def _ask(ray: ModuleType, share: _Share, question: tuple[object, ...], stall: float) -> _Found:
    """Run `_probe` in a worker, with the arguments ``question``."""
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


def _standing(ray: ModuleType, stall: float) -> str:
    """Write the error of a run without progress."""

    def told(resources: dict[str, float]) -> str:
        return ", ".join(f"{resources.get(name, 0):g} {name}" for name in ("CPU", "GPU"))

    with suppress(Exception):
        free, have = told(ray.available_resources()), told(ray.cluster_resources())
        return (
            f"no image was finished in {stall:g} s, so the run was given up ({free} free of {have} in the cluster); "
            "what was finished is safe; give fewer --ray-workers or a longer --stall, and run it again"
        )
    return f"no image was finished in {stall:g} s, and the cluster does not answer; what was finished is safe"


def _results(
    ray: ModuleType, share: _Share, tasks: Sequence[_Task], job: tuple[object, ...], stall: float
) -> Iterator[JsonObject]:
    """Run the tasks in a Ray Data stage of actors; yield the report of each task when it is finished."""
    if not tasks:
        return
    beats = ray.remote(num_cpus=0, max_restarts=-1)(_Beats).remote()
    results: queue.Queue[JsonObject | BaseException | None] = queue.Queue()

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
        except BaseException as error:  # the thread that reads the queue raises it
            results.put(error)

    # A thread, because iterating over Ray's results has no timeout, and a stalled run must be noticed.
    threading.Thread(target=consume, name="ray-results", daemon=True).start()
    yield from watched(
        results,
        lambda: ray.get(beats.read.remote(), timeout=POLL),
        lambda: _standing(ray, stall),
        stall,
    )


class _Beats:
    """Count the images that workers finish, so that a stalled run can be told from a slow one."""

    def __init__(self) -> None:
        self._count = 0

    def beat(self) -> None:
        """Count one more."""
        self._count += 1

    def read(self) -> int:
        """Give the count."""
        return self._count


class _Worker:
    """A stateful actor: it opens engines once, and then extracts one shard after the other."""

    def __init__(self, opener: Opener, path: str, settings: ExtractSettings, folder: str, beats: ActorHandle) -> None:
        _enter(folder)
        self._settings = settings
        self._place = Place(path)
        self._beats = beats
        self._pipeline: Provider | None = None
        self._opener = opener

    def __call__(self, batch: dict[str, Sequence[bytes]]) -> dict[str, NDArray[np.object_]]:
        """Extract the shards of a batch of tasks; give the report of each, pickled."""
        done = np.empty(len(batch["task"]), object)
        for number, task in enumerate(batch["task"]):
            try:
                if self._pipeline is None:
                    self._pipeline = self._opener()
                told = self._extract(self._pipeline, pickle.loads(task))  # noqa: S301 - what our own driver made
            except DifftapError as error:
                told = told_of(error)
            done[number] = pickle.dumps(told)
        return {"done": done}

    def _extract(self, pipeline: Provider, task: _Task) -> JsonObject:
        """Extract one shard; keep what an earlier try of it has written."""
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
        with closing(stored_stream(pipeline, rest, self._settings, provenance, bases)) as outcomes:
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
