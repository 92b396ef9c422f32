"""Tables, files and pictures: what they say, with conditions beside the numbers and published rows labelled."""

import json
import re

import numpy as np
import pytest

from difftap.bench.gallery import choose, save_gallery
from difftap.bench.predictions import Prediction
from difftap.bench.protocols import PROTOCOLS, get_protocols
from difftap.bench.published import PUBLISHED, SPAIR_CLASSES, SPAIR_TEST_PAIRS, published
from difftap.bench.report import dump_results, format_results, headline_of, result_table
from difftap.bench.scoring import SCHEMA, Resampling, measure, score
from difftap.errors import InputError
from difftap.matching import Matches
from difftap.recipe import load_recipe
from tests.bench.pck_cases import prediction, predictions, random_pairs, samples


@pytest.fixture(scope="module")
def results():
    return score(predictions(random_pairs(2, 54, classes=tuple(SPAIR_CLASSES))), get_protocols())


def test_published_table_adds_up():
    """The poster's All column is the pair-weighted mean of its classes: what makes it per image, most likely."""
    assert sum(SPAIR_TEST_PAIRS.values()) == 12234
    poster = [row for row in PUBLISHED if row.classes]
    assert len(poster) == 9
    for row in poster:
        weighted = sum(row.classes[name] * count for name, count in SPAIR_TEST_PAIRS.items()) / 12234
        assert weighted == pytest.approx(row.value, abs=6e-4), row.method
    assert [row.method for row in published("pf-willow", "test", 0.1)] == ["DIFT", "SD+DINO", "DINOv2"]
    assert published("spair", "val", 0.05) == []
    assert all(0 < row.value < 1 and row.conditions and row.source for row in PUBLISHED)


def test_results_are_json_with_every_condition(results):
    data = json.loads(dump_results(results))
    assert data == json.loads(json.dumps(results))
    assert data["schema"] == SCHEMA
    assert {"recipe", "recipe_key", "model", "backend", "dataset", "matching"} <= set(data["conditions"])
    for name, one in data["protocols"].items():
        assert one["conditions"]["comparison"] in ("<", "<=")
        assert one["conditions"]["basis"] in ("box", "image")
        assert one["counts"]["pairs"] == 54
        assert set(one["pck"]["0.05"]) == {"image", "point", "class-image", "class-point"}
        assert set(data["pairs"]["hits"][name]) == {f"{a:g}" for a in PROTOCOLS[name].alphas}
    assert data["pairs"]["points"][:2] == results["pairs"]["points"][:2]
    assert max(map(len, dump_results(results).splitlines())) < 3000
    empty = score(predictions([]), get_protocols(["dift"]))
    assert json.loads(dump_results(empty))["protocols"]["dift"]["pck"]["0.1"]["image"]["value"] is None
    assert json.loads(dump_results({**results, "pairs": {**results["pairs"], "hits": {}}}))["pairs"]["hits"] == {}


def test_terminal_says_conditions_counts_and_published(results):
    text = "\n".join(format_results(results))
    for words in (
        "spair test: 54 pairs",
        "pocket",
        "E=1",
        "<= alpha x box, in square of 768 pixels",
        "< alpha x box, in letterbox of 960",
        "95 % intervals",
        "published, not ours",
        "DIFT dual layer",
        "AUC",
        "occlusion",
        "flag       value",
    ):
        assert words in text, words
    assert "published" not in "\n".join(format_results(results, show_published=False))
    assert all(line == line.rstrip() for line in format_results(results))


def test_learned_prompts_are_among_the_conditions(results):
    said = {"kind": "cpm", "mode": "class", "sha256": "0123456789abcdef"}
    learned = {**results, "conditions": {**results["conditions"], "prompts": said}}
    assert "prompt learned cpm by class 01234567" in format_results(learned)[1]
    single = {**results, "conditions": {**results["conditions"], "prompts": {**said, "kind": "single", "mode": "all"}}}
    assert "prompt learned single 01234567" in format_results(single)[1]
    assert "prompt empty" in format_results(results)[1]


def test_terminal_tells_what_was_left_out():
    pairs = [
        prediction([[1, 1]], [[1, 1]]),
        prediction([[1, 1]], [[np.nan, np.nan]], index=1, error="no image"),
        prediction([[1, 1]], [[np.nan, np.nan]], index=2, clamped=1, box=(0, 0, 0, 0)),
    ]
    run_ = predictions(pairs)
    run_.conditions["dataset"]["left_out"] = {"missing-image": 4}
    text = "\n".join(format_results(score(run_, get_protocols())))
    for words in (
        "1 pairs failed",
        "pair-1: no image",
        "1 points were refused",
        "1 source points lie outside",
        "4 listed pairs were left out by the loader: missing-image",
        "1 pairs have a threshold of 0",
    ):
        assert words in text, words


