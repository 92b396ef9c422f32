"""MATLAB files, through scipy, which the base install does not bring."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from difftap.errors import require

__all__ = ["read_mat"]


def read_mat(path: Path) -> dict[str, Any]:
    """The variables of a MATLAB 5 to 7 file, by name; PF-WILLOW's and PF-PASCAL's hold plain numeric arrays.

    Raises:
        MissingExtraError: scipy is not installed.
        ValueError: the file is damaged, or an HDF5 one (MATLAB 7.3).
    """
    scipy_io = require("scipy.io", "bench", "reading .mat annotations")
    try:
        content: dict[str, Any] = scipy_io.loadmat(path)
    except Exception as error:  # scipy raises what its parser happens to trip over
        raise ValueError(f"not a MATLAB 5 to 7 file: {error}") from error
    return content
