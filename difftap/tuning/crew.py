"""Several processes that learn one prompt: accelerate's, or just this one.

Each process takes its share of a step's pairs, and the gradients are added up, so the learned prompt is that of one
process but for rounding. Started as ``accelerate launch -m difftap.cli tune ...``.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from difftap.errors import require

if TYPE_CHECKING:
    import torch

__all__ = ["Crew", "open_crew"]

_T = TypeVar("_T")


class Crew:
    """This process among its fellows.

    Attributes:
        rank: this process's number; 0 writes files.
        size: how many there are.
    """

    def __init__(self, accelerator: Any = None) -> None:
        self._accelerator = accelerator
        self.rank = 0 if accelerator is None else int(accelerator.process_index)
        self.size = 1 if accelerator is None else int(accelerator.num_processes)

    @property
    def device(self) -> str | None:
        """The device accelerate gave this process; None without it."""
        return None if self._accelerator is None else str(self._accelerator.device)

    def share(self, items: Sequence[_T]) -> Sequence[_T]:
        """This process's part of a list."""
        return items[self.rank :: self.size]

    def add(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of every process's tensor."""
        return values if self._accelerator is None else self._accelerator.reduce(values, reduction="sum")

    def wait(self) -> None:
        """Until every process is here."""
        if self._accelerator is not None:
            self._accelerator.wait_for_everyone()


def open_crew(device: str) -> Crew:
    """The processes that were started together: one, unless a launcher says otherwise."""
    if int(os.environ.get("WORLD_SIZE", "1")) <= 1:
        return Crew()
    accelerate = require("accelerate", "tune", "learning in several processes")
    return Crew(accelerate.Accelerator(cpu=device == "cpu"))
