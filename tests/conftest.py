"""What all tests share: a cache of their own, a tiny checkpoint exported once, small pictures."""

from __future__ import annotations

from pathlib import Path

import pytest

from difftap.backbones.checkpoint import Checkpoint, pocket_folder
from difftap.engine import Cache
from tests.harness import MINI_TAPS, write_mini, write_picture

REAL = Path(__file__).resolve().parents[2] / "shared" / "data"  # beside the repository; no part of it


HEAVY_FIXTURES = {"mini", "mini_cache"}
HEAVY_FILES = (
    *(
        "tests/tuning/test_learn",
        "tests/tuning/test_passes",
        "tests/export/",
        "tests/bench/test_throughput",
        "tests/bench/test_gpucheck",
        "training/",
    ),
    *("tests/engine/backends/test_tensorrt_rtx", "tests/retrieval/test_milvus"),
    *("tests/prompts/test_encode", "tests/commands/test_tune", "tests/pipeline/", "tests/study/test_study"),
)


def pytest_collection_modifyitems(items):
    """Mark what takes seconds by what it needs, so that nobody has to think of it."""
    for item in items:
        fixtures = set(getattr(item, "fixturenames", ()))
        if fixtures & HEAVY_FIXTURES or item.nodeid.startswith(HEAVY_FILES):
            item.add_marker("heavy")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    """No test sees or touches the user's cache."""
    monkeypatch.setenv("DIFFTAP_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def mini(tmp_path_factory) -> Path:
    """A checkpoint folder of a UNet with three blocks and random weights."""
    pytest.importorskip("diffusers")
    return write_mini(tmp_path_factory.mktemp("mini"))


@pytest.fixture(scope="session")
def mini_cache(mini, tmp_path_factory) -> Cache:
    """A cache that holds the mini checkpoint's VAE graph and its UNet cut after `MINI_TAPS`. Leave it as it is."""
    from difftap.export import export_graph

    cache = Cache(tmp_path_factory.mktemp("mini-cache"))
    model = Checkpoint.load(mini)
    export_graph(cache, model, "vae")
    export_graph(cache, model, "unet", MINI_TAPS)
    return cache


@pytest.fixture(scope="session")
def pocket() -> Checkpoint:
    """The embedded model."""
    return Checkpoint.load(pocket_folder(), "pocket")


@pytest.fixture
def photos(tmp_path) -> tuple[Path, Path]:
    """Two small picture files, 40 x 30 and 50 x 36."""
    paths = tmp_path / "a.png", tmp_path / "b.png"
    write_picture(paths[0], seed=1)
    write_picture(paths[1], (50, 36), seed=2)
    return paths


@pytest.fixture
def real():
    """A function: the folder of a real data set, or the test is skipped."""

    def find(name: str) -> Path:
        if not (REAL / name).is_dir():
            pytest.skip(f"the data set '{name}' is not in ../shared/data")
        return REAL / name

    return find
