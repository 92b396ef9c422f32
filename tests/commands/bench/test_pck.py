"""``difftap bench pck`` and its kin on a small data set: what is written, what is said, exit codes."""

import json

import numpy as np
import pytest
from PIL import Image as PIL

from difftap.bench.protocols import get_protocols
from difftap.bench.report import dump_results
from difftap.bench.scoring import score
from difftap.commands.bench.compare import compare
from difftap.commands.bench.pck import pck
from difftap.commands.bench.table import table
from difftap.errors import InputError
from tests import harness
from tests.bench.pck_cases import predictions, random_pairs
from tests.harness import FakePipeline, write_picture


@pytest.fixture
def willow(tmp_path):
    """A PF-WILLOW of one class with three images and their six pairs."""
    root = tmp_path / "willow"
    (root / "PF-dataset" / "car(G)").mkdir(parents=True)
    names = []
    for k in range(3):
        name = f"PF-dataset/car(G)/{k}.png"
        write_picture(root / name, (60 + 5 * k, 50), seed=k)
        names.append(name)
    points = [np.random.default_rng(10 + k).uniform(5, 45, (10, 2)) for k in range(3)]
    head = ",".join(["imageA", "imageB", *(f"{a}{s}{i}" for s in "AB" for a in "XY" for i in range(1, 11))])
    lines = [head]
    for i in range(3):
        for j in range(3):
            if i != j:
                numbers = [f"{v:.3f}" for k in (i, j) for axis in (0, 1) for v in points[k][:, axis]]
                lines.append(",".join([names[i], names[j], *numbers]))
    (root / "test_pairs.csv").write_text("\n".join(lines) + "\n")
    return root


@pytest.fixture(autouse=True)
def _no_network(request, monkeypatch):
    """Only the test on real pairs opens a model."""
    if request.node.get_closest_marker("dataset"):
        return
    monkeypatch.setattr("difftap.pipeline.pipeline.Pipeline.open", lambda recipe, *_, **__: FakePipeline(recipe))


def invoke(command, *arguments):
    return harness.invoke(arguments, command=command)


def test_pck_writes_everything_and_resumes(tmp_path, willow):
    pytest.importorskip("matplotlib")
    out = tmp_path / "out"
    done = invoke(pck, "pf-willow", willow, "-o", out, "--gallery", 1, "--plots", "--alpha", 0.2)
    assert done.exit_code == 0, done.output + str(done.exception)
    for words in ("pf-willow test: 6 pairs, 60 points", "PCK in %", "6 pairs in", "published, not ours", "sd4match"):
        assert words in done.output, words
    data = json.loads((out / "results.json").read_text())
    assert set(data["protocols"]) == {"dift", "sd4match", "geoaware", "distilldift", "distilldift-img"}
    assert data["protocols"]["dift"]["conditions"]["basis"] == "extent"
    assert "0.2" in data["protocols"]["dift"]["pck"]
    assert (out / "table.md").read_text().startswith("| method |")
    assert len(list((out / "gallery").glob("*.png"))) == 3
    assert len(list((out / "plots").glob("*.png"))) == 3
    again = invoke(pck, "pf-willow", willow, "-o", out, "--alpha", 0.2)
    assert "0 pairs in" in again.output
    assert "6 already there" in again.output
    assert json.loads((out / "results.json").read_text()) == data
    only = invoke(pck, "pf-willow", willow, "-o", out, "--score-only", "--protocol", "dift", "--no-published")
    assert only.exit_code == 0
    assert set(json.loads((out / "results.json").read_text())["protocols"]) == {"dift"}
    assert "published" not in only.output


