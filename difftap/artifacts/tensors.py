"""Where tensors lie in safetensors files: read from the files' headers, without loading a tensor.

Exported graphs point into these files (`difftap.export.trace`), so they need the offsets that loaders do not tell.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from difftap.errors import ModelError

__all__ = ["TensorLocation", "locate_tensors"]


@dataclass(frozen=True)
class TensorLocation:
    """Where one tensor lies in a safetensors file.

    Attributes:
        path: the file.
        dtype: the format's name for it: ``F32``, ``F16``, ``BF16`` ...
        shape: as stored.
        offset: its first byte, counted from the start of the file.
        length: in bytes.
    """

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    length: int


def locate_tensors(files: Sequence[Path]) -> dict[str, TensorLocation]:
    """Read the headers of safetensors files; give each tensor's location by its name.

    Raises:
        ModelError: a file cannot be read, its header is damaged, or the file is cut short.
    """
    # The format: 8 bytes with the header's length, the header as JSON, then the tensors' raw bytes, whose offsets
    # count from the end of the header.
    found = {}
    for path in files:
        try:
            size = path.stat().st_size
            with open(path, "rb") as handle:
                (length,) = struct.unpack("<Q", handle.read(8))
                if length > size:  # else a damaged length would ask for exabytes
                    raise ValueError(f"its header should take {length} bytes")
                header = json.loads(handle.read(length))
            for name, entry in header.items():
                if name == "__metadata__":
                    continue
                first, last = entry["data_offsets"]
                if 8 + length + last > size:
                    raise ValueError(f"tensor {name} ends after the file")
                found[name] = TensorLocation(
                    path, entry["dtype"], tuple(entry["shape"]), 8 + length + first, last - first
                )
        except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
            raise ModelError(f"'{path}' is not a whole safetensors file ({error}); get the checkpoint again") from error
    return found
