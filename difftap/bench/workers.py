"""Child processes that measure one contender each: start them, send orders and read replies.

`difftap.bench.throughput` and `difftap.bench.gpucheck` use this file; `difftap.bench.worker_child` runs in the child.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from difftap.artifacts.files import JsonObject
from difftap.errors import BackendError, require
from difftap.recipe import Recipe

__all__ = ["Timing", "Worker", "blas", "call_timing", "hold_threads", "make_order", "open_contender", "stage_medians"]


@contextmanager
def hold_threads(threads: int) -> Iterator[None]:
    """Limit BLAS, and torch if it is loaded, to a number of threads; restore both afterwards."""
    threadpoolctl = require("threadpoolctl", "bench", "holding BLAS to a number of threads")
    torch: Any = sys.modules.get("torch")  # not imported here: most contenders do without it
    before = torch.get_num_threads() if torch else 0
    if torch:
        torch.set_num_threads(threads)
    try:
        with threadpoolctl.threadpool_limits(limits=threads):
            yield
    finally:
        if torch:
            torch.set_num_threads(before)


def blas() -> str:
    """Return name, version and architecture of the BLAS libraries loaded."""
    pools = require("threadpoolctl", "bench", "naming the BLAS").threadpool_info()
    names = {
        f"{p['internal_api']} {p.get('version')} {p.get('architecture', '')}".strip()
        for p in pools
        if p["user_api"] == "blas"
    }
    return ", ".join(sorted(names))


_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(frozen=True)
class Timing:
    """Wall times of calls, after a warm-up.

    Attributes:
        seconds: the time of every measured call, in order.
        median: their median.
        low: the fastest.
        high: the slowest.
    """

    seconds: tuple[float, ...]
    median: float
    low: float
    high: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Timing:
        """Summarise measured calls."""
        return cls(tuple(seconds), statistics.median(seconds), min(seconds), max(seconds))


class Worker:
    """A new process that runs `difftap.bench.worker_child`.

    Args:
        threads: CPU threads of libraries that read their number from the environment.
    """

    def __init__(self, threads: int) -> None:
        self._threads = threads
        # A file, not a pipe: nobody reads stderr while the child works, and a full pipe would block it.
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 - closed by close
        # Libraries read the number of threads when they are loaded, so it must be set before the process starts. The
        # path makes the child import the same difftap as this process.
        environment = {
            **os.environ,
            **dict.fromkeys(_THREAD_VARIABLES, str(threads)),
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "difftap.bench.worker_child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=environment,
            text=True,
            encoding="utf-8",
        )

    def ask(self, do: str, limit: float | None = None, **order: object) -> JsonObject:
        """Send one order and wait for the reply.

        Args:
            do: the order's name.
            limit: end the process after this many seconds; None to wait as long as it takes.
            order: the order's content, as plain data.

        Raises:
            BackendError: the order failed or took too long, or the process died.
        """
        assert self._process.stdin is not None  # noqa: S101 - opened above
        assert self._process.stdout is not None  # noqa: S101 - opened above
        line, late = "", threading.Event()

        def end() -> None:
            late.set()
            self._process.kill()

        timer = None if limit is None else threading.Timer(max(0.0, limit), end)
        if timer is not None:
            timer.start()
        try:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.write(json.dumps({"do": do, "threads": self._threads, **order}) + "\n")
                self._process.stdin.flush()
                line = self._process.stdout.readline()
        finally:
            if timer is not None:
                timer.cancel()
        if not line.endswith("\n"):
            raise BackendError("it took longer than its limit and was ended" if late.is_set() else self._death())
        reply: JsonObject = json.loads(line)
        if "error" in reply:
            raise BackendError(str(reply["error"]))
        return reply

    def _death(self) -> str:
        code = self._process.wait()
        if code == -9:  # SIGKILL, which Linux sends when memory runs out
            return "its process was killed, most likely for want of memory; use a smaller --size, --ensemble or --batch"
        self._log.seek(0)
        lines = [text.strip() for text in self._log.read().splitlines() if text.strip()]
        said = f": {lines[-1][:200]}" if lines else ""
        return f"its process ended with {'signal' if code < 0 else 'code'} {abs(code)}{said}"

    def close(self) -> None:
        """End the process, which frees its memory."""
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._log.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def make_order(
    recipe: Recipe,
    images: Sequence[Path],
    *,
    cache: Path | None,
    threads: int,
    batch: int,
) -> JsonObject:
    """Describe a job as plain data, the same for every contender; the caller adds the ``contender``."""
    return {
        "recipe": recipe.to_dict(),
        "images": [str(path.resolve()) for path in images],
        "cache": str(cache.resolve()) if cache else None,
        "threads": threads,
        "batch": batch,
    }


def open_contender(
    order: JsonObject, left: Callable[[], float | None] = lambda: None
) -> tuple[Worker, JsonObject, float | None]:
    """Start a process with an open contender that is warmed up.

    If something had to be built or exported for it, a second process is started, which finds it made.

    Args:
        order: what `make_order` gives, with the ``contender``.
        left: gives the seconds that are left; None for no limit.

    Returns:
        the process, its reply, and the seconds of the first opening if something was built or exported.

    Raises:
        BackendError: it cannot be opened; no process is left behind.
    """
    began = time.monotonic()
    worker, built = Worker(order["threads"]), None
    try:
        about = worker.ask("open", left(), **order)
        if about["made"]:
            built = time.monotonic() - began
            worker.close()
            worker = Worker(order["threads"])  # its peak memory contains no build
            about = worker.ask("open", left(), **order, keep=True)
    except BaseException:
        worker.close()
        raise
    return worker, about, built


def call_timing(calls: Sequence[Mapping[str, float]]) -> Timing:
    """Summarise the seconds per image of whole calls."""
    return Timing.of([call["total"] / call["images"] for call in calls])


def stage_medians(calls: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Give the median seconds per image of every stage."""
    kinds = [kind for kind in calls[0] if kind not in ("images", "total")]
    return {kind: statistics.median(call[kind] / call["images"] for call in calls) for kind in kinds}
