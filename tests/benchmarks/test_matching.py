"""Dense matching beside the slow ways, on maps of a few cells."""

import numpy as np
import pytest

pytest.importorskip("torch")

CASE = {"channels": 3, "grid": 5, "image": [31, 22], "keypoints": 6, "interpolation": "bilinear"}


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_all_ways_find_the_same_pixels(script, interpolation):
    # Cells of at most two pixels: past the middles of the outermost cells all pixels tie, and rounding would decide.
    case = CASE | {"channels": 16, "grid": 12, "image": [24, 18], "interpolation": interpolation}
    found = [np.asarray(script.make(way, **case)()) for way in script.WAYS.values()]
    assert found[0].shape == (6, 2)
    assert len(np.unique(found[0], axis=0)) > 1
    for other in found[1:]:
        np.testing.assert_array_equal(found[0], other)


def test_the_floor_by_hand(script):
    # 6 keypoints and 5 offsets (a cell with itself, right, below left, below, below right), 3 channels, 25 cells: 825
    # multiply-adds. 7 images (one of norms): 5 rows to 31 columns by 2 taps each, then 22 rows of 31 by 2: 7 * 1674.
    assert script.floor_flops(**CASE) == 2 * (825 + 11718)
    # 4 taps; 25 offsets: 4 in the cell's own row, 7 in each of the three below.
    assert script.floor_flops(**CASE | {"interpolation": "bicubic"}) == 2 * (2325 + 23436)


def test_the_table_has_every_way_the_floor_and_the_agreement(script, capsys):
    sizes = {"channels": 16, "grid": 6, "keypoints": 5, "repeats": 2, "threads": 1}
    script.main(["--image", "50", "40", *(f"--{name}={value}" for name, value in sizes.items())])
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split("  ")[0]: line for line in lines}
    for way in script.WAYS:
        median, low, high = map(float, rows[way].split("  ", 1)[1].split()[:3])
        assert 0 <= low <= median <= high
    assert rows["difftap"].split()[4] == "1.00"
    assert sum(line.startswith("floor: 0.1 MFLOP at ") for line in lines) == 1
    assert "same pixel for 5 of 5 keypoints" in lines
    assert "1 threads" in lines[-1]


def test_memory_tells_the_ways_apart(script):
    """A map of this case in image size is 41 MB: the slow way holds two and more of them, ours none."""
    from timing import peak

    case = {"channels": 128, "grid": 8, "image": [320, 250], "keypoints": 1, "interpolation": "bilinear"}
    assert peak("matching:make", 1, way="dift", **case) > 80e6
    assert peak("matching:make", 1, way="difftap", **case) < 20e6


def test_sizes_are_whole_numbers_above_zero(script, capsys):
    for text in ("0", "-1"):
        with pytest.raises(SystemExit) as ended:
            script.main(["--grid", text])
        assert ended.value.code == 2
        assert f"{text} is not a whole number above 0" in capsys.readouterr().err
