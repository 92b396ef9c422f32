"""What a source is made of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from difftap.errors import ImageError
from difftap.images import Image, decode_image, load_image

__all__ = ["FileAt", "Item", "Locator", "MemberAt", "Source"]


class Locator(Protocol):
    """Says where one image lies."""

    def load(self) -> Image:
        """Read and decode it.

        Raises:
            ImageError: it cannot be used.
        """


@dataclass(frozen=True)
class Item:
    """One image of a data set: its key there, and where it lies."""

    key: str
    at: Locator


@dataclass(frozen=True)
class Source:
    """A data set's images, listed.

    Attributes:
        kind: what it is, for people.
        items: one an image, keys unique.
        repeated: how many entries were left out because an earlier one has their key.
    """

    kind: str
    items: Sequence[Item]
    repeated: int = 0

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Item]:
        return iter(self.items)

    @classmethod
    def unique(cls, kind: str, items: Sequence[Item]) -> Source:
        """A source of the items, each key once."""
        kept = {item.key: item for item in reversed(items)}
        first = [item for item in items if kept[item.key] is item]
        return cls(kind, first, len(items) - len(first))


@dataclass(frozen=True)
class FileAt:
    """An image in a file of its own."""

    path: str

    def load(self) -> Image:
        """Read and decode the file."""
        return load_image(self.path)


@dataclass(frozen=True)
class MemberAt:
    """An image inside a tar file that is not compressed."""

    archive: str
    name: str
    offset: int
    size: int

    def load(self) -> Image:
        """Read and decode the member."""
        where = f"{self.archive}:{self.name}"
        try:
            with open(self.archive, "rb") as handle:
                handle.seek(self.offset)
                data = handle.read(self.size)
        except OSError as error:
            raise ImageError(f"'{where}' cannot be read ({error.strerror or error})") from error
        if len(data) < self.size:
            raise ImageError(f"'{where}' is cut short: {len(data)} of {self.size} bytes; the archive is damaged")
        return decode_image(data, str(Path(where)))
