"""What is done when a store's run ends: the arrays for other readers are filled, what was reserved is cut off."""

from __future__ import annotations

from typing import Any

import numpy as np

from difftap.features.store.encoding import Fidelity
from difftap.features.store.log import Row
from difftap.features.store.place import Place
from difftap.features.store.schema import Provenance, pages, tap_arrays

__all__ = ["finish"]

_INDEX_ROWS = 4096  # a chunk of the arrays key, digest, image, content


def finish(group: Any, place: Place, provenance: Provenance) -> None:
    """Bring a store's other arrays in line with its journal, and mark it complete."""
    used, rows, fidelity = 0, 0, {}  # type: ignore[var-annotated]
    for number, page in enumerate(pages(group, place)):
        if page:
            used = number + 1
        for row in page.rows:
            rows = max(rows, row.row + 1)
            for name, one in row.fidelity.items():
                fidelity.setdefault(name, []).append(Fidelity(**one))  # type: ignore[arg-type]
    _write_index(group, place, rows)
    for array in tap_arrays(group, provenance, place):
        for part in (array.values, array.scale):
            if part is not None and part.shape[0] != rows:
                part.resize((rows, *part.shape[1:]))
    group["journal"].resize((used,))
    noted = dict(group.attrs)["difftap"]
    summary = {name: Fidelity.join(parts).to_dict() for name, parts in fidelity.items()}
    group.attrs.update({"difftap": {**noted, "fidelity": summary, "complete": True}})


def _write_index(group: Any, place: Place, rows: int) -> None:
    """Fill the arrays key, digest, image and content from the journal, a chunk at a time."""
    if not rows:
        return
    shapes: dict[str, tuple[tuple[int, ...], Any]] = {
        "key": ((), str), "digest": ((32,), "uint8"), "image": ((2,), "int32"), "content": ((4,), "float64"),
    }  # fmt: skip
    arrays = {
        name: group.create_array(
            name, shape=(rows, *shape), chunks=(_INDEX_ROWS, *shape), dtype=dtype, compressors=None, overwrite=True,
            fill_value="" if dtype is str else 0,
        )
        for name, (shape, dtype) in shapes.items()
    }  # fmt: skip
    waiting: list[Row] = []

    def flush(start: int) -> None:
        stop = min(start + _INDEX_ROWS, rows)
        keys: Any = np.full(stop - start, "", object)
        tables = {name: np.zeros((stop - start, *shapes[name][0]), shapes[name][1]) for name in list(shapes)[1:]}
        for row in waiting:
            # A file name that is not UTF-8 has no place in a text array as it is.
            keys[row.row - start] = row.key.encode("utf-8", "backslashreplace").decode()
            tables["digest"][row.row - start] = np.frombuffer(bytes.fromhex(row.digest), np.uint8)
            tables["image"][row.row - start] = row.image
            tables["content"][row.row - start] = row.content
        arrays["key"][start:stop] = keys
        for name, table in tables.items():
            arrays[name][start:stop] = table
        waiting.clear()

    start = 0
    for page in pages(group, place):
        for row in page.rows:
            while row.row >= start + _INDEX_ROWS:
                flush(start)
                start += _INDEX_ROWS
            waiting.append(row)
    flush(start)
