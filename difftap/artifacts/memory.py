"""Values kept in bounded memory, with one rule for which of them leave when they no longer fit.

It keeps feature maps, posteriors, image tokens and the maps of a validation.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable
from typing import Generic, TypeVar

__all__ = ["MemoryCache"]

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")

_AT_LEAST = 2  # both images of a pair are in use at once, so both stay even if they exceed the budget


class MemoryCache(Generic[Key, Value]):
    """As many values as fit into a number of bytes, but at least two.

    Not safe for several threads at once.

    Args:
        budget: bytes.
        size: gives the bytes of a value; it is asked again at each `trim`, since a value may grow.
        next_use: says when a key is needed next, where that is known: the key that is needed last leaves first. None to
            let the key leave that was put or touched longest ago.
        leaves: called with each key and value that leaves because the budget is exceeded.
    """

    def __init__(
        self,
        budget: int,
        size: Callable[[Value], int],
        *,
        next_use: Callable[[Key], int] | None = None,
        leaves: Callable[[Key, Value], None] | None = None,
    ) -> None:
        self._budget = budget
        self._size = size
        self._next_use = next_use
        self._leaves = leaves
        self._values: dict[Key, Value] = {}  # a dict keeps the order of insertion: oldest first

    def __contains__(self, key: Key) -> bool:
        return key in self._values

    def __len__(self) -> int:
        return len(self._values)

    def __getitem__(self, key: Key) -> Value:
        """Read a value. This does not count as a use: see `touch`."""
        return self._values[key]

    def touch(self, key: Key) -> None:
        """Mark a key that is here as the last used one."""
        self._values[key] = self._values.pop(key)

    def put(self, key: Key, value: Value) -> None:
        """Keep a value, and let others leave until the rest fits. The new one stays."""
        self._values.pop(key, None)
        self._values[key] = value
        self.trim(keep=(key,))

    def drop(self, key: Key) -> None:
        """Forget a key, if it is here, without calling ``leaves``."""
        self._values.pop(key, None)

    def trim(self, keep: Collection[Key] = ()) -> None:
        """Let values leave until the rest fits. Call it after values have grown.

        Args:
            keep: keys that stay.
        """
        total = sum(map(self._size, self._values.values()))
        while len(self._values) > _AT_LEAST and total > self._budget:
            free = (key for key in self._values if key not in keep)
            key = next(free) if self._next_use is None else max(free, key=self._next_use)
            value = self._values.pop(key)
            total -= self._size(value)
            if self._leaves is not None:
                self._leaves(key, value)
