"""Verifying finds what was damaged and nothing else; compacting changes no feature."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from difftap.errors import ArtifactError, OutputError
from difftap.features.store import Encoding, FeatureStore
from difftap.features.store.care import compact, info, verify
from tests.features.store.cases import fill, made, maps
from tests.harness import invoke

zarr = pytest.importorskip("zarr")


@pytest.fixture(params=["float16", "int8"])
def path(request, tmp_path):
    fill(tmp_path / "s.zarr", range(11), Encoding(request.param), bad={3})
    return tmp_path / "s.zarr"


def problems(path):
    return list(verify(FeatureStore.open(path)))


def test_a_whole_store_has_no_problem(path):
    assert problems(path) == []


@pytest.mark.parametrize(
    ("damage", "keys"),
    [
        (lambda g: g["0/up1"].__setitem__((5, 0, 0, 0), 99), {"k6"}),
        (lambda g: g["1/up2"].__setitem__((0, 1, 1, 1), 99), {"k0"}),
        (lambda g: g["key"].__setitem__(2, "other"), {"k2"}),
        (lambda g: g["0/up1"].resize((9, 6, 3, 4)), {"", "k10"}),
    ],
)
def test_damage_is_found(path, damage, keys):
    damage(zarr.open(path, mode="r+"))
    assert {one.key for one in problems(path)} == keys


def test_a_shard_that_is_gone(path):
    (path / "0" / "up1" / "c" / "1" / "0" / "0" / "0").unlink()
    assert [one.key for one in problems(path)] == ["k5", "k6", "k7", "k8"]
    with pytest.raises(ArtifactError, match=r"'k5'.*--drop-damaged"):
        compact(path)
    assert len(FeatureStore.open(path)) == 10
    done = compact(path, drop_damaged=True)
    assert (done.kept, done.damaged, done.forgotten) == (6, 4, 1)
    assert problems(path) == []


def test_a_shard_cut_short(path):
    file = path / "0" / "up1" / "c" / "0" / "0" / "0" / "0"
    file.write_bytes(file.read_bytes()[:-7])
    assert {one.key for one in problems(path)} >= {"k0", "k1", "k2", "k4"}


@pytest.mark.parametrize("output", [None, "new.zarr"])
@pytest.mark.parametrize("shard", [None, 1, 3, 16])
def test_compact(path, output, shard):
    before = FeatureStore.open(path)
    want = {key: before.read(key) for key in before.keys()}  # noqa: SIM118
    target = path.parent / output if output else path
    compact(path, target if output else None, shard=shard)
    after = FeatureStore.open(target)
    assert after.keys() == list(want)
    assert not after.failures
    assert after.provenance.shard == (shard or 4)
    assert problems(target) == []
    for key, features in want.items():
        assert after.read(key).digest == features.digest
        for one, other in zip(maps(after.read(key)), maps(features), strict=True):
            assert (one.data == other.data).all()
    assert {file.name for file in path.parent.iterdir()} == {"s.zarr", *([output] if output else [])}
    fill(target, [3, 11, 12], after.provenance.encoding)
    assert len(FeatureStore.open(target)) == 13
    assert problems(target) == []
    assert after.noted["runs"] == before.noted["runs"]


def test_compact_into_a_place_that_is_taken(path):
    with pytest.raises(OutputError, match="not empty"):
        compact(path, path.parent)


def reads(path):
    assert FeatureStore.open(path).keys()[0] == "k0"


def writes(path):
    fill(path, [20], FeatureStore.open(path).provenance.encoding)


def commands(path):
    done = invoke(["store", "compact", str(path)], catch_exceptions=False)
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize("use", [compact, reads, writes, commands])
def test_compact_killed_between_its_two_renames(path, use):
    """Whoever comes next finds the old store, and no new one is begun in its place."""
    path.rename(path.with_name(".s.zarr.old"))
    use(path)
    assert problems(path) == []
    assert len(FeatureStore.open(path)) == 10 + (use is writes)
    assert [file.name for file in path.parent.iterdir()] == ["s.zarr"]


def test_deleting_killed_midway_leaves_nothing_that_looks_like_a_store(path, monkeypatch):
    """A store of which some shards are gone would be taken up again, and its journal believed."""
    rmtree = shutil.rmtree

    def killed(folder):
        (Path(folder) / "0" / "up1" / "zarr.json").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        fill(path, [7], overwrite=True)
    monkeypatch.setattr(shutil, "rmtree", rmtree)
    assert not path.exists()
    fill(path, [7])
    assert FeatureStore.open(path).keys() == ["k7"]
    fill(path, [8], overwrite=True)
    assert [file.name for file in path.parent.iterdir()] == ["s.zarr"]


def test_info(path):
    told = info(FeatureStore.open(path))
    assert (told["images"], told["failed"], told["holes"], told["complete"]) == (10, 1, 0, True)
    assert told["arrays"]["0/up1"]["shape"] == [10, 6, 3, 4]
    assert told["bytes"] == sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    want = []
    store = FeatureStore.open(path)
    for number in (0, 5, 9):  # the first of each shard of four, image 3 having failed
        got = store.read(f"k{number}").branches[0]["up1"].data
        data = made(number).branches[0]["up1"].data
        want.append(np.linalg.norm(got - data) / np.linalg.norm(data))
    assert told["fidelity"]["0/up1"]["maps"] == 3
    assert told["fidelity"]["0/up1"]["error"] == pytest.approx(max(want), rel=1e-4)
