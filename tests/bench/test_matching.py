"""The matching benchmark at a small size: what it returns, not how fast it is."""

import json

import numpy as np
import pytest

from difftap.bench.matching import SCHEMA, format_table, run, to_json
from difftap.bench.matching_ways import Case, slow_way
from difftap.errors import InputError, MissingExtraError

pytest.importorskip("torch")
pytest.importorskip("threadpoolctl")


@pytest.fixture(scope="module")
def result():
    return run(channels=16, grid=6, image=(50, 40), keypoints=5, threads=1, repeats=2)


def test_ways_find_the_same_pixels(result):
    assert result.same_pixels == 5
    assert result.largest_gap < 1e-5


def test_times_are_consistent(result):
    assert set(result.times) == {
        "dift",
        "dift-search",
        "once",
        "difftap",
        "difftap-prepared",
        "difftap-confidence",
    }
    for name, timing in result.times.items():
        assert len(timing.seconds) == (10 if name.startswith("difftap") else 2)
        assert 0 < timing.low <= timing.median <= timing.high
    for name, ratio in result.ratios.items():
        assert ratio == pytest.approx(result.times[name].median / result.times["difftap"].median)
    assert result.times["dift-search"].median < result.times["dift"].median


def test_floor_by_hand(result):
    cells, channels = 36, 16
    dots = (5 + 5) * channels * cells
    reading = (5 + 1) * 2 * 50 * (6 + 40)
    assert result.floor_flops == 2 * (dots + reading)
    assert result.floor_share == pytest.approx(result.floor_flops / result.flops_rate / result.times["difftap"].median)


def test_memory_is_measured_for_each_way(result):
    assert set(result.memory) == {"dift", "once", "difftap"}
    assert all(peak >= 0 for peak in result.memory.values())


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_slow_ways_agree(interpolation):
    case = Case(channels=8, grid=5, image=(31, 22), keypoints=6, interpolation=interpolation)
    inputs = case.inputs()
    each, once = (slow_way(*inputs, interpolation, flag)[0] for flag in (False, True))
    assert each.tolist() == once.tolist()
    assert ((each >= 0) & (each < [31, 22])).all()


def test_memory_tells_the_ways_apart():
    """A full-size map of this case is 41 MB; the slow way needs two and more, ours none."""
    result = run(channels=128, grid=8, image=(320, 250), keypoints=1, threads=1, repeats=1)
    assert result.memory["dift"] > 80e6
    assert result.memory["difftap"] < 20e6


def test_json_and_table(result):
    data = json.loads(json.dumps(to_json(result)))
    assert data["schema"] == SCHEMA
    assert data["case"]["image"] == [50, 40]
    assert len(data["times"]["dift"]["seconds"]) == 2
    assert {"versions", "threads", "cpu", "warm_up", "repeats", "inside"} <= set(data["conditions"])
    lines = format_table(result)
    assert all(isinstance(line, str) and "\n" not in line for line in lines)
    text = "\n".join(lines)
    for words in ("16 channels", "as DIFT's evaluation", "x faster", "same pixel for 5 of 5", "floor:", "numpy"):
        assert words in text


def test_bad_values():
    with pytest.raises(InputError, match="repeats is 0"):
        run(repeats=0)
    for name in ("channels", "grid", "keypoints", "threads"):
        with pytest.raises(InputError, match=f"{name} is 0"):
            run(**{name: 0})


def test_without_torch_the_pip_line_is_given(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    with pytest.raises(MissingExtraError, match=r"difftap\[bench\]"):
        run(channels=2, grid=2, image=(4, 4), keypoints=1)


def test_inputs_are_reproducible():
    first, second = Case(channels=3, grid=4, image=(9, 8)), Case(channels=3, grid=4, image=(9, 8))
    for a, b in zip(first.inputs()[:2], second.inputs()[:2], strict=True):
        np.testing.assert_array_equal(a.data, b.data)
