"""What is made is made once, and trusted only if its manifest vouches for it."""

import errno
import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from difftap.artifacts.cache import Cache, Making, default_cache_folder
from difftap.artifacts.manifest import Manifest, file_digest
from difftap.errors import ArtifactError, OutputError

IDENTITY = {"version": 1, "of": "weights"}


class Maker:
    """Makes a file, or a folder of two files, and counts how often."""

    def __init__(self, cache: Cache, form: str) -> None:
        self.cache, self.form, self.count = cache, form, 0
        self.path = cache.folder / "home" / ("thing.bin" if form == "file" else "thing")
        self.manifest = self.path.with_name("thing.json")
        self.beside = cache.folder / "home" / "weights"

    def write(self, scratch: Path) -> Making:
        self.count += 1
        self.beside.write_bytes(b"weights")
        if self.form == "folder":
            (scratch / "below").mkdir(parents=True)
            (scratch / "below" / "plan").write_bytes(b"whole")
        self.file(scratch).write_bytes(b"whole")
        return Making([self.beside], {"made_with": {"onnx": "1"}}, {"parity": 0.5})

    def file(self, path: Path) -> Path:
        return path if self.form == "file" else path / "part"

    def get(self, identity=IDENTITY, **options) -> Path:
        return self.cache.get_or_make("thing", self.path, identity, self.write, **options)


@pytest.fixture(params=["file", "folder"])
def maker(request, tmp_path):
    return Maker(Cache(tmp_path / "cache"), request.param)


def left(maker) -> list[str]:
    """Names of what lies there, but for locks."""
    home = maker.cache.folder
    return sorted(p.name for p in home.rglob("*") if p.is_file() and p.suffix != ".lock")


def test_made_once_and_described(maker):
    assert maker.get() == maker.get() == maker.path
    assert maker.count == 1
    assert maker.file(maker.path).read_bytes() == b"whole"
    found = Manifest.load(maker.manifest)
    own = ["thing.bin"] if maker.form == "file" else ["thing/below/plan", "thing/part"]
    assert (found.kind, sorted(found.files)) == ("thing", [*own, "weights"])
    assert found.made_from == {**IDENTITY, "made_with": {"onnx": "1"}}
    assert found.report == {"parity": 0.5}


def edit(manifest: Path, **changes):
    data = json.loads(manifest.read_text())
    data["made_from"].update(changes)
    data.pop("sha256")  # as if it had been written so; a change in place is found by its hash
    manifest.write_text(json.dumps(data))


REASONS = {
    "cut short": (lambda m: m.file(m.path).write_bytes(b"who"), r"has 3 bytes, its manifest says 5"),
    "tampered with": (lambda m: m.file(m.path).write_bytes(b"Whole"), r"is not the file its manifest describes"),
    "missing": (lambda m: m.file(m.path).unlink(), r"is missing"),
    "another file beside it": (lambda m: m.beside.write_bytes(b"Weights"), r"is not the file its manifest describes"),
    "stale": (lambda m: edit(m.manifest, version=0), r"was made for version = 0, not 1"),
    "foreign": (lambda m: edit(m.manifest, of="others"), r"was made for of = 'others', not 'weights'"),
    "damaged manifest": (lambda m: m.manifest.write_text("{"), r"cannot be read .* it is damaged"),
}


@pytest.mark.parametrize("reason", REASONS)
def test_what_cannot_be_trusted_is_made_again_and_the_reason_named(maker, caplog, reason):
    damage, words = REASONS[reason]
    maker.get()
    damage(maker)
    with pytest.raises(ArtifactError, match=words):
        maker.cache.find(maker.manifest, IDENTITY)
    with caplog.at_level(logging.WARNING, "difftap"):
        maker.get()
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.endswith("; making it again")
    assert maker.count == 2
    assert maker.file(maker.path).read_bytes() == b"whole"
    assert maker.cache.find(maker.manifest, IDENTITY) is not None


def test_without_a_manifest_it_was_never_finished(maker):
    maker.get()
    maker.manifest.unlink()
    assert maker.cache.find(maker.manifest, IDENTITY) is None
    maker.get()
    assert maker.count == 2


def test_what_else_must_hold(maker):
    def check(manifest):
        if manifest.report["parity"] > 0.1:
            raise ArtifactError("too far from the reference")

    maker.get()
    with pytest.raises(ArtifactError, match="too far"):
        maker.cache.find(maker.manifest, IDENTITY, check)
    maker.get(check=check)
    assert maker.count == 2


def test_a_failure_leaves_nothing_that_is_trusted(maker):
    def fail(scratch):
        maker.write(scratch)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        maker.cache.get_or_make("thing", maker.path, IDENTITY, fail)
    assert left(maker) == ["weights"]
    maker.get()
    with pytest.raises(KeyboardInterrupt):
        maker.cache.get_or_make("thing", maker.path, {**IDENTITY, "version": 2}, fail)
    with pytest.raises(ArtifactError, match="version = 1, not 2"):
        maker.cache.find(maker.manifest, {**IDENTITY, "version": 2})


PROGRAM = """
import os, signal, sys, time
from pathlib import Path
from difftap.artifacts.cache import Cache
from tests.artifacts.test_cache import Maker
folder, form, what = sys.argv[1:]
maker = Maker(Cache(Path(folder)), form)
write = maker.write
def slow(scratch):
    print("making", flush=True)
    made = write(scratch)
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.5)
    return made
maker.write = slow
maker.get()
"""


def start(maker, what):
    command = [sys.executable, "-c", PROGRAM, str(maker.cache.folder), maker.form, what]
    return subprocess.Popen(command, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, text=True)


