"""Stream images through decoding, VAE and UNet, which work at the same time.

The features are those of `difftap.Pipeline.features`; on a CPU, which takes one image at a time, they are equal bit for
bit. An image that cannot be used becomes an outcome with a reason, in its place, and the others of its batch are not
affected.

Each stage runs in its own thread, with bounded queues in between. Order is kept. Errors travel forward to the reader,
and closing the reader ends all stages.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Generic, Protocol, TypeVar

import numpy as np

from difftap.artifacts.files import JsonObject
from difftap.engine import EncodedBatch, Features, Featurizer, InputBatch, finite_or_alone
from difftap.errors import DifftapError, ImageError, InputError, NonFiniteError
from difftap.features.sources import Item
from difftap.features.store.encoding import StoredImage

__all__ = ["Channel", "ClosedError", "Opened", "Outcome", "ahead", "as_stored", "in_order", "stream"]

# ---- threads

_T = TypeVar("_T")
_R = TypeVar("_R")


class ClosedError(Exception):
    """The other side of a `Channel` has closed it."""


class Channel(Generic[_T]):
    """A bounded queue between two threads that either side may close; ``queue.Queue`` cannot be closed."""

    def __init__(self, depth: int) -> None:
        self._items: deque[_T] = deque()
        self._depth = depth
        self._changed = threading.Condition()
        self._closed = False
        self._error: BaseException | None = None

    def put(self, item: _T) -> None:
        """Add an item; wait while the queue is full.

        Raises:
            ClosedError: the queue was closed.
        """
        with self._changed:
            while len(self._items) >= self._depth and not self._closed:
                self._changed.wait()
            if self._closed:
                raise ClosedError
            self._items.append(item)
            self._changed.notify_all()

    def get(self) -> _T:
        """Take the next item; wait for one.

        Raises:
            ClosedError: the queue was closed, and all its items have been taken.
            BaseException: the error that the queue was closed with, after all its items have been taken.
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
        """Close the queue. Its items can still be taken, unless ``drop`` removes them."""
        with self._changed:
            self._closed = True
            self._error = self._error or error
            if drop:
                self._items.clear()
            self._changed.notify_all()


def ahead(source: Iterable[_T], depth: int, name: str) -> Generator[_T, None, None]:
    """Yield the items of a source, which another thread makes, at most ``depth`` of them in advance.

    An error of the source is raised here, after the items before it. When this iterator is closed, the thread ends and
    closes the source.
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
        except BaseException as error:  # raised in the thread that takes the items
            channel.close(error)
        finally:
            # In this thread: a generator cannot be closed by another thread while it runs.
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
    """Map a function over items with several threads.

    Args:
        function: called with each item.
        items: taken as they are needed.
        workers: number of threads.
        depth: at most this many items are begun and not yet yielded, which bounds the memory.
        name: prefix of the threads' names.

    Yields:
        the results, in the items' order.
    """
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

_DECODED = 2  # batches that are decoded in advance, besides the images that the workers are decoding


class Opened(Protocol):
    """The part of an open `difftap.Pipeline` that a stream uses.

    Attributes:
        batch: images per engine run.
        conditions: where it runs, among others.
        stages: the steps of computing features.
    """

    @property
    def batch(self) -> int: ...  # noqa: D102

    @property
    def conditions(self) -> JsonObject: ...  # noqa: D102

    @property
    def stages(self) -> Featurizer: ...  # noqa: D102


@dataclass(frozen=True)
class Outcome:
    """The result for one image.

    Attributes:
        item: the image.
        features: its features; None if it cannot be used.
        fault: why it cannot be used.
        stored: its features encoded for a store; None without a store.
    """

    item: Item
    features: Features | None = None
    fault: DifftapError | None = None
    stored: StoredImage | None = None


@dataclass(frozen=True)
class _Batch:
    """Some outcomes, in order, with the last stage's output for those that have no fault.

    Attributes:
        outcomes: the outcomes.
        laid: pixels on the network's input, before the encoder.
        encoded: output of the encoder.
    """

    outcomes: tuple[Outcome, ...]
    laid: InputBatch | None = None
    encoded: EncodedBatch | None = None


def stream(
    pipeline: Opened, items: Iterable[Item], workers: int = 2, depth: int = 2, ready: int | None = None
) -> Generator[Outcome, None, None]:
    """Yield one outcome for each item, in order.

    Args:
        pipeline: an open `difftap.Pipeline`.
        items: the images; taken as they are needed.
        workers: threads that decode.
        depth: batches that may wait between two stages.
        ready: batches that may wait after the last stage; ``depth`` if None. A reader that pauses needs more.

    Raises:
        BackendError: the runtime failed, and not because of an image. The outcomes before it have been yielded.
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
    with closing(decoded), closing(encoded), closing(done):  # closed from the last stage to the first
        for batch in done:
            yield from batch.outcomes


def as_stored(
    outcomes: Generator[Outcome, None, None], encode: Callable[[Features], StoredImage]
) -> Generator[Outcome, None, None]:
    """Yield the outcomes with their maps encoded for a store.

    Args:
        outcomes: the outcomes of `stream`; closed at the end.
        encode: encodes features (`difftap.features.store.encoding.store_image`). Features that it refuses become a
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
    """Join single images to batches of ``size`` usable images; failed images stay in order between them."""
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
    """Split a batch into its images, each as it was before the encoder."""
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
    """Run a stage on batches. If an output is not finite, run it on single images, so that only the bad one fails."""
    with closing(batches):
        for batch in batches:
            images = list(_split(batch))

            def run(some: Sequence[_Batch], whole: _Batch = batch, count: int = len(images)) -> _Batch:
                # Called with all images first, and with single ones if that output is not finite.
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
        if batch.encoded is None and batch.laid is not None:  # a single image, split from a batch that was not finite
            batch = _encoder(featurizer)(batch)
        if batch.encoded is None:
            return batch
        made = iter(list(featurizer.tap(batch.encoded)))
        return _Batch(tuple(one if one.fault else replace(one, features=next(made)) for one in batch.outcomes))

    return tap
