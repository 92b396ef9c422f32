"""Engines that are files: whole or not there, built once, built again when they are not to be trusted."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from difftap.artifacts.manifest import Manifest
from difftap.backbones.checkpoint import Checkpoint
from difftap.engine import Backend, Cache, Engine, Graph, Profile
from difftap.engine.builds import engine_manifest_path, ensure_built
from difftap.errors import BackendError, NonFiniteError, OutputError

PROFILE = Profile((16, 16))


class Compiler(Backend):
    """Writes one file and counts how often it was asked to."""

    name = "compiler"
    fails = False
    trouble: BaseException | None = None

    def __init__(self) -> None:
        self.built = 0
        self.details: Mapping[str, Any] = {"seconds": 1}

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
        if self.trouble:
            raise self.trouble
        (folder / "plan").write_bytes(b"whole")
        return self.details

    def open(
        self, graph: Graph, profile: Profile, device: str, threads: int | None, built: Path | None = None
    ) -> Engine:
        raise NotImplementedError


def _ensure(cache: Cache, model: Checkpoint, backend: Backend) -> Path:
    folder = ensure_built(cache, Graph(model, "vae"), backend, PROFILE, "cpu")
    assert folder is not None
    return folder


def test_built_once_and_again_when_a_file_or_the_version_changed(tmp_path: Path, mini: Path) -> None:
    cache, model, backend = Cache(tmp_path), Checkpoint.load(mini), Compiler()
    folder = _ensure(cache, model, backend)
    assert (folder / "plan").read_bytes() == b"whole"
    assert _ensure(cache, model, backend) == folder and backend.built == 1
    (folder / "plan").write_bytes(b"tampered with")
    assert (_ensure(cache, model, backend) / "plan").read_bytes() == b"whole" and backend.built == 2
    backend.version = lambda: "2"  # type: ignore[method-assign]
    _ensure(cache, model, backend)
    assert backend.built == 3


def test_a_failed_build_leaves_nothing_that_looks_like_an_engine(tmp_path: Path, mini: Path) -> None:
    cache, model, backend = Cache(tmp_path), Checkpoint.load(mini), Compiler()
    backend.fails = True
    with pytest.raises(BackendError, match="gave up"):
        _ensure(cache, model, backend)
    assert not engine_manifest_path(cache, Graph(model, "vae"), backend, PROFILE, "cpu").exists()
    assert not list(tmp_path.rglob("plan"))
    backend.fails = False
    assert (_ensure(cache, model, backend) / "plan").read_bytes() == b"whole"


def _chosen(key: str) -> Any:
    return SimpleNamespace(chosen=True, key=key)


def test_an_engine_calibrated_on_other_images_is_built_again_if_the_user_chose_them(tmp_path: Path, mini: Path) -> None:
    cache, graph, backend = Cache(tmp_path), Graph(Checkpoint.load(mini), "vae"), Compiler()
    backend.details = {"calibration": "a"}
    for calibration, builds in ((_chosen("a"), 1), (_chosen("a"), 1), (None, 1), (_chosen("b"), 2)):
        backend.details = {"calibration": calibration.key} if calibration else {}
        ensure_built(cache, graph, backend, PROFILE, "cpu", calibration)
        assert backend.built == builds


@pytest.mark.parametrize(
    ("trouble", "kind", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), OutputError, "cannot write .*: the disk is full"),
        (MemoryError(), BackendError, "building vae on compiler for 16x16.* ran out of memory; close other programs"),
    ],
)
def test_a_build_that_runs_out_says_so_in_one_line(tmp_path: Path, mini: Path, trouble, kind, words) -> None:
    cache, model, backend = Cache(tmp_path), Checkpoint.load(mini), Compiler()
    backend.trouble = trouble
    with pytest.raises(kind, match=words) as caught:
        _ensure(cache, model, backend)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.rglob("plan")) and not list(tmp_path.rglob("*.engine.json"))


def test_a_build_that_fails_its_check_is_not_kept(tmp_path: Path, mini: Path) -> None:
    cache, graph, backend = Cache(tmp_path), Graph(Checkpoint.load(mini), "vae"), Compiler()

    def check(folder: Path) -> Mapping[str, Any]:
        assert (folder / "plan").read_bytes() == b"whole"
        raise NonFiniteError("output 'mean' holds 3 values that are not finite")

    with pytest.raises(NonFiniteError):
        ensure_built(cache, graph, backend, PROFILE, "cpu", None, check)
    assert not list(tmp_path.rglob("plan")) and not list(tmp_path.rglob("*.engine.json"))
    ensure_built(cache, graph, backend, PROFILE, "cpu", None, lambda folder: {"parity": {}})
    report = Manifest.load(engine_manifest_path(cache, graph, backend, PROFILE, "cpu")).report
    assert report == {"build": {"seconds": 1}, "parity": {}}
