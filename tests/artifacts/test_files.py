"""Files appear whole or not at all, and have one writer at a time."""

import errno
import os
import signal
import subprocess
import sys

import pytest

from difftap.artifacts.files import atomic_path, only_writer, write_atomic
from difftap.errors import OutputError


def _names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_an_exception_midway_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.bin"
    write_atomic(path, "old")
    with pytest.raises(KeyError), atomic_path(path) as scratch:
        scratch.write_bytes(b"half of the n")
        raise KeyError("interrupted")
    assert path.read_text() == "old"
    assert _names(tmp_path) == ["a.bin"]


def test_nothing_is_there_until_all_is(tmp_path):
    path = tmp_path / "a.bin"
    with atomic_path(path) as scratch:
        scratch.write_bytes(b"new")
        assert not path.exists()
        assert scratch.parent == path.parent  # the same file system, so that the move is one step
    assert path.read_bytes() == b"new"


def test_no_space_is_one_clear_line(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match=r"cannot write .*a\.bin.*the disk is full"):
        write_atomic(tmp_path / "a.bin", b"x")
    assert _names(tmp_path) == []


@pytest.fixture
def full_disk(tmp_path):
    """A real file system of 64 KiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a small file system here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk(full_disk):
    path = full_disk / "a.bin"
    write_atomic(path, b"old")
    with pytest.raises(OutputError, match="the disk is full"):
        write_atomic(path, bytes(200_000))
    assert path.read_bytes() == b"old"
    assert _names(full_disk) == ["a.bin"]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: folder / "none" / "a.bin", "folder does not exist"),
        (lambda folder: folder / "file" / "a.bin", "part of its path is a file"),
        (lambda folder: folder / "folder", "a folder stands there"),
        (lambda folder: folder / ("a" * 250), "cannot write"),
    ],
)
def test_places_that_cannot_be_written(tmp_path, make, words):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError, match=words):
        write_atomic(make(tmp_path), b"x")
    assert _names(tmp_path) == ["file", "folder"]


def test_one_writer_at_a_time(tmp_path):
    path = tmp_path / "a.bin"
    with only_writer(path):
        with pytest.raises(OutputError, match=r"cannot write .*a\.bin.*another run is writing it"), only_writer(path):
            pytest.fail("two writers at once")
        with only_writer(tmp_path / "b.bin"):
            pass
    with only_writer(path):
        pass
    assert _names(tmp_path) == []


def test_a_failed_writer_lets_go(tmp_path):
    with pytest.raises(KeyError), only_writer(tmp_path / "a.bin"):
        raise KeyError("failed")
    with only_writer(tmp_path / "a.bin"):
        pass


def test_a_killed_writer_holds_nothing(tmp_path):
    program = """
import sys, time
from pathlib import Path
from difftap.artifacts.files import only_writer
with only_writer(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""
    path = tmp_path / "a.bin"
    with subprocess.Popen([sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(OutputError, match="another run"), only_writer(path):
            pytest.fail("two writers at once")
        other.send_signal(signal.SIGKILL)
    with only_writer(path):
        pass


def test_a_writer_makes_no_folder(tmp_path):
    with pytest.raises(OutputError, match="folder does not exist"), only_writer(tmp_path / "none" / "a.bin"):
        pytest.fail("there is nothing to hold")
    assert _names(tmp_path) == []