def test_score_only_is_of_the_run_that_is_asked_for(tmp_path, willow):
    out = tmp_path / "out"
    assert invoke(pck, "pf-willow", willow, "-o", out, "--limit", 4).exit_code == 0
    lines = (out / "predictions.jsonl").read_text().splitlines(keepends=True)

    def again(*arguments):
        return invoke(pck, *arguments, "-o", out, "--score-only")

    asked = ("pf-willow", willow, "--limit", 4)
    assert again(*asked).exit_code == 0
    assert again(*asked, "--recipe", "pocket", "--reading", "centres").exit_code == 0
    for arguments, words in (
        (("spair", willow, "--limit", 4), "made with data set pf-willow, and spair is asked for"),
        (("pf-willow", willow), "made with --limit 4, and none is asked for"),
        ((*asked, "--per-class", 2), "--per-class"),
        ((*asked, "--part", "test"), "made with --part none, and test is asked for"),
        ((*asked, "--recipe", "dift"), "made with recipe"),
        ((*asked, "--seed", 3), "made with recipe"),
        ((*asked, "--reading", "corners"), "made with --reading centres"),
        ((*asked, "--no-confidence"), "made with --confidence True"),
        ((*asked, "--overwrite"), "--overwrite has no say"),
        ((*asked, "--features", tmp_path), "--features has no say"),
        ((*asked, "--split", "val"), "made with --split"),
    ):
        refused = again(*arguments)
        assert isinstance(refused.exception, InputError), arguments
        assert words in str(refused.exception)
    gone = again("pf-willow", tmp_path / "nowhere", "--limit", 4)
    assert gone.exit_code == 0
    assert "could not be compared" in gone.stderr
    text = (willow / "test_pairs.csv").read_text()
    (willow / "test_pairs.csv").write_text("\n".join([text.splitlines()[0], *text.splitlines()[:0:-1]]) + "\n")
    assert "are not those of" in str(again(*asked).exception)
    (willow / "test_pairs.csv").write_text(text)
    (out / "predictions.jsonl").write_text("".join(lines[:-1]))
    pending = again(*asked)
    assert pending.exit_code == 1
    assert "1 pairs are not done yet" in pending.output


def test_a_store_that_would_never_be_used_is_refused(tmp_path, willow):
    (tmp_path / "s.zarr").mkdir()
    (tmp_path / "s.zarr" / "zarr.json").write_text("{}")
    done = invoke(
        pck, "pf-willow", willow, "-o", tmp_path / "out", "--recipe", "dift", "--features", tmp_path / "s.zarr"
    )
    assert "prompts by category" in str(done.exception)


