"""Images in, features out, with decoding, the VAE and the UNet at work at the same time.

The features are those of `difftap.Pipeline.features`, bit for bit where a CPU takes one image at a time. An image that
cannot be used becomes an outcome with its reason, in its place, and does no harm to the others of its batch.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from difftap.engine import Encoded, Features, Featurizer, Laid
from difftap.errors import DifftapError, ImageError, InputError, NonFiniteError
from difftap.features.extract.threads import ahead, in_order
from difftap.features.sources import Item
from difftap.features.store.image import StoredImage

__all__ = ["Opened", "Outcome", "as_stored", "stream"]

_DECODED = 2  # batches decoded in advance, beside those that the workers are at


class Opened(Protocol):
    """What a stream needs of an open `difftap.Pipeline`.

    Attributes:
        batch: images per engine run.
        conditions: where it runs, among others.
    """

    @property
    def batch(self) -> int: ...  # noqa: D102

    @property
    def conditions(self) -> dict[str, Any]: ...  # noqa: D102

    @property
    def stages(self) -> Featurizer: ...  # noqa: D102


@dataclass(frozen=True)
class Outcome:
    """What became of one image: its features, as a store keeps them too perhaps, or the fault that it has none by."""

    item: Item
    features: Features | None = None
    fault: DifftapError | None = None
    stored: StoredImage | None = None


@dataclass(frozen=True)
class _Batch:
    """Some outcomes, in order; those still without a fault have their place in what the last stage made."""

    outcomes: tuple[Outcome, ...]
    laid: Laid | None = None
    encoded: Encoded | None = None


def stream(
    pipeline: Opened, items: Iterable[Item], workers: int = 2, depth: int = 2, ready: int | None = None
) -> Generator[Outcome, None, None]:
    """One outcome an item, in order.

    Args:
        pipeline: an open `difftap.Pipeline`.
        items: what to extract; taken as they are needed.
        workers: threads that decode.
        depth: batches that may wait between two stages.
        ready: batches that may wait at the end, for who takes them now and then only; ``depth`` if None.

    Raises:
        BackendError: the runtime failed, which is no image's fault. What came before it has been yielded.
    """
    featurizer = pipeline.stages

    def decode(item: Item) -> _Batch:
        try:
            return _Batch((Outcome(item),), featurizer.lay([item.at.load()]))
        except ImageError as error:
            return _Batch((Outcome(item, fault=error),))

    decoded = in_order(decode, items, workers, workers + _DECODED * pipeline.batch)
    encoded = ahead(_each(_encoder(featurizer), _together(decoded, pipeline.batch)), depth, "vae")
    done = ahead(_each(_tapper(featurizer), encoded), ready or depth, "unet")
    with closing(decoded), closing(encoded), closing(done):  # from the last stage to the first, each ended by itself
        for batch in done:
            yield from batch.outcomes


def as_stored(
    outcomes: Generator[Outcome, None, None], encode: Callable[[Features], StoredImage]
) -> Generator[Outcome, None, None]:
    """The outcomes with their maps as a store keeps them.

    Args:
        outcomes: of `stream`; closed at the end.
        encode: what it is done with (`difftap.features.store.image.store_image`); a map that cannot be stored is a
            fault.
    """
    with closing(outcomes):
        for outcome in outcomes:
            if outcome.features is None:
                yield outcome
                continue
            try:
                yield replace(outcome, stored=encode(outcome.features))
            except InputError as error:
                yield replace(outcome, features=None, fault=error)


def _together(batches: Iterable[_Batch], size: int) -> Generator[_Batch, None, None]:
    """Join single images to batches; an image that failed takes no place, but keeps its turn."""
    waiting: list[_Batch] = []
    good = 0
    for one in batches:
        waiting.append(one)
        good += one.laid is not None
        if good == size:
            yield _join(waiting)
            waiting, good = [], 0
    if waiting:
        yield _join(waiting)


def _join(batches: list[_Batch]) -> _Batch:
    outcomes = tuple(outcome for batch in batches for outcome in batch.outcomes)
    laid = [batch.laid for batch in batches if batch.laid is not None]
    if len(laid) < 2:
        return _Batch(outcomes, laid[0] if laid else None)
    digests = tuple(digest for one in laid for digest in one.digests)
    geometries = tuple(geometry for one in laid for geometry in one.geometries)
    return _Batch(outcomes, Laid(digests, geometries, np.concatenate([one.pixels for one in laid])))


def _split(batch: _Batch) -> Iterator[_Batch]:
    """The images of a batch one by one, as they were before the VAE."""
    laid = batch.encoded.laid if batch.encoded is not None else batch.laid
    place = 0
    for outcome in batch.outcomes:
        if outcome.fault is not None or laid is None:
            yield _Batch((outcome,))
            continue
        part = slice(place, place + 1)
        yield _Batch((outcome,), Laid(laid.digests[part], laid.geometries[part], laid.pixels[part]))
        place += 1


def _each(stage: Callable[[_Batch], _Batch], batches: Generator[_Batch, None, None]) -> Iterator[_Batch]:
    """Run a stage; where an output is not finite, on one image at a time, so that each gets its own or its fault."""
    with closing(batches):
        for batch in batches:
            try:
                yield stage(batch)
            except NonFiniteError:
                yield from map(_alone(stage), _split(batch))


def _alone(stage: Callable[[_Batch], _Batch]) -> Callable[[_Batch], _Batch]:
    def run(batch: _Batch) -> _Batch:
        try:
            return stage(batch)
        except NonFiniteError as error:
            return _Batch((replace(batch.outcomes[0], fault=error),))

    return run


def _encoder(featurizer: Featurizer) -> Callable[[_Batch], _Batch]:
    def encode(batch: _Batch) -> _Batch:
        return batch if batch.laid is None else _Batch(batch.outcomes, None, featurizer.encode(batch.laid))

    return encode


def _tapper(featurizer: Featurizer) -> Callable[[_Batch], _Batch]:
    def tap(batch: _Batch) -> _Batch:
        if batch.encoded is None and batch.laid is not None:  # alone, out of a batch that another one spoiled
            batch = _encoder(featurizer)(batch)
        if batch.encoded is None:
            return batch
        made = iter(list(featurizer.tap(batch.encoded)))
        return _Batch(tuple(one if one.fault else replace(one, features=next(made)) for one in batch.outcomes))

    return tap
