"""Pages of the journal: what is written is read, and a changed byte is found."""

import pytest

from difftap.errors import ArtifactError
from difftap.features.store.schema import Failure, ShardEntry, StoredRow

PAGE = ShardEntry(
    (
        StoredRow(row=0, key="a.jpg", digest="ab" * 32, image=(40, 30), content=(0, 0, 40, 30)),
        StoredRow(row=1, key="b.jpg", digest="cd" * 32, image=(9, 8), content=(0, 1, 9, 6)),
    ),
    (Failure("c.jpg", "no picture"),),
)


def test_a_page_is_read_as_it_was_written():
    assert ShardEntry.parse(PAGE.text(), "page 0") == PAGE
    assert ShardEntry().text() == ""
    assert ShardEntry.parse("", "page 0") == ShardEntry()


def test_a_page_of_difftap_0_1_0_has_no_hash():
    lines = PAGE.text().splitlines(keepends=True)
    assert ShardEntry.parse("".join(lines[:-1]), "page 0") == PAGE


def test_any_changed_byte_is_found():
    whole = PAGE.text().encode()
    for place in range(len(whole) - 1):
        changed = bytearray(whole)
        changed[place] ^= 1
        with pytest.raises(ArtifactError, match="page 0 is damaged"):
            ShardEntry.parse(changed.decode(), "page 0")
