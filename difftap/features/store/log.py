"""The journal of a feature store: one page a shard, JSON lines, written after the shard's data.

A row is in the store if a page says so; what lies in the arrays beyond that is unfinished work. A failure names an
image that has no row, and why.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from difftap.coords import Geometry, Size
from difftap.errors import ArtefactError

__all__ = ["Failure", "Page", "Row"]


@dataclass(frozen=True)
class Row:
    """One image of the store.

    Attributes:
        row: its place along the arrays' first axis.
        key: its name: relative path, list entry, tar member or row id.
        digest: of its pixels, `difftap.images.Image.digest`.
        image: ``(W, H)`` as decoded.
        content: the part of the network's input that it fills, `difftap.coords.Geometry.content`.
        sha256: of what is stored, array by array.
        fidelity: measured on this image, array by array; empty for most.
    """

    row: int
    key: str
    digest: str
    image: Size
    content: tuple[float, float, float, float]
    sha256: Mapping[str, str] = field(default_factory=dict)
    fidelity: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def geometry(self, size: Size) -> Geometry:
        """How the image was laid on the input of ``size``."""
        return Geometry(self.image, size, self.content)


@dataclass(frozen=True)
class Failure:
    """An image that could not be used, and why."""

    key: str
    error: str


@dataclass(frozen=True)
class Page:
    """What the journal says of one shard."""

    rows: tuple[Row, ...] = ()
    failures: tuple[Failure, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.rows or self.failures)

    def text(self) -> str:
        """JSON lines."""
        return "".join(_line(record) for record in (*map(_row, self.rows), *map(_failure, self.failures)))

    @classmethod
    def parse(cls, text: str, where: str) -> Page:
        """Read `text` back.

        Raises:
            ArtefactError: it is damaged; ``where`` names it.
        """
        rows, failures = [], []
        try:
            for line in text.splitlines():
                data = json.loads(line)
                if "error" in data:
                    failures.append(Failure(data["key"], data["error"]))
                    continue
                data["image"], data["content"] = tuple(data["image"]), tuple(data["content"])
                rows.append(Row(**data))
        except (ValueError, KeyError, TypeError) as error:
            raise ArtefactError(f"{where} is damaged ({error}); 'difftap store verify' says what is left") from error
        return cls(tuple(rows), tuple(failures))


def _row(row: Row) -> dict[str, Any]:
    data = {name: value for name, value in vars(row).items() if value or name == "row"}
    return data | {"image": list(row.image), "content": list(row.content)}


def _failure(failure: Failure) -> dict[str, Any]:
    return {"key": failure.key, "error": failure.error}


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=True, allow_nan=False, separators=(",", ":")) + "\n"


def keys_of(pages: Iterable[Page]) -> tuple[dict[str, int], dict[str, str]]:
    """Row by key, and the reason by key of what failed and has no row."""
    rows: dict[str, int] = {}
    failed: dict[str, str] = {}
    for page in pages:
        rows.update((row.key, row.row) for row in page.rows)
        failed.update((failure.key, failure.error) for failure in page.failures)
    return rows, {key: error for key, error in failed.items() if key not in rows}
