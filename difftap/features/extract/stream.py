"""Images in, features out, with decoding, the VAE and the UNet at work at the same time.

The features are those of `difftap.Pipeline.features`, bit for bit where a CPU takes one image at a time. An image that
cannot be used becomes an outcome with its reason, in its place, and does no harm to the others of its batch.

Stages run at once, with bounded queues between threads: in order, with errors and endings that pass through.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from difftap.engine import EncodedBatch, Features, Featurizer, InputBatch, finite_or_alone
from difftap.errors import DifftapError, ImageError, InputError, NonFiniteError
from difftap.features.sources import Item
from difftap.features.store.encoding import StoredImage

__all__ = ["Channel", "ClosedError", "Opened", "Outcome", "ahead", "as_stored", "in_order", "stream"]

# ---- threads

_T = TypeVar("_T")
_R = TypeVar("_R")


class ClosedError(Exception):
    """Nobody takes what was to be put, or nothing more will come."""


class Channel(Generic[_T]):
    """A bounded queue that either side may close."""

    def __init__(self, depth: int) -> None:
        self._items: deque[_T] = deque()
        self._depth = depth
        self._changed = threading.Condition()
        self._closed = False
        self._error: BaseException | None = None

    def put(self, item: _T) -> None:
        """Add an item; waits while the queue is full.

        Raises:
            ClosedError: the other side has gone.
        """
        with self._changed:
            while len(self._items) >= self._depth and not self._closed:
                self._changed.wait()
            if self._closed:
                raise ClosedError
            self._items.append(item)
            self._changed.notify_all()

    def get(self) -> _T:
        """Take the next item; waits for one.

        Raises:
            ClosedError: the queue is empty, and nothing more will come.
            BaseException: what ended the other side, once what came before it is taken.
        """
        with self._changed:
            while not self._items and not self._closed:
                self._changed.wait()
            if self._items:
                item = self._items.popleft()
                self._changed.notify_all()
                return item
            if self._error is not None:
                raise self._error
            raise ClosedError

    def close(self, error: BaseException | None = None, *, drop: bool = False) -> None:
        """End the queue; what is in it can still be taken, unless it is dropped."""
        with self._changed:
            self._closed = True
            self._error = self._error or error
            if drop:
                self._items.clear()
            self._changed.notify_all()


def ahead(source: Iterable[_T], depth: int, name: str) -> Generator[_T, None, None]:
    """Yield the same items in the same order, made by a thread of their own, at most ``depth`` of them in advance.

    An error of the source is raised here, after the items that came before it. When this iterator is closed, the
    thread ends and closes the source.
    """
    channel: Channel[_T] = Channel(depth)

    def work() -> None:
        iterator = iter(source)
        try:
            for item in iterator:
                channel.put(item)
            channel.close()
        except ClosedError:
            pass
        except BaseException as error:  # it is raised where it can be handled
            channel.close(error)
        finally:
            close = getattr(iterator, "close", None)
            if close is not None:
                close()

    thread = threading.Thread(target=work, name=name, daemon=True)
    thread.start()
    try:
        while True:
            try:
                item = channel.get()
            except ClosedError:
                return
            yield item
    finally:
        channel.close(drop=True)
        thread.join()


def in_order(
    function: Callable[[_T], _R], items: Iterable[_T], workers: int, depth: int, name: str = "decode"
) -> Generator[_R, None, None]:
    """``map`` by several threads: results in the items' order, at most ``depth`` items begun and not yet taken."""
    pool = ThreadPoolExecutor(workers, thread_name_prefix=name)
    waiting: deque[Future[_R]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) >= depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()
        pool.shutdown(wait=True)


# ---- stages

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
    laid: InputBatch | None = None
    encoded: EncodedBatch | None = None


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
    """Yield the outcomes with their maps as a store keeps them.

    Args:
        outcomes: of `stream`; closed at the end.
        encode: what it is done with (`difftap.features.store.encoding.store_image`); a map that cannot be stored is a
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
    return _Batch(outcomes, InputBatch(digests, geometries, np.concatenate([one.pixels for one in laid])))


def _split(batch: _Batch) -> Iterator[_Batch]:
    """Part a batch into images, each as it was before the encoder."""
    laid = batch.laid
    place = 0
    for outcome in batch.outcomes:
        if outcome.fault is not None or laid is None:
            yield _Batch((outcome,))
            continue
        part = slice(place, place + 1)
        yield _Batch((outcome,), InputBatch(laid.digests[part], laid.geometries[part], laid.pixels[part]))
        place += 1


def _each(stage: Callable[[_Batch], _Batch], batches: Generator[_Batch, None, None]) -> Iterator[_Batch]:
    """Run a stage; where an output is not finite, on one image at a time, so that each gets its own or its fault."""
    with closing(batches):
        for batch in batches:
            images = list(_split(batch))

            def run(some: Sequence[_Batch], whole: _Batch = batch, count: int = len(images)) -> _Batch:
                return stage(whole if len(some) == count else some[0])

            for some, made in finite_or_alone(run, images):
                if isinstance(made, NonFiniteError):
                    made = _Batch((replace(some[0].outcomes[0], fault=made),))
                yield made


def _encoder(featurizer: Featurizer) -> Callable[[_Batch], _Batch]:
    def encode(batch: _Batch) -> _Batch:
        return batch if batch.laid is None else _Batch(batch.outcomes, batch.laid, featurizer.encode(batch.laid))

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
