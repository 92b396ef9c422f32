"""Where the real data sets lie."""

from __future__ import annotations

from pathlib import Path

import pytest

REAL = Path(__file__).resolve().parents[3] / "shared" / "data"  # beside the repository; no part of it


@pytest.fixture
def real():
    """A function: the folder of a real data set, or the test is skipped."""

    def find(name: str) -> Path:
        if not (REAL / name).is_dir():
            pytest.skip(f"the data set '{name}' is not in ../shared/data")
        return REAL / name

    return find
