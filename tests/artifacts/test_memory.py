"""Values in bounded memory: which leave, and when, worked out by hand."""

import pytest

from difftap.artifacts.memory import MemoryCache


def cache(budget, **options):
    return MemoryCache(budget, len, **options)


def held(kept, keys="abcde"):
    return "".join(key for key in keys if key in kept)


def test_exactly_the_budget_fits_and_one_byte_more_does_not():
    kept = cache(6)
    for key in "abc":
        kept.put(key, b"12")
    assert held(kept) == "abc"
    kept.put("d", b"1")  # 7 bytes
    assert held(kept) == "bcd"


def test_the_least_recently_used_leaves_and_reading_is_no_use():
    kept = cache(3)
    for key in "abc":
        kept.put(key, b"1")
    assert kept["a"] == b"1"
    kept.touch("b")
    kept.put("d", b"1")
    assert held(kept) == "bcd"
    kept.put("e", b"1")
    assert held(kept) == "bde"


def test_two_stay_whatever_they_take():
    kept = cache(0)
    for key in "abc":
        kept.put(key, b"123")
    assert held(kept) == "bc"
    assert len(kept) == 2


def test_what_is_needed_last_leaves_but_never_what_was_just_put():
    told = []
    kept = cache(3, next_use={"a": 1, "b": 9, "c": 5, "d": 99}.get, leaves=lambda *one: told.append(one))
    for key in "abcd":
        kept.put(key, key.encode())
    assert held(kept) == "acd"
    assert told == [("b", b"b")]


def test_values_that_grew_leave_at_the_next_trim():
    told = []
    kept = cache(6, leaves=lambda key, value: told.append(key))
    values = {key: bytearray(b"12") for key in "abc"}
    for key, value in values.items():
        kept.put(key, value)
    values["c"] += b"3"
    assert held(kept) == "abc"
    kept.trim(keep=("a",))
    assert held(kept) == "ac"
    assert told == ["b"]


def test_dropped_and_replaced_values_take_no_room_and_are_not_told():
    told = []
    kept = cache(4, leaves=lambda key, value: told.append(key))
    for key in "abc":
        kept.put(key, b"1")
    kept.drop("a")
    kept.drop("a")
    kept.put("b", b"2")  # the newest now
    kept.put("d", b"12")
    assert (held(kept), told) == ("bcd", [])
    kept.put("e", b"1")
    assert (held(kept), told) == ("bde", ["c"])
    with pytest.raises(KeyError):
        kept["c"]
