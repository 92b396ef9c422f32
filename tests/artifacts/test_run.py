"""A resumable run's file: begun, taken up, cut where it was killed, refused where it is another's."""

import json
from pathlib import Path

import pytest

from difftap.artifacts.run import check_conditions, differences, open_run, read_run
from difftap.errors import InputError, OutputError

CONDITIONS = {"schema": "test/1", "recipe": {"seed": 0, "size": (8, 8)}, "pairs": 3}


def write(path: Path, records, **change) -> None:
    with open_run(path, {**CONDITIONS, **change}) as run:
        for record in records:
            run.write(record)


def whole(tmp_path: Path) -> bytes:
    write(tmp_path / "whole", [{"n": n} for n in range(4)])
    return (tmp_path / "whole").read_bytes()


def test_a_run_cut_at_any_byte_goes_on_to_the_same_bytes(tmp_path):
    content = whole(tmp_path)
    path = tmp_path / "cut"
    for length in range(len(content) + 1):
        path.write_bytes(content[:length])
        with open_run(path, CONDITIONS) as run:
            # A record counts only with its line end: those are the lines after the header.
            assert len(run.earlier) == max(0, content[:length].count(b"\n") - 1)
            for n in range(len(run.earlier), 4):
                run.write({"n": n})
        assert path.read_bytes() == content, length


def test_overwrite_begins_again_whatever_is_there(tmp_path):
    path = tmp_path / "run"
    path.write_text("something else")
    with pytest.raises(OutputError, match="no output of ours"):
        write(path, [])
    with open_run(path, CONDITIONS, overwrite=True) as run:
        assert run.earlier == []
    assert read_run(path, "test/1", "difftap x")[1] == []


def test_two_runs_never_write_one_file(tmp_path):
    with open_run(tmp_path / "run", CONDITIONS), pytest.raises(OutputError, match="another run is writing it"):
        write(tmp_path / "run", [])


@pytest.mark.parametrize("damage", [b"{]\n", b"3\n", b"\xff\n"])
def test_a_damaged_record_is_named_by_its_line(tmp_path, damage):
    lines = whole(tmp_path).splitlines(keepends=True)
    path = tmp_path / "run"
    path.write_bytes(b"".join([*lines[:2], damage, *lines[3:]]))
    with pytest.raises(OutputError, match="line 3 is damaged"):
        write(path, [])


def test_other_conditions_are_named_with_both_values(tmp_path):
    path = tmp_path / "run"
    write(path, [{"n": 0}])
    before = path.read_bytes()
    with pytest.raises(OutputError, match=r"recipe\.seed is 0 there and 1 here; pairs differs too\)") as refused:
        write(path, [], recipe={"seed": 1, "size": [8, 8]}, pairs=4)
    assert str(path) in str(refused.value) and "--overwrite" in str(refused.value)
    assert path.read_bytes() == before


def test_differences_by_hand():
    have = {"a": 1, "b": [{"x": 1}, {"x": 2}], "c": [1, 2], "only": 0}
    want = {"a": 1, "b": [{"x": 1}, {"x": 3}], "c": (1, 2), "new": None}
    assert list(differences(have, want)) == [("b[1].x", 2, 3), ("only", 0, None)]
    assert list(differences([1], [1, 2])) == [("", [1], [1, 2])]
    check_conditions("place", have, have)


def test_long_values_are_cut_and_many_differences_counted():
    have = {name: name * 100 for name in "abcde"}
    with pytest.raises(OutputError) as refused:
        check_conditions("place", have, {}, kind="store", begun="built")
    text = str(refused.value)
    assert "was built under" in text and "b differs too; c differs too; and 2 more" in text
    assert "another store" in text and len(text) < 300


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "cannot be read"),
        (b"", "cannot be read"),
        (b"[]\n", "cannot be read"),
        (json.dumps({"type": "run", "schema": "test/2"}).encode() + b"\n", "reads 'test/1'"),
    ],
)
def test_what_is_no_run_is_refused_when_read(tmp_path, content, reason):
    path = tmp_path / "run"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=reason):
        read_run(path, "test/1", "difftap x")
