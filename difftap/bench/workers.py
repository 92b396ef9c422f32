"""Child processes that measure: one contender each, asked in turn, alive or not between turns."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from typing import Any

from difftap.errors import BackendError

__all__ = ["Worker"]

_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class Worker:
    """A fresh process behind `difftap.bench.throughput_child`.

    Args:
        threads: CPU threads of the libraries that read them from the environment.
    """

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 - closed by close
        environment = {
            **os.environ,
            **dict.fromkeys(_THREAD_VARIABLES, str(threads)),
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "difftap.bench.throughput_child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=environment,
            text=True,
            encoding="utf-8",
        )

    def ask(self, do: str, limit: float | None = None, **order: Any) -> dict[str, Any]:
        """Give one order and wait for the reply.

        Args:
            do: the order's name.
            limit: seconds after which the process is ended; None to wait as long as it takes.
            order: what the order says.

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
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise BackendError(str(reply["error"]))
        return reply

    def _death(self) -> str:
        code = self._process.wait()
        if code == -9:
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