def test_headline_and_the_mean_of_the_table(tmp_path, willow, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    done = invoke(pck, "pf-willow", willow, "-o", ".", "--protocol", "distilldift")
    assert done.exit_code == 0, done.exception
    assert done.stdout.splitlines()[0].startswith("pocket on pf-willow: PCK@0.10 ")
    assert "(per point, keypoint extent; distilldift)" in done.stdout.splitlines()[0]
    table = (tmp_path / "here" / "table.md").read_text()
    assert "| here |" in table
    assert "PCK@0.05 per point" in table


def test_a_synthetic_set_does_not_eat_its_own_output(tmp_path):
    for k in range(2):
        write_picture(tmp_path / f"{k}.png", seed=k)
    PIL.fromarray(np.random.default_rng(0).integers(0, 256, (90, 90, 3), np.uint8)).save(tmp_path / "cut.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:4000])  # its header is whole
    for _ in range(2):  # a damaged image fails its pairs, and ends nothing
        done = invoke(pck, "synthetic", tmp_path, "-o", tmp_path / "out", "--gallery", 1)
        assert done.exit_code == 1, done.output
        assert isinstance(done.exception, SystemExit), done.exception
        data = json.loads((tmp_path / "out" / "results.json").read_text())
        assert data["counts"]["pairs_listed"] == 6
        assert data["counts"]["pairs_scored"] == 4
        assert data["counts"]["pairs_failed"] == 2
        assert "cut.jpg" in data["counts"]["failures"][0]["error"]


def test_lists_and_flips_are_options(tmp_path, willow):
    done = invoke(pck, "pf-willow", willow, "-o", tmp_path / "out", "--pairs", "csv")
    assert done.exit_code == 0, done.exception
    data = json.loads((tmp_path / "out" / "results.json").read_text())
    assert data["conditions"]["dataset"]["pairs"] == "csv"
    refused = invoke(pck, "pf-willow", willow, "-o", tmp_path / "b", "--flip", "both")
    assert "has no option --flip" in str(refused.exception)


def test_help_has_sections():
    text = invoke(pck, "--help").output
    assert text.index("Options:") < text.index("--score-only") < text.index("Recipe:") < text.index("--prompt")
    assert text.index("--prompt") < text.index("Runtime:") < text.index("--threads")


def test_pck_with_a_missing_image(tmp_path, willow):
    (willow / "PF-dataset" / "car(G)" / "1.png").unlink()
    refused = invoke(pck, "pf-willow", willow, "-o", tmp_path / "out")
    assert isinstance(refused.exception, InputError)
    done = invoke(pck, "pf-willow", willow, "-o", tmp_path / "out", "--allow-missing")
    assert done.exit_code == 0
    assert "4 listed pairs were left out by the loader" in done.output
    data = json.loads((tmp_path / "out" / "results.json").read_text())
    assert data["conditions"]["dataset"]["listed"] == 6
    assert len(data["conditions"]["dataset"]["problems"]) == 4
    assert data["counts"]["pairs_scored"] == 2


def test_pck_refuses_before_anything_slow(tmp_path, willow):
    for arguments, message in (
        (("pf-willow", willow, "--protocol", "dfit"), "no protocol 'dfit'"),
        (("pf-willow", willow, "--alpha", "-1"), "--alpha is -1"),
        (("pf-willow", willow, "--combine", "sum"), "combine is 'sum'"),
        (("pf-wilow", willow), "no data set 'pf-wilow'"),
        (("pf-willow", willow, "--score-only"), "cannot be read"),
    ):
        done = invoke(pck, *arguments, "-o", tmp_path / "out")
        assert isinstance(done.exception, InputError)
        assert message in str(done.exception)


def test_subset_is_part_of_the_conditions(tmp_path, willow):
    assert invoke(pck, "pf-willow", willow, "-o", tmp_path / "a", "--limit", 2).exit_code == 0
    data = json.loads((tmp_path / "a" / "results.json").read_text())
    assert data["counts"]["pairs_scored"] == 2
    assert data["conditions"]["dataset"]["subset"] == {"limit": 2, "per_class": None}


def test_compare_and_table(tmp_path):
    pytest.importorskip("matplotlib")
    for name, seed in (("a", 1), ("b", 2)):
        (tmp_path / name).mkdir()
        text = dump_results(score(predictions(random_pairs(1, 20, spread=6.0 * seed)), get_protocols()))
        (tmp_path / name / "results.json").write_text(text)
    files = tmp_path / "a" / "results.json", tmp_path / "b" / "results.json"
    done = invoke(compare, *files, "--draws", 200, "--json", tmp_path / "c.json")
    assert done.exit_code == 0, done.exception
    assert "20 common pairs" in done.output
    assert json.loads((tmp_path / "c.json").read_text())["draws"] == 200
    made = invoke(table, *files, "--name", "first", "--name", "second", "--plots", tmp_path / "plots")
    assert made.exit_code == 0, made.exception
    assert made.output.splitlines()[-3].startswith("| second |")
    assert "(published, poster\u2020" in made.output
    assert len(list((tmp_path / "plots").glob("*.png"))) == 4
    assert invoke(table, *files, "--format", "latex").output.startswith("\\begin{table*}")
    wrong = invoke(table, *files, "--name", "one")
    assert "1 names for 2 results" in str(wrong.exception)


RUN = ["--no-confidence", "--protocol", "sd4match", "--draws", "10", "--backend", "openvino"]


def points_found(root, output, cache, precision) -> float:
    """PCK@0.1 in percent, image mean."""
    arguments = ["bench", "pck", "pf-willow", str(root), "-o", str(output), "--precision", precision, *RUN]
    done = harness.invoke(arguments, env={"DIFFTAP_CACHE": str(cache)})
    assert done.exit_code == 0, done.output
    results = json.loads((output / "results.json").read_text())
    return 100 * results["protocols"]["sd4match"]["pck"]["0.1"]["image"]["value"]


@pytest.mark.slow
@pytest.mark.dataset
@pytest.mark.parametrize(("precision", "bound"), [("bf16x3", 0.2), ("bf16", 1.0), ("int8", 1.0)])
def test_precisions_find_the_points_that_float32_finds(real, tmp_path, precision, bound):
    openvino = pytest.importorskip("openvino")
    if precision.startswith("bf16") and "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("this CPU has no bf16")
    if precision == "int8":
        pytest.importorskip("nncf")
    root = real("pf-willow-half")
    want = points_found(root, tmp_path / "fp32", tmp_path / "cache", "fp32")
    got = points_found(root, tmp_path / precision, tmp_path / "cache", precision)
    assert want > 50
    assert abs(got - want) <= bound, (want, got)