def test_table_in_the_posters_layout(results):
    table = result_table([("ours", results)], "dift", 0.05, show_published=True)
    assert tuple(c.head for c in table.columns) == ("method", *SPAIR_CLASSES.values(), "All")
    assert len(table.rows) == 9 + 1
    lines = table.markdown().splitlines()
    assert lines[0].split("|")[2:4] == [" aero ", " bike "]
    assert len({line.count("|") for line in lines[:12]}) == 1
    assert "DIFT dual layer (published, poster\u2020)" in table.markdown()
    assert "\u2020: not comparable with ours, being of the whole test set of 12,234 pairs" in table.note
    assert "(published, poster\\dag{})" in table.latex()
    full = {**results, "counts": {**results["counts"], "pairs_scored": 12234}}
    assert (
        "DIFT dual layer (published, poster) |"
        in result_table([("a", full)], "dift", 0.05, show_published=True).markdown()
    )
    geoaware = result_table([("a", full)], "geoaware", 0.05, show_published=True)
    assert [row[0] for row in geoaware.rows][:2] == [
        "DINOv2-B (published, GeoAware-SC)",
        "DIFT (published, GeoAware-SC)",
    ]
    assert len(geoaware.rows) == 5 + 1
    assert len(result_table([("a", full)], "distilldift", 0.05, "point", show_published=True).rows) == 1
    assert "| ours |" in table.markdown()
    for words in ("PCK@0.05 per image", "protocol dift (<= alpha times the box", "54 pairs", "Published rows"):
        assert words in table.note


def test_best_of_each_column_is_bold_among_our_rows(results):
    worse = low(results)
    table = result_table([("ours", results), ("worse", worse)], "dift", 0.05, show_published=True)
    rows = [line.split("|")[1:-1] for line in table.markdown().splitlines()[2:13]]
    for column in range(1, 20):
        ours = [row[column].strip() for row in rows[-2:]]
        figures = {float(cell.strip("*")) for cell in ours}
        best = {max(figures)} if len(figures) > 1 else set()  # nothing is bold where all are alike
        assert {float(cell.strip("*")) for cell in ours if cell.startswith("**")} == best
        assert not any("**" in row[column] for row in rows[:-2])  # published rows never are
    assert "**" not in result_table([("alone", results)], "dift", 0.05, show_published=True).markdown()


def test_a_table_holds_one_data_set_the_same_pairs_and_rules(results):
    other = json.loads(json.dumps(results))
    other["conditions"]["dataset"]["name"] = "pf-pascal"
    fewer = score(predictions(random_pairs(2, 53, classes=tuple(SPAIR_CLASSES))), get_protocols())
    rules = json.loads(json.dumps(results))
    rules["protocols"]["dift"]["conditions"]["basis"] = "image"
    for bad, what in ((other, "data set: 'spair' and 'pf-pascal'"), (fewer, "pairs"), (rules, "rules")):
        with pytest.raises(InputError, match=f"'a' and 'b' differ in their {what}"):
            result_table([("a", results), ("b", bad)], "dift", 0.05)


def test_thresholds_that_differ_late_do_not_collide():
    settings = Resampling(alphas=(0.1, 0.10, 0.1000001, 1.0))
    one = score(predictions(random_pairs(2, 5)), get_protocols(["dift"]), settings)["protocols"]["dift"]
    assert [key for key in one["pck"] if key not in ("pairs", "points")] == ["0.05", "0.1", "0.1000001", "0.15", "1"]


def test_geoaware_has_thresholds_of_its_own_on_pf_pascal():
    pairs = [prediction([[1, 1]], [[1, 1]], box=None)]
    for name, alphas in (("pf-pascal", [0.05, 0.1, 0.15]), ("pf-willow", [0.01, 0.05, 0.1])):
        one = score(predictions(pairs, name), get_protocols(["geoaware"]))["protocols"]["geoaware"]
        assert one["conditions"]["alphas"] == alphas
        assert [float(key) for key in one["pck"] if key not in ("pairs", "points")] == alphas


def test_headline(results):
    assert headline_of(results).startswith("pocket on spair: PCK@0.10 ")
    assert headline_of(results).endswith("(per image, box; dift)")
    preset = json.loads(json.dumps(results))
    preset["conditions"]["recipe_key"] = load_recipe("dual").key()
    assert headline_of(preset).startswith("dual on spair")
    assert "no protocol applies" in headline_of({**results, "protocols": {}})


def low(results):
    """The same results with nothing right."""
    data = json.loads(json.dumps(results))
    one = data["protocols"]["dift"]
    for figures in (one["pck"], *one["by_class"].values()):
        figures["0.05"]["image"]["value"] = 0.0
    return data


