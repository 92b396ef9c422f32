"""Distances beside other packages', on a few vectors."""

import re

import pytest


@pytest.mark.parametrize("metric", ["euclidean", "manhattan", "cosine", "correlation", "dcor"])
def test_ours_agree_with_the_others(script, capsys, metric):
    pytest.importorskip("dcor" if metric == "dcor" else "scipy")
    sizes = {"vectors": 12, "width": 40, "pairs": 7, "repeats": 1, "threads": 1}
    script.main(["--metric", metric, *(f"--{name}={value}" for name, value in sizes.items())])
    out = capsys.readouterr().out
    assert f"{metric}, 12 vectors of 40" in out
    assert "difftap, 66 pairs" in out  # 12 * 11 / 2
    assert f"{'dcor, 7' if metric == 'dcor' else 'scipy, 66'} pairs" in out
    # float32 vectors, distances of up to some tens
    assert float(re.search(r"largest difference (\S+)", out)[1]) < 1e-4
