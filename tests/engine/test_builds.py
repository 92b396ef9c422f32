"""Engines that are files: whole or not there, built once, built again when they are not to be trusted."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from difftap.engine import Backend, Cache, Engine, Graph, Profile
from difftap.engine.builds import engine_manifest_path, ensure_built
from difftap.errors import BackendError
from difftap.model import Model

PROFILE = Profile((16, 16))


class Compiler(Backend):
    """Writes one file and counts how often it was asked to."""

    name = "compiler"
    fails = False

    def __init__(self) -> None:
        self.built = 0

    def missing(self) -> str | None:
        return None

    def devices(self) -> tuple[str, ...]:
        return ("cpu",)

    def version(self) -> str:
        return "1"

    def builds(self, profile: Profile, device: str) -> bool:
        return True

    def build(
        self, graph: Graph, profile: Profile, device: str, folder: Path, calibration: Any = None
    ) -> Mapping[str, Any]:
        self.built += 1
        (folder / "plan").write_bytes(b"half")
        if self.fails:
            raise BackendError("the builder gave up")
        (folder / "plan").write_bytes(b"whole")
        return {"seconds": 1}

    def open(
        self, graph: Graph, profile: Profile, device: str, threads: int | None, built: Path | None = None
    ) -> Engine:
        raise NotImplementedError


def _ensure(cache: Cache, model: Model, backend: Backend) -> Path:
    folder = ensure_built(cache, Graph(model, "vae"), backend, PROFILE, "cpu")
    assert folder is not None
    return folder


def test_built_once_and_again_when_a_file_or_the_version_changed(tmp_path: Path, mini: Path) -> None:
    cache, model, backend = Cache(tmp_path), Model.load(mini), Compiler()
    folder = _ensure(cache, model, backend)
    assert (folder / "plan").read_bytes() == b"whole"
    assert _ensure(cache, model, backend) == folder and backend.built == 1
    (folder / "plan").write_bytes(b"tampered with")
    assert (_ensure(cache, model, backend) / "plan").read_bytes() == b"whole" and backend.built == 2
    backend.version = lambda: "2"  # type: ignore[method-assign]
    _ensure(cache, model, backend)
    assert backend.built == 3


def test_a_failed_build_leaves_nothing_that_looks_like_an_engine(tmp_path: Path, mini: Path) -> None:
    cache, model, backend = Cache(tmp_path), Model.load(mini), Compiler()
    backend.fails = True
    with pytest.raises(BackendError, match="gave up"):
        _ensure(cache, model, backend)
    assert not engine_manifest_path(cache, Graph(model, "vae"), backend, PROFILE, "cpu").exists()
    assert not list(tmp_path.rglob("plan"))
    backend.fails = False
    assert (_ensure(cache, model, backend) / "plan").read_bytes() == b"whole"


def test_leftovers_of_a_killed_build_are_swept(tmp_path: Path, mini: Path) -> None:
    cache, model, backend = Cache(tmp_path), Model.load(mini), Compiler()
    folder = _ensure(cache, model, backend)
    killed = folder.with_name(f".{folder.name}.1.abcd.part")
    killed.mkdir()
    (killed / "plan").write_bytes(b"half")
    (folder / "plan").unlink()  # so that it is built again
    _ensure(cache, model, backend)
    assert not killed.exists()


def test_two_at_once_build_one(tmp_path: Path, mini: Path) -> None:
    cache, model, backend = Cache(tmp_path), Model.load(mini), Compiler()
    threads = [Thread(target=_ensure, args=(cache, model, backend)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert backend.built == 1
