import dataclasses
import itertools
import resource

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from difftap.errors import InputError, OutputError
from difftap.prototypes import PrototypeTable
from difftap.prototypes.prototype_table import load_provenance, save_stream

pytest.importorskip("pyarrow")


def table(rows: int, width: int = 3, seed: int = 0) -> PrototypeTable:
    rng = np.random.default_rng(seed)
    return PrototypeTable(
        rng.standard_normal((rows, width)).astype(np.float32),
        classes=[["cat", "día"][k % 2] for k in range(rows)],
        images=[f"img/{k // 2}" for k in range(rows)],
        instances=[f"img/{k}" for k in range(rows)],
        areas=rng.uniform(0, 1, rows),
        coverages=rng.uniform(0, 1, rows),
        cells=rng.integers(1, 9, rows),
        small=rng.integers(0, 2, rows),
        taps=["down2.attn0"] * rows,
        timesteps=[0] * rows,
        provenance={"recipe_key": "0" * 16, "conditions": {"size": [512, 512]}},
        boxes=rng.integers(0, 500, (rows, 4)).astype(np.int32),
    )


def same(a: PrototypeTable, b: PrototypeTable) -> bool:
    fields = [f.name for f in dataclasses.fields(a) if f.name != "provenance"]
    return all(np.array_equal(getattr(a, n), getattr(b, n)) for n in fields) and a.provenance == b.provenance


@pytest.mark.parametrize("rows", [0, 1, 5])
def test_what_is_saved_is_loaded(tmp_path, rows):
    made = table(rows)
    made.save(tmp_path / "t.parquet")
    found = PrototypeTable.load(tmp_path / "t.parquet")
    assert same(made, found)
    assert found.vectors.shape == (rows, 3)
    assert found.vectors.dtype == np.float32
    assert load_provenance(tmp_path / "t.parquet") == made.provenance
    keys = pytest.importorskip("pyarrow.parquet").read_table(tmp_path / "t.parquet").column("recipe_key")
    assert keys.to_pylist() == ["0" * 16] * rows
    assert [p.name for p in tmp_path.iterdir()] == ["t.parquet"]


@given(cuts=st.lists(st.integers(0, 40), max_size=4))
@settings(max_examples=15, deadline=None)
def test_how_rows_are_cut_into_tables_does_not_show(tmp_path_factory, cuts):
    folder = tmp_path_factory.mktemp("cuts")
    whole = table(40)
    edges = [0, *sorted(cuts), 40]
    pieces = [whole.take(slice(a, b)) for a, b in itertools.pairwise(edges)]
    import difftap.prototypes.prototype_table as module

    rows, module._ROWS = module._ROWS, 7
    try:
        assert save_stream(folder / "a", [whole], 3, whole.provenance) == 40
        assert save_stream(folder / "b", pieces, 3, whole.provenance) == 40
    finally:
        module._ROWS = rows
    assert (folder / "a").read_bytes() == (folder / "b").read_bytes()
    assert same(whole, PrototypeTable.load(folder / "b"))


def test_rows_are_taken_by_mask_and_by_index():
    made = table(6)
    assert made.take(made.classes == "cat").instances.tolist() == ["img/0", "img/2", "img/4"]
    assert same(PrototypeTable.concat([made.take(slice(0, 2)), made.take(slice(2, None))]), made)


def test_tables_of_other_shapes_are_refused():
    with pytest.raises(InputError, match=r"float32 \(N, D\), got float64"):
        dataclasses.replace(table(2), vectors=np.zeros((2, 3)))
    with pytest.raises(InputError, match=r"classes has shape \(1,\); allowed: \(2,\)"):
        dataclasses.replace(table(2), classes=["cat"])
    with pytest.raises(InputError, match="width"):
        PrototypeTable.concat([table(1, 2), table(1, 3)])


def test_a_file_that_is_no_table_is_refused(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "t.parquet"
    with pytest.raises(InputError, match="no table of prototypes at"):
        PrototypeTable.load(path)
    path.write_bytes(b"hello")
    with pytest.raises(InputError, match="is no table of prototypes"):
        PrototypeTable.load(path)
    pq.write_table(pa.table({"x": [1]}), path)
    with pytest.raises(InputError, match="is no table of prototypes"):
        PrototypeTable.load(path)
    table(500, 64).save(path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match="is no table of prototypes"):
        PrototypeTable.load(path)
    path.write_bytes(b"\x00" * 3000 + content[3000:])  # the end is whole, the rows are not
    with pytest.raises(InputError, match=r"is no whole table of prototypes|is no table"):
        PrototypeTable.load(path)


def test_another_schema_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("difftap.prototypes.prototype_table.SCHEMA", 7)
    table(1).save(tmp_path / "t")
    monkeypatch.undo()
    with pytest.raises(InputError, match="has schema 7; this difftap reads 1"):
        PrototypeTable.load(tmp_path / "t")


def test_a_full_disk_leaves_the_old_file(tmp_path):
    path = tmp_path / "t"
    table(1).save(path)
    before = path.read_bytes()
    import signal

    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(OutputError, match="cannot write"):
            table(2000, 64).save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, old)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["t"]
