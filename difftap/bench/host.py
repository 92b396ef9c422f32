"""The threads and the BLAS libraries that a measurement runs with."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from difftap.errors import require

__all__ = ["blas", "hold_threads"]


@contextmanager
def hold_threads(threads: int) -> Iterator[None]:
    """Hold BLAS, and torch where it is loaded, to a number of threads; both get their own back afterwards."""
    threadpoolctl = require("threadpoolctl", "bench", "holding BLAS to a number of threads")
    torch: Any = sys.modules.get("torch")
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
