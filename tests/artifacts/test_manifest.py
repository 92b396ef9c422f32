"""A manifest notices what has changed."""

import json
import os
import time

import pytest

import difftap.artifacts.digests as digests
from difftap.artifacts.digests import DigestMemo
from difftap.artifacts.manifest import FileRecord, Manifest, file_digest
from difftap.errors import ArtifactError


@pytest.fixture
def artifact(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.onnx").write_bytes(b"graph")
    (tmp_path / "sub" / "w.bin").write_bytes(b"weights")
    files = {name: FileRecord.of(tmp_path / name) for name in ("a.onnx", "sub/w.bin")}
    Manifest("graph", {"weights": "abc", "taps": ["up1"]}, files, {"parity": 1e-6}).save(tmp_path / "a.json")
    return tmp_path


EXPECTED = {"weights": "abc", "taps": ["up1"]}


def test_a_whole_artifact_is_trusted(artifact):
    manifest = Manifest.load(artifact / "a.json")
    manifest.check(artifact, EXPECTED)
    assert manifest.report == {"parity": 1e-6}
    assert json.loads((artifact / "a.json").read_text())["schema"] == 1


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: (f / "a.onnx").write_bytes(b"grap"), "has 4 bytes, its manifest says 5"),
        (lambda f: (f / "a.onnx").write_bytes(b"graqh"), "SHA-256 differs"),
        (lambda f: (f / "sub" / "w.bin").write_bytes(b"Weights"), "SHA-256 differs"),
        (lambda f: (f / "sub" / "w.bin").unlink(), "is missing"),
    ],
)
def test_changed_files_are_noticed(artifact, damage, words):
    damage(artifact)
    with pytest.raises(ArtifactError, match=words):
        Manifest.load(artifact / "a.json").check(artifact, EXPECTED)


def test_stale_and_foreign_artifacts_are_noticed(artifact):
    manifest = Manifest.load(artifact / "a.json")
    with pytest.raises(ArtifactError, match="weights = 'abc', not 'def'"):
        manifest.check(artifact, {**EXPECTED, "weights": "def"})
    with pytest.raises(ArtifactError, match="version = None, not 2"):
        manifest.check(artifact, {**EXPECTED, "version": 2})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"schema": 1}',
        '{"schema": 2}',
        '{"schema": 1, "kind": "graph", "made_from": {}, "files": {"a": 3}}',
        '{"schema": 1, "kind": "graph", "made_from": {}, "files": {"a": {"size": 1}}}',
        '{"schema": 1, "kind": "graph", "made_from": 3, "files": {}}',
    ],
)
def test_damaged_manifests_are_refused(artifact, text):
    (artifact / "a.json").write_text(text)
    with pytest.raises(ArtifactError):
        Manifest.load(artifact / "a.json").check(artifact, EXPECTED)


def test_a_missing_manifest(tmp_path):
    with pytest.raises(ArtifactError, match="no manifest"):
        Manifest.load(tmp_path / "none.json")


@pytest.fixture
def memo(tmp_path, monkeypatch):
    monkeypatch.setattr(digests, "SMALL", 0)
    reads = []
    monkeypatch.setattr(digests, "file_digest", lambda path: reads.append(path) or file_digest(path))
    return DigestMemo(tmp_path / "memo" / "digests.json"), reads


def test_a_large_file_is_read_once_until_it_changes(tmp_path, memo):
    remembered, reads = memo
    path = tmp_path / "weights.bin"
    path.write_bytes(b"one")
    first = remembered.digest(path)
    assert remembered.digest(path) == first == file_digest(path)
    assert len(reads) == 1
    time.sleep(
        0.05
    )  # the clock of file times ticks every few milliseconds; a large file takes longer than that to hash
    path.write_bytes(b"two")  # of the same size
    assert remembered.digest(path) == file_digest(path) != first
    assert len(reads) == 2


def test_a_hard_link_is_the_same_file(tmp_path, memo):
    remembered, reads = memo
    path, link = tmp_path / "weights.bin", tmp_path / "link.bin"
    path.write_bytes(b"one")
    first = remembered.digest(path)
    os.link(path, link)
    assert remembered.digest(link) == first
    assert remembered.digest(path) == first
    assert len(reads) == 1


def test_a_file_put_in_anothers_place_is_read_again(tmp_path, memo):
    remembered, reads = memo
    path, other = tmp_path / "weights.bin", tmp_path / "other.bin"
    path.write_bytes(b"one")
    other.write_bytes(b"two")
    remembered.digest(path)
    os.replace(other, path)
    assert remembered.digest(path) == file_digest(path)
    assert len(reads) == 2


@pytest.mark.parametrize("text", ["", "[]", '{"x": 3}', "\0"])
def test_a_damaged_memory_is_forgotten(tmp_path, memo, text):
    remembered, _ = memo
    path = tmp_path / "weights.bin"
    path.write_bytes(b"one")
    remembered.digest(path)
    stat = path.stat()
    (tmp_path / "memo" / "digests.json").write_text(text.replace("x", f"{stat.st_dev}:{stat.st_ino}"))
    assert remembered.digest(path) == file_digest(path)


def test_small_files_are_always_read(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"one")
    memo = DigestMemo(tmp_path / "digests.json")
    memo.digest(path)
    assert not (tmp_path / "digests.json").exists()


def test_any_changed_byte_of_a_manifest_is_found(tmp_path):
    """Also in a report, which is compared with nothing: an engine's stated error, say."""
    (tmp_path / "a.bin").write_bytes(b"weights")
    manifest = Manifest("thing", {"of": "weights"}, {"a.bin": FileRecord.of(tmp_path / "a.bin")}, {"error": 0.125})
    manifest.save(tmp_path / "a.json")
    whole = (tmp_path / "a.json").read_bytes()
    assert Manifest.load(tmp_path / "a.json") == manifest
    for place in range(len(whole)):
        for bit in (1, 4, 32):
            changed = bytearray(whole)
            changed[place] ^= bit
            (tmp_path / "a.json").write_bytes(changed)
            try:
                found = Manifest.load(tmp_path / "a.json")
            except ArtifactError:
                continue
            assert found == manifest, whole[max(0, place - 20) : place + 20]  # spaces between entries mean nothing
    data = json.loads(whole)
    del data["sha256"]  # as difftap 0.1.0 wrote it
    (tmp_path / "a.json").write_text(json.dumps(data))
    assert Manifest.load(tmp_path / "a.json") == manifest