def test_a_kill_half_way_leaves_nothing_that_is_trusted(maker):
    process = start(maker, "kill")
    assert process.communicate() == ("making\n", None)
    assert process.returncode == -signal.SIGKILL
    assert not maker.path.exists()
    assert not maker.manifest.exists()
    (scratch,) = maker.path.parent.glob("*.part")
    others = [maker.path.with_name(name) for name in (f".{maker.path.name}.more.1.abcdef01.part", f".{scratch.name}x")]
    for other in others:
        other.touch()
    maker.get()
    assert not scratch.exists(), "what the killed process left is swept away"
    assert all(other.exists() for other in others), "what belongs to others stays"


def test_two_processes_make_it_once(maker):
    running = [start(maker, "sleep"), start(maker, "sleep")]
    said = [process.communicate()[0] for process in running]
    assert [process.returncode for process in running] == [0, 0]
    assert sorted(said) == ["", "making\n"]
    assert maker.cache.find(maker.manifest, IDENTITY) is not None


def test_a_folder_of_0_1_0_without_a_manifest_is_adopted_where_that_is_asked_for(tmp_path, caplog):
    maker = Maker(Cache(tmp_path / "cache"), "folder")
    maker.get()
    maker.manifest.unlink()
    assert maker.get(adopt=True) == maker.path
    assert maker.count == 1
    assert Manifest.load(maker.manifest).made_from == IDENTITY
    (maker.path / "part").write_bytes(b"damaged later")
    maker.get(adopt=True)
    assert maker.count == 2

    def check(_):
        raise ArtifactError("a link leads nowhere")

    maker.manifest.unlink()
    with caplog.at_level(logging.WARNING, "difftap"):
        maker.get(adopt=True, check=check)
    assert "a link leads nowhere; making it again" in caplog.text
    assert maker.count == 3


def test_making_whatever_is_there(maker):
    maker.get()
    made = maker.cache.make("thing", maker.path, IDENTITY, maker.write)
    assert maker.count == 2
    assert made == Manifest.load(maker.manifest)


def test_recording_what_is_there(tmp_path):
    """Files below the manifest's folder are named from there, so that a cache can be moved; others by their path."""
    cache, outside = Cache(tmp_path / "cache"), tmp_path / "outside"
    outside.write_bytes(b"1")
    manifest = cache.folder / "home" / "x.engine.json"
    manifest.parent.mkdir(parents=True)
    inside = manifest.with_name("inside")
    inside.write_bytes(b"22")
    found = cache.record("engine", manifest, IDENTITY, [inside, outside], {"seconds": 1})
    assert {name: record.size for name, record in found.files.items()} == {"inside": 2, str(outside): 1}
    assert cache.find(manifest, IDENTITY) == found


def test_a_cache_that_is_warm_need_not_be_writable(maker):
    maker.get()
    for lock in maker.cache.folder.rglob("*.lock"):
        lock.unlink()
    maker.get()
    assert not list(maker.cache.folder.rglob("*.lock")), "looking up takes no lock"


def test_an_unwritable_cache_is_one_clear_line():
    cache = Cache(Path("/dev/null/cache"))
    for write in (
        lambda: Maker(cache, "file").get(),
        lambda: cache.make("thing", cache.folder / "x", {}, lambda _: Making()),
        lambda: cache.record("thing", cache.folder / "x.json", {}, [], {}),
        lambda: cache.place_files([Path(__file__)], cache.folder),
    ):
        with pytest.raises(OutputError, match="cannot write"):
            write()


def test_a_full_disk_is_one_clear_line(maker):
    def full(scratch):
        maker.write(scratch)
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OutputError, match="the disk is full"):
        maker.cache.get_or_make("thing", maker.path, IDENTITY, full)
    assert left(maker) == ["weights"]


def test_files_are_placed_as_hard_links_where_that_works_and_as_copies_elsewhere(tmp_path, monkeypatch):
    cache, source = Cache(tmp_path / "cache"), tmp_path / "weights.bin"
    source.write_bytes(b"weights")
    (linked,) = cache.place_files([source], tmp_path / "linked")
    assert source.samefile(linked)
    assert not linked.is_symlink()

    def refuse(*_):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    (copied,) = cache.place_files([source], tmp_path / "copied")
    assert not source.samefile(copied)
    assert file_digest(copied) == file_digest(source)
    stamp = copied.stat().st_mtime_ns
    cache.place_files([source], tmp_path / "copied")
    assert copied.stat().st_mtime_ns == stamp, "copied again although it was there"
    copied.write_bytes(b"damaged")
    cache.place_files([source], tmp_path / "copied")
    assert file_digest(copied) == file_digest(source)
    assert [path.name for path in copied.parent.iterdir()] == [source.name]


def test_a_symbolic_link_is_placed_as_the_file_it_leads_to(tmp_path):
    """A hub's snapshot folder is made of relative symbolic links."""
    (tmp_path / "blob").write_bytes(b"weights")
    (tmp_path / "snapshot").mkdir()
    link = tmp_path / "snapshot" / "weights.bin"
    link.symlink_to("../blob")
    (placed,) = Cache(tmp_path / "cache").place_files([link], tmp_path / "home")
    assert placed.name == "weights.bin"
    assert not placed.is_symlink()
    assert placed.read_bytes() == b"weights"


def test_the_folder_is_the_environments(monkeypatch, tmp_path):
    monkeypatch.setenv("DIFFTAP_CACHE", str(tmp_path / "mine"))
    assert default_cache_folder() == tmp_path / "mine"
    monkeypatch.delenv("DIFFTAP_CACHE")
    assert default_cache_folder().name == "difftap"
