"""Telling a run with Ray that stands still from one that is slow, and a worker's errors from its results."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

from difftap import errors
from difftap.errors import BackendError, DifftapError, first_line

__all__ = ["POLL", "raise_told", "told_of", "watched"]

POLL = 1.0
"""Seconds between looks at whether anything moves."""


def told_of(error: DifftapError) -> dict[str, str]:
    """An error as data: Ray would wrap it."""
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
    """What comes through a queue, until None comes; given up when nothing moves for too long.

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
