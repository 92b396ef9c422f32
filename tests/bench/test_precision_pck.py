"""What fast precisions cost in points found, on real pairs with the embedded model."""

import json

import pytest

from tests.harness import invoke

openvino = pytest.importorskip("openvino")

RUN = ["--no-confidence", "--protocol", "sd4match", "--draws", "10", "--backend", "openvino"]


def points_found(root, output, cache, precision) -> float:
    """PCK@0.1 in percent, image mean."""
    arguments = ["bench", "pck", "pf-willow", str(root), "-o", str(output), "--precision", precision, *RUN]
    done = invoke(arguments, env={"DIFFTAP_CACHE": str(cache)})
    assert done.exit_code == 0, done.output
    results = json.loads((output / "results.json").read_text())
    return 100 * results["protocols"]["sd4match"]["pck"]["0.1"]["image"]["value"]


@pytest.mark.slow
@pytest.mark.dataset
@pytest.mark.parametrize(("precision", "bound"), [("bf16x3", 0.2), ("bf16", 1.0), ("int8", 1.0)])
def test_precisions_find_the_points_that_float32_finds(real, tmp_path, precision, bound):
    if precision.startswith("bf16") and "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("this CPU has no bf16")
    if precision == "int8":
        pytest.importorskip("nncf")
    root = real("pf-willow-half")
    want = points_found(root, tmp_path / "fp32", tmp_path / "cache", "fp32")
    got = points_found(root, tmp_path / precision, tmp_path / "cache", precision)
    assert want > 50
    assert abs(got - want) <= bound, (want, got)
