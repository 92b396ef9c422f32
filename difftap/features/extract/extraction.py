"""A data set's features into a store, on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from difftap.backbones.checkpoint import Checkpoint
from difftap.engine import Features
from difftap.errors import InputError
from difftap.features.extract.stream import Outcome, ahead, as_stored, stream
from difftap.features.sources import Item, Source
from difftap.features.store.encoding import Basis, Encoding, Moments, StoredImage, shapes_of, store_image
from difftap.features.store.schema import Provenance
from difftap.features.store.writer import StoreWriter, open_writer, shard_rows
from difftap.machine import available_cores
from difftap.recipe import Recipe

__all__ = [
    "ExtractSettings",
    "ExtractionSummary",
    "check_components",
    "extract_to_store",
    "fit_bases",
    "rows_per_shard",
    "stored_stream",
]

_REASONS = 5  # of failures, told at the end of a run; the store has them all
_WAITING = 256 << 20  # most bytes of maps that wait while a shard is put on disk
_LARGE = 1 << 20  # bytes of an image's maps that take longer to encode than to hand to another thread
_CHANNELS, _STRIDE = 1280, 8  # taken where only running the network can tell a tap's shape


@dataclass(frozen=True)
class ExtractSettings:
    """How a data set is extracted.

    Attributes:
        encoding: how maps are stored.
        workers: threads that decode.
        every: most seconds that finished images wait in memory before they are put on disk.
        sample: images that a PCA is fitted on.
        strict: stop at the first image that cannot be used.
        retry: try images again that failed in an earlier run.
        overwrite: start afresh whatever store is there.
        shard: rows a shard of a new store; None for some 64 MB.
    """

    encoding: Encoding = field(default_factory=Encoding)
    workers: int = 2
    every: float = 30.0
    sample: int = 16
    strict: bool = False
    retry: bool = False
    overwrite: bool = False
    shard: int | None = None


@dataclass(frozen=True)
class ExtractionSummary:
    """What a run did.

    Attributes:
        written: images put into the store by it.
        failed: images of the source that could not be used, earlier runs' included.
        skipped: images that were there already.
        seconds: wall time of the run, engines already open.
        reasons: why the first of them failed.
    """

    written: int
    failed: int
    skipped: int
    seconds: float
    reasons: tuple[str, ...] = ()


def rows_per_shard(recipe: Recipe, model: Checkpoint, encoding: Encoding) -> int:
    """Rows a shard of a new store."""
    return shard_rows(row_bytes(recipe, model, encoding))


def stored_stream(
    pipeline: Any,
    items: Iterable[Item],
    settings: ExtractSettings,
    provenance: Provenance,
    bases: Mapping[str, Basis],
) -> Generator[Outcome, None, None]:
    """Yield the outcomes of `stream`, each with its maps as a store keeps them.

    As many may wait for the store as a shard holds, as far as memory goes: engines go on while one is written. Large
    maps are encoded by a thread of its own; of small ones, handing them over would cost more.

    Args:
        pipeline, items, settings: as `extract_to_store` takes them.
        provenance: of the store.
        bases: its PCA bases, by array name.
    """
    encoding = provenance.encoding
    image = row_bytes(pipeline.recipe, pipeline.model, Encoding("float32"))
    kept = image if encoding.dtype == "float32" else image + row_bytes(pipeline.recipe, pipeline.model, encoding)
    waiting = max(2, min(provenance.shard, _WAITING // max(1, kept)))  # images; encoded, they keep what they were, too

    def encode(features: Features) -> StoredImage:
        return store_image(features, encoding, bases)

    if image < _LARGE:
        ready = max(2, waiting // int(pipeline.batch))
        return as_stored(stream(pipeline, items, settings.workers, ready=ready), encode)
    return ahead(as_stored(stream(pipeline, items, settings.workers), encode), waiting, "encode")


def check_components(recipe: Recipe, model: Checkpoint, encoding: Encoding) -> None:
    """Make sure, before there is a store, that no tap has fewer channels than components are kept.

    Raises:
        InputError: one has.
    """
    for name in (name for branch in recipe.branches for name in branch.taps):
        channels = model.tap(name).channels
        if encoding.pca is not None and channels is not None and encoding.pca > channels:
            raise InputError(f"pca is {encoding.pca}; tap '{name}' has {channels} channels; allowed: 1 to {channels}")


def row_bytes(recipe: Recipe, model: Checkpoint, encoding: Encoding) -> int:
    """Bytes that one image takes in a store, as far as taps tell before the network has run."""
    total = 0
    for branch in recipe.branches:
        for name in branch.taps:
            tap = model.tap(name)
            stride = tap.stride or _STRIDE
            cells = (recipe.size[0] // stride) * (recipe.size[1] // stride)
            total += (encoding.pca or tap.channels or _CHANNELS) * cells * np.dtype(encoding.dtype).itemsize
    return total


def extract_to_store(
    pipeline: Any,
    source: Source,
    path: str | Path,
    settings: ExtractSettings | None = None,
    *,
    progress: Callable[[int], None] = lambda count: None,
) -> ExtractionSummary:
    """Extract a data set into a feature store, or go on where an earlier run was stopped.

    Args:
        pipeline: an open `difftap.Pipeline`.
        source: the images.
        path: the store, a local folder or an fsspec address.
        settings: how.
        progress: called with the number of records, features or failures, that have just become safe on disk.

    Raises:
        OutputError: the store cannot be written, was begun under other conditions, or is being written.
        ImageError, NonFiniteError, InputError: with ``strict``, an image cannot be used, its features hold NaN, or do
            not fit the store's number type. What came before it is safe.
        BackendError: the runtime failed; what was extracted is safe, and a later run goes on.
    """
    settings = settings or ExtractSettings()
    began = time.monotonic()
    recipe: Recipe = pipeline.recipe
    check_components(recipe, pipeline.model, settings.encoding)
    _ = pipeline.stages  # prompts under which no store can be made are refused before there is one
    with open_writer(
        path,
        pipeline.conditions,
        recipe.feature_fields(),
        settings.encoding,
        shard=settings.shard or rows_per_shard(recipe, pipeline.model, settings.encoding),
        every=settings.every,
        overwrite=settings.overwrite,
    ) as writer:
        rest, skipped, failed = remaining(source, writer, retry=settings.retry)
        progress(len(source) - len(rest))
        writer.reserve(-(-len(rest) // writer.provenance.shard))
        ready_bases(pipeline, rest, writer, settings)
        written = 0
        with closing(stored_stream(pipeline, rest, settings, writer.provenance, writer.bases)) as outcomes:
            for outcome in outcomes:
                if outcome.stored is None:
                    failed[outcome.item.key] = str(outcome.fault)
                    if settings.strict and outcome.fault is not None:
                        writer.fail(outcome.item.key, str(outcome.fault))
                        raise outcome.fault
                safe = keep(writer, outcome)
                if safe:
                    progress(safe)
                written += outcome.stored is not None
        progress(writer.finish())
    return ExtractionSummary(written, len(failed), skipped, time.monotonic() - began, tell(failed))


def keep(writer: StoreWriter, outcome: Outcome) -> int:
    """Put an outcome into a store; how many records became safe by it."""
    if outcome.stored is None:
        return writer.fail(outcome.item.key, str(outcome.fault))
    return writer.put(outcome.item.key, outcome.stored)


def tell(failed: Mapping[str, str]) -> tuple[str, ...]:
    """Return the first few failures, a line each."""
    return tuple(f"{key}: {error}" for key, error in list(failed.items())[:_REASONS])


def remaining(source: Source, writer: StoreWriter, *, retry: bool) -> tuple[list[Item], int, dict[str, str]]:
    """Tell what a run has to do: the items that are left, how many are done, and which failed before."""
    keys = {item.key for item in source}
    failed = {} if retry else {key: error for key, error in writer.failed.items() if key in keys}
    rest = [item for item in source if item.key not in writer.done and item.key not in failed]
    return rest, sum(key in writer.done for key in keys), failed


def ready_bases(pipeline: Any, items: Sequence[Item], writer: StoreWriter, settings: ExtractSettings) -> None:
    """Of a store with PCA that has no bases yet, fit them and make the arrays."""
    if settings.encoding.pca is None or not items or writer.ready:
        return
    shapes, bases = fit_bases(pipeline, items, settings)
    if shapes:
        writer.prepare(shapes, bases)


def fit_bases(
    pipeline: Any, items: Iterable[Item], settings: ExtractSettings
) -> tuple[dict[str, tuple[int, int, int]], dict[str, Basis]]:
    """Fit the PCA bases of each tap, from the first usable images, and the maps' shapes; empty if there is none.

    Raises:
        InputError: a tap has fewer channels, or the sample fewer cells, than components are asked for.
    """
    shapes: dict[str, tuple[int, int, int]] = {}
    moments: dict[str, Moments] = {}
    seen = 0
    with closing(stream(pipeline, items, settings.workers)) as outcomes:
        for outcome in outcomes:
            if outcome.features is None:
                continue
            shapes = shapes_of(outcome.features)
            for number, taps in enumerate(outcome.features.branches):
                for tap, one in taps.items():
                    moments.setdefault(f"{number}/{tap}", Moments()).add(one.data)
            seen += 1
            if seen >= settings.sample:
                break
    components = settings.encoding.pca or 0
    return shapes, {name: one.basis(components) for name, one in moments.items()}


def default_workers() -> int:
    """Threads that decode: half the cores, at most 8; decoding must not take cores from an engine on a CPU."""
    return max(1, min(8, available_cores() // 2))
