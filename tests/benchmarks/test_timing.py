"""What the scripts time with: turns, medians, and the rate of a matrix product."""

import time

import pytest


def test_ways_run_in_turn_after_a_warm_up(script):
    ran = []
    times = script.measure({"a": lambda: ran.append("a"), "b": lambda: ran.append("b")}, repeats=2, threads=1, calls=2)
    assert "".join(ran) == "ab" + "aabb" * 2
    assert [len(one.seconds) for one in times.values()] == [4, 4]


def test_the_rate_is_operations_over_the_fastest_product(script, monkeypatch):
    seconds = iter([0.0, 4.0, 0.0, 2.0, 0.0, 8.0, 0.0, 16.0, 0.0, 4.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(seconds))
    assert script.product_rate(1, side=8) == 2 * 8**3 / 2.0


def test_a_table_compares_with_ours_and_ends_with_the_floor(script):
    times = {"slow": script.Timing.of([4.0, 6.0, 5.0]), "ours": script.Timing.of([2.0])}
    table = script.table("t", times, "ours", {"slow": 8_000_000}, ("floor", 0.5))
    assert table.rows == (
        ("slow", 5.0, 4.0, 6.0, 2.5, 8_000_000),
        ("ours", 2.0, 2.0, 2.0, 1.0, None),
        ("floor", 0.5, None, None, 0.25, None),
    )
    assert len(script.table("t", times, "ours").rows) == 2


def test_conditions_name_threads_and_versions(script):
    import numpy as np

    told = script.conditions(3, "numpy", "no-such-package")
    assert "3 threads" in told
    assert f"numpy {np.__version__}" in told
    assert "no-such-package absent" in told
    with pytest.raises(Exception, match="0 is not"):
        script.count("0")
