"""The scripts stand outside the package, beside one another; a test takes one as Python does when it is run."""

import importlib
import sys

import pytest

from tests.harness import ROOT


@pytest.fixture
def script(request, monkeypatch):
    """The script that a test file is named after."""
    pytest.importorskip("threadpoolctl")
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    name = request.module.__name__.rpartition("test_")[2]
    yield importlib.import_module(name)
    for one in {name, "timing"}:
        sys.modules.pop(one, None)
