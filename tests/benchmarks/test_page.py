"""`make bench`: what it runs with and without a data set, and the page it makes."""

import json
import shutil
import subprocess

import pytest

from difftap.bench.contenders import Contender
from difftap.bench.throughput import Throughput, ThroughputCase, ThroughputRow, to_json
from difftap.bench.workers import Timing
from difftap.recipe import load_recipe
from tests.harness import ROOT, FakePipeline, invoke


@pytest.fixture
def results(tmp_path, monkeypatch):
    """A folder with throughput of three contenders, of which one failed, and PCK of pairs made of the examples."""
    monkeypatch.setattr("difftap.pipeline.pipeline.Pipeline.open", lambda recipe, *_, **__: FakePipeline(recipe))
    done = invoke(["bench", "pck", "synthetic", ROOT / "examples", "--recipe", "pocket", "-o", tmp_path / "pck"])
    assert done.exit_code == 0, done.output
    rows = (
        ThroughputRow(Contender("ort"), timing=Timing.of([0.25, 0.5, 0.125]), rate=4.0, peak=123_000_000),
        ThroughputRow(Contender("openvino"), timing=Timing.of([0.5]), rate=2.0, peak=99_000_000),
        ThroughputRow(Contender("dift"), failed="no <memory>"),
    )
    case = ThroughputCase(load_recipe("pocket"), tuple(row.contender for row in rows))
    told = {"cpu": "a processor", "threads": 2, "difftap": "0"}
    (tmp_path / "throughput").mkdir()
    measured = to_json(Throughput(case, rows, "ort:fp32", {}, {}, told))
    (tmp_path / "throughput" / "throughput.json").write_text(json.dumps(measured))
    return tmp_path


def test_the_page_has_throughput_and_pck(script, results, capsys):
    script.main([str(results)])
    assert capsys.readouterr().out.startswith(f"wrote {results / 'bench.md'}")
    page, site = (results / "bench.md").read_text(), (results / "bench.html").read_text()
    assert "| ort:fp32 | **4.00** | 250.0 | 125.0 | 500.0 | 123 |" in page
    assert "| dift:fp32 | - | - | - | - | - |" in page
    assert "dift:fp32 could not be measured: no <memory>" in page
    assert "no &lt;memory&gt;" in site
    pck = json.loads((results / "pck" / "results.json").read_text())["protocols"]
    assert pck
    for name, one in pck.items():
        by = one["conditions"]["headline"]
        value = one["pck"]["0.1"][by]["value"]
        assert f"| {name} | 0.1 | {100 * value:.2f} |" in page
        assert f"<td>{100 * value:.2f}</td>" in site


def test_without_a_data_set_the_examples_stand_in(tmp_path):
    if shutil.which("make") is None:
        pytest.skip("there is no make here")

    def asked(**given):
        words = ["make", "-n", "bench", *(f"{name}={value}" for name, value in given.items())]
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
        return " ".join(done.stdout.replace("\\\n", " ").split())

    assert "bench pck synthetic examples --recipe pocket" in asked(PF_WILLOW="")
    assert f'bench pck pf-willow "{tmp_path}" --recipe pocket --overwrite --per-class 10' in asked(PF_WILLOW=tmp_path)
    assert "bench throughput" in asked(PF_WILLOW="")
    assert 'benchmarks/page.py "out/bench"' in asked(PF_WILLOW="")
