"""Extract a data set's features into a store, on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

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
from difftap.pipeline.pipeline import Provider
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

_REASONS = 5  # failures that a summary lists; the store has all of them
_WAITING = 256 << 20  # at most so many bytes of maps wait while a shard is written
_LARGE = 1 << 20  # from so many bytes, an image's maps take longer to encode than to pass to another thread
_CHANNELS, _STRIDE = 1280, 8  # assumed for a tap whose shape only running the network can tell


@dataclass(frozen=True)
class ExtractSettings:
    """How a data set is extracted.

    Attributes:
        encoding: how maps are stored.
        workers: threads that decode.
        every: finished images wait in memory for at most this many seconds before they are written.
        sample: number of images that a PCA is fitted on.
        strict: stop at the first image that cannot be used.
        retry: try again the images that failed in an earlier run.
        overwrite: delete a store that is there and start again.
        shard: rows per shard of a new store; None for about 64 MB.
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
        written: images that it added to the store.
        failed: images of the source that could not be used, in this run or an earlier one.
        skipped: images that the store held already.
        seconds: wall time of the run, without the opening of engines.
        reasons: key and reason of the first failures.
    """

    written: int
    failed: int
    skipped: int
    seconds: float
    reasons: tuple[str, ...] = ()


def rows_per_shard(recipe: Recipe, model: Checkpoint, encoding: Encoding) -> int:
    """Give the rows per shard of a new store."""
    return shard_rows(row_bytes(recipe, model, encoding))


def stored_stream(
    pipeline: Provider,
    items: Iterable[Item],
    settings: ExtractSettings,
    provenance: Provenance,
    bases: Mapping[str, Basis],
) -> Generator[Outcome, None, None]:
    """Yield the outcomes of `stream`, each with its maps encoded for a store.

    Up to a shard's images may wait for the store (less if that exceeds the memory limit), so that engines go on while
    a shard is written. Large maps are encoded in another thread; for small ones, passing them on would cost more.

    Args:
        pipeline: an open pipeline.
        items: the images.
        settings: how to extract.
        provenance: what the store holds.
        bases: its PCA bases, by array name.
    """
    encoding = provenance.encoding
    image = row_bytes(pipeline.recipe, pipeline.model, Encoding("float32"))
    kept = image if encoding.dtype == "float32" else image + row_bytes(pipeline.recipe, pipeline.model, encoding)
    waiting = max(2, min(provenance.shard, _WAITING // max(1, kept)))  # images, each with its float32 and encoded maps

    def encode(features: Features) -> StoredImage:
        return store_image(features, encoding, bases)

    if image < _LARGE:
        ready = max(2, waiting // int(pipeline.batch))  # the stream counts batches
        return as_stored(stream(pipeline, items, settings.workers, ready=ready), encode)
    return ahead(as_stored(stream(pipeline, items, settings.workers), encode), waiting, "encode")


def check_components(recipe: Recipe, model: Checkpoint, encoding: Encoding) -> None:
    """Check, before a store is made, that every tap has at least as many channels as PCA components.

    Raises:
        InputError: a tap has fewer.
    """
    for name in (name for branch in recipe.branches for name in branch.taps):
        channels = model.tap(name).channels
        if encoding.pca is not None and channels is not None and encoding.pca > channels:
            raise InputError(f"pca is {encoding.pca}; tap '{name}' has {channels} channels; allowed: 1 to {channels}")


def row_bytes(recipe: Recipe, model: Checkpoint, encoding: Encoding) -> int:
    """Estimate the bytes of one image in a store, before the network has run."""
    total = 0
    for branch in recipe.branches:
        for name in branch.taps:
            tap = model.tap(name)
            stride = tap.stride or _STRIDE
            cells = (recipe.size[0] // stride) * (recipe.size[1] // stride)
            total += (encoding.pca or tap.channels or _CHANNELS) * cells * np.dtype(encoding.dtype).itemsize
    return total


def extract_to_store(
    pipeline: Provider,
    source: Source,
    path: str | Path,
    settings: ExtractSettings | None = None,
    *,
    progress: Callable[[int], None] = lambda count: None,
) -> ExtractionSummary:
    """Extract a data set into a feature store, or continue a run that was stopped.

    Args:
        pipeline: an open `difftap.Pipeline`.
        source: the images.
        path: the store, a local folder or an fsspec address.
        settings: how to extract.
        progress: called with the number of records (features or failures) that became safe since the last call.

    Returns:
        what the run did.

    Raises:
        OutputError: the store cannot be written, was begun under other conditions, or is being written.
        ImageError, NonFiniteError, InputError: with ``strict``: an image cannot be used, its features hold NaN, or are
            too large for the store's number type. The images before it are safe.
        BackendError: the runtime failed. What was extracted is safe, and a later run continues.
    """
    settings = settings or ExtractSettings()
    began = time.monotonic()
    recipe: Recipe = pipeline.recipe
    check_components(recipe, pipeline.model, settings.encoding)
    _ = pipeline.stages  # raises now, before a store is made, if the recipe's prompts allow no store
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
    """Add an outcome to a store; return how many records became safe."""
    if outcome.stored is None:
        return writer.fail(outcome.item.key, str(outcome.fault))
    return writer.put(outcome.item.key, outcome.stored)


def tell(failed: Mapping[str, str]) -> tuple[str, ...]:
    """Describe the first few failures, one line each."""
    return tuple(f"{key}: {error}" for key, error in list(failed.items())[:_REASONS])


def remaining(source: Source, writer: StoreWriter, *, retry: bool) -> tuple[list[Item], int, dict[str, str]]:
    """Find out what a run has to do.

    Returns:
        the items that are left, the number that is done, and key -> reason of those that failed in earlier runs.
    """
    keys = {item.key for item in source}
    failed = {} if retry else {key: error for key, error in writer.failed.items() if key in keys}
    rest = [item for item in source if item.key not in writer.done and item.key not in failed]
    return rest, sum(key in writer.done for key in keys), failed


def ready_bases(pipeline: Provider, items: Sequence[Item], writer: StoreWriter, settings: ExtractSettings) -> None:
    """Fit the PCA bases of a store and make its arrays, if it has PCA and no bases yet."""
    if settings.encoding.pca is None or not items or writer.ready:
        return
    shapes, bases = fit_bases(pipeline, items, settings)
    if shapes:
        writer.prepare(shapes, bases)


def fit_bases(
    pipeline: Provider, items: Iterable[Item], settings: ExtractSettings
) -> tuple[dict[str, tuple[int, int, int]], dict[str, Basis]]:
    """Fit the PCA basis of each tap on the first usable images.

    Returns:
        the maps' shapes ``(C, h, w)`` and the bases, both by array name; both empty if no image can be used.

    Raises:
        InputError: a tap has fewer channels than components are wanted, or the sample not more cells.
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
    """Give the number of threads that decode: half the cores, so that an engine on the CPU has the rest; at most 8."""
    return max(1, min(8, available_cores() // 2))
