"""Values kept in bounded memory: the one rule of what leaves when they no longer fit.

Feature maps, posteriors, image tokens and maps of a validation are kept by it, each under a key of its own kind.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable
from typing import Generic, TypeVar

__all__ = ["MemoryCache"]

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")

_AT_LEAST = 2  # both images of a pair are in use at once, whatever they take


class MemoryCache(Generic[Key, Value]):
    """As many values as fit into a number of bytes; at least two.

    Not safe for several threads at once.

    Args:
        budget: bytes.
        size: bytes of a value; asked again at each look, since a value may grow.
        next_use: when a key is needed next, where that is known: what is needed last leaves first. None: what was put
            or touched longest ago does.
        leaves: told of each key and value that leaves for want of room.
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
        """Read a value; does not count as a use, see `touch`."""
        return self._values[key]

    def touch(self, key: Key) -> None:
        """Make a key that is here the last used one."""
        self._values[key] = self._values.pop(key)

    def put(self, key: Key, value: Value) -> None:
        """Keep a value, and let others leave until the rest fits; the new one stays."""
        self._values.pop(key, None)
        self._values[key] = value
        self.trim(keep=(key,))

    def drop(self, key: Key) -> None:
        """Forget a key, if it is here; `leaves` is not told."""
        self._values.pop(key, None)

    def trim(self, keep: Collection[Key] = ()) -> None:
        """Let values leave until the rest fits: for after they have grown.

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
