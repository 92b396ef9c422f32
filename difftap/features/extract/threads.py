"""Stages that run at once: bounded queues between threads, in order, with errors and endings that pass through."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

__all__ = ["Channel", "ClosedError", "ahead", "in_order"]

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
    """The same items in the same order, made by a thread of their own, at most ``depth`` of them in advance.

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