def test_latex_compiles_by_eye(results):
    text = result_table([("50 % & more_", results)], "dift", 0.1, by="point").latex()
    assert "50 \\% \\& more\\_ & " in text
    assert "\\textless{}= alpha" in text
    assert text.startswith("\\begin{table*}")
    assert "\\scriptsize" in text
    assert "a \\textgreater{} b" in result_table([("a > b", results)], "dift", 0.1).latex()
    rows = [line for line in text.splitlines() if line.endswith("\\\\")]
    assert {len(re.split(r"(?<!\\)&", line)) for line in rows} == {20}
    assert text.count("{") == text.count("}")


def test_table_of_other_classes_and_bad_values(results):
    other = score(predictions(random_pairs(3, 6), "pf-willow"), get_protocols(["dift"]))
    assert [c.head for c in result_table([("a", other)], "dift", 0.1).columns] == ["method", "cat", "dog", "All"]
    with pytest.raises(InputError, match=r"no dift figures at alpha 0.3; it has 0.05, 0.1, 0.15"):
        result_table([("a", other)], "dift", 0.3)
    with pytest.raises(InputError, match="no sd4match figures"):
        result_table([("a", other)], "sd4match", 0.1)
    with pytest.raises(InputError, match="averaged by 'mean'"):
        result_table([("a", other)], "dift", 0.1, "mean")


def test_plots(tmp_path, results):
    pytest.importorskip("matplotlib")
    from difftap.bench.plots import _places, save_plots

    files = save_plots([("one", results), ("two", low(results))], tmp_path / "plots")
    assert [f.stem for f in files] == ["pck-over-alpha", "pck-per-class", "pck-by-flag", "reliability"]
    assert all(f.read_bytes().startswith(b"\x89PNG") for f in files)
    bare = score(predictions([prediction([[1, 1]], [[1, 1]])]), get_protocols(["dift"]))
    assert len(save_plots([("bare", bare)], tmp_path / "plots")) == 3  # no flags
    assert not (tmp_path / "plots" / "pck-by-flag.png").exists()
    assert _places([1, 3, 4]) == [1 / 16, 5 / 16, 12 / 16]
    with pytest.raises(InputError, match="not all results hold protocol 'x'"):
        save_plots([("one", results)], tmp_path, protocol="x")
    with pytest.raises(InputError, match=r"alpha 0\.7"):
        save_plots([("one", results)], tmp_path, alpha=0.7)


def test_plots_without_matplotlib_give_the_pip_line(monkeypatch, tmp_path, results):
    from difftap.bench.plots import save_plots
    from difftap.errors import MissingExtraError

    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'difftap\[bench\]'"):
        save_plots([("one", results)], tmp_path)


def test_gallery(tmp_path):
    made = []
    for k, sample in enumerate(samples(tmp_path / "data", 6)):
        found = Matches(
            sample.source_points, sample.target_points + 3.0 * k, *(np.full(len(sample.source_points), 0.1),) * 3
        )
        made.append(Prediction.of(k, sample, found))
    run_ = predictions(made)
    files = save_gallery(run_, PROTOCOLS["dift"], tmp_path / "gallery", 2)
    assert [f.name for f in files] == [
        "best-1-000.png",
        "best-2-001.png",
        "median-1-002.png",
        "median-2-003.png",
        "worst-1-005.png",
        "worst-2-004.png",
    ]
    (tmp_path / "gallery" / "mine.png").write_bytes(b"")
    save_gallery(run_, PROTOCOLS["dift"], tmp_path / "gallery", 1)  # what an earlier one left does not stay
    assert sorted(f.name for f in (tmp_path / "gallery").iterdir()) == [
        "best-1-000.png",
        "median-1-002.png",
        "mine.png",
        "worst-1-005.png",
    ]
    boxless = predictions([prediction([[1, 1]], [[1, 1]], box=None)])
    with pytest.raises(InputError, match="no gallery under protocol 'dift'"):
        save_gallery(boxless, PROTOCOLS["dift"], tmp_path, 1)


def test_few_pairs_are_not_shown_twice():
    measured = [measure(p, PROTOCOLS["dift"], "spair") for p in random_pairs(0, 2)]
    chosen = choose(measured, 3)
    assert sorted(k for group in chosen.values() for k in group) == [0, 1]
    assert choose([], 3) == {"best": [], "median": [], "worst": []}


def test_a_pair_without_points_is_counted_apart():
    pairs = [prediction([[10, 10]], [[10, 10]], index=0), prediction([], [], index=1)]
    result = score(predictions(pairs), get_protocols(["dift"]), Resampling(draws=5))
    (under,) = result["protocols"].values()
    assert result["counts"]["pairs_without_points"] == 1
    assert (under["counts"]["pairs"], under["counts"]["points"]) == (1, 1)
    assert (under["pck"]["pairs"], under["pck"]["points"]) == (1, 1)
    assert (under["by_class"]["cat"]["pairs"], under["by_class"]["cat"]["points"]) == (1, 1)
