"""How fast this machine multiplies matrices, measured: what an engine's arithmetic is held against."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from difftap.errors import MissingExtraError, require

__all__ = ["measure_gemm"]

_TIMES = 6


def measure_gemm(side: int, device: str = "cpu") -> dict[str, float]:
    """Operations a second of ``side`` x ``side`` products, the best of several, by ``library precision``.

    A multiply-add is two operations. numpy's BLAS on the CPU, and torch's on the device where torch is installed.
    """
    rates: dict[str, float] = {}
    left, right = np.random.default_rng(0).standard_normal((2, side, side), np.float32)
    if device == "cpu":
        rates["numpy fp32"] = 2 * side**3 / _best(lambda: left @ right)
    try:
        torch = require("torch", "bench", "measuring torch's products")
    except MissingExtraError:
        return rates
    kinds = {"fp32": torch.float32}
    if device != "cpu":  # most processors multiply halves slower than fp32, some by far
        kinds |= {"fp16": torch.float16, "bf16": torch.bfloat16}
    for name, kind in kinds.items():
        torch.backends.cuda.matmul.allow_tf32 = False
        a, b = (torch.from_numpy(value).to(device, kind) for value in (left, right))

        def product(a: Any = a, b: Any = b) -> None:
            with torch.inference_mode():
                a @ b
                if device == "cuda":
                    torch.cuda.synchronize()

        rates[f"torch {name}"] = 2 * side**3 / _best(product)
    return rates


def _best(call: Callable[[], object]) -> float:
    """Seconds of the fastest of several calls, the first left out."""
    call()
    seconds = []
    for _ in range(_TIMES):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
