"""Results for people and for papers: terminal tables, results.json, Markdown and LaTeX in the poster's layout.

Fractions become percent here and nowhere else. A number stands with its conditions: protocol, mean, threshold, counts.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from difftap.artifacts.table import Cell, Table, TableColumn
from difftap.bench.protocols import alpha_key
from difftap.bench.published import SPAIR_CLASSES, PublishedRow, comparable, published
from difftap.errors import InputError
from difftap.recipe import presets

__all__ = ["FORMATS", "dump_results", "format_results", "result_table"]

FORMATS = ("markdown", "latex")


def dump_results(results: Mapping[str, Any]) -> str:
    """results.json as text: indented, but for the per-pair lists, which stand on a line each."""
    head = {key: value for key, value in results.items() if key != "pairs"}
    text = json.dumps(head, indent=1, ensure_ascii=False, allow_nan=False)
    pairs = results["pairs"]
    lines = [f'  "{key}": {_compact(pairs[key])}' for key in ("names", "classes", "points", "digests")]
    hits = [
        f'   "{protocol}": {{\n' + ",\n".join(f'    "{a}": {_compact(row)}' for a, row in by_alpha.items()) + "\n   }"
        for protocol, by_alpha in pairs["hits"].items()
    ]
    lines.append('  "hits": {\n' + ",\n".join(hits) + "\n  }" if hits else '  "hits": {}')
    return text[:-2] + ',\n "pairs": {\n' + ",\n".join(lines) + "\n }\n}\n"


def _compact(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def _percent(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{100 * value:.{digits}f}"


def _cell(figure: Mapping[str, float | None]) -> str:
    if figure["value"] is None:
        return "-"
    return f"{_percent(figure['value'])} [{_percent(figure['low'], 1)}, {_percent(figure['high'], 1)}]"


def conditions_line(results: Mapping[str, Any]) -> str:
    """Say what a reader must know of every figure, on one line."""
    at, counts = results["conditions"], results["counts"]
    recipe, matching, data = at["recipe"], at["matching"], at["dataset"]
    matcher = recipe["matcher"]
    reading = f" {matcher['interpolation']}" if matcher["name"] == "dense" else ""
    branches = " + ".join(f"{'+'.join(b['taps'])} @ t={b['timestep']}" for b in recipe["branches"])
    prompts = sorted({b["prompt"] for b in recipe["branches"]})
    asked = ", ".join(f"'{prompt}'" if prompt else "empty" for prompt in prompts)
    if learned := at.get("prompts"):  # they stand in the texts' place
        mode = "" if learned["mode"] in ("all", learned["kind"]) else f" by {learned['mode']}"
        asked = f"learned {learned['kind']}{mode} {learned['sha256'][:8]}"
    joined = f", {matching['combine']}" if len(recipe["branches"]) > 1 else ""
    size = f"{recipe['size'][0]} x {recipe['size'][1]}"
    return (
        f"{data['name']} {data.get('split', '')}: {counts['pairs_scored']} pairs, {counts['points']} points, "
        f"{counts['images']} images; model {at['model']['name']}, {branches}{joined}, prompt {asked}, {size}, "
        f"E={recipe['ensemble']}, "
        f"seed {recipe['seed']}; {matcher['name']}{reading}, by {matching['reading']}; backend {at['backend']['name']} "
        f"{at['backend']['precision']}; recipe {at['recipe_key']}"
    )


_BASIS_WORDS = {"extent": "keypoint extent", "box": "box", "image": "image side"}


def headline_of(results: Mapping[str, Any]) -> str:
    """Choose the one figure that most people look for: the first protocol's own mean, at 0.1 or its highest alpha."""
    chosen = _main(results)
    data = results["conditions"]["dataset"]
    what = f"{recipe_name(results)} on {data['name']}"
    if chosen is None:
        return f"{what}: no protocol applies"
    name, alpha = chosen
    result = results["protocols"][name]
    by = result["conditions"]["headline"]
    figure = _percent(result["pck"][alpha][by]["value"], 1)
    shown = f"{float(alpha):.2f}" if float(alpha) == round(float(alpha), 2) else alpha
    return f"{what}: PCK@{shown} {figure} (per {by}, {_BASIS_WORDS[result['conditions']['basis']]}; {name})"


def recipe_name(results: Mapping[str, Any]) -> str:
    """Give the preset's name, if the run's recipe is one as it stands; else the model's."""
    at = results["conditions"]
    known = {recipe.key(): name for name, recipe in presets().items()}
    return known.get(at["recipe_key"], str(at["model"]["name"]))


def format_results(results: Mapping[str, Any], *, show_published: bool = True) -> list[str]:
    """Format the results as lines for a terminal."""
    lines = [headline_of(results), conditions_line(results), ""]
    boot = results["bootstrap"]
    lines.append(
        f"PCK in %, with {100 * boot['level']:g} % intervals ({boot['draws']} bootstrap draws over pairs); * marks the "
        "mean that the protocol's authors quote"
    )
    means = ("image", "point", "class-image", "class-point")
    rows = []
    for name, result in results["protocols"].items():
        headline = result["conditions"]["headline"]
        for alpha, figures in _by_alpha(result["pck"]):
            cells = [("*" if mean == headline else "") + _cell(figures[mean]) for mean in means]
            rows.append((name, alpha, *cells, _cell(result["pck_dagger"][alpha]["image"])))
    lines += Table.of(("protocol", "alpha", *means, "image, dagger"), rows).text()
    lines += [f"{name}: does not apply: {reason}" for name, reason in results["not_applied"].items()]
    lines += _protocol_notes(results)
    lines += _flag_lines(results)
    lines += _confidence_lines(results)
    if show_published:
        lines += _published_lines(results)
    return [line.rstrip() for line in [*lines, *_count_lines(results)]]


def _by_alpha(figures: Mapping[str, Any]) -> Iterable[tuple[str, Mapping[str, Any]]]:
    return [(key, value) for key, value in figures.items() if key not in ("pairs", "points")]


def _protocol_notes(results: Mapping[str, Any]) -> list[str]:
    rows = []
    for name, result in results["protocols"].items():
        at = result["conditions"]
        where = "original pixels" if at["frame"] == "original" else f"{at['frame']} of {at['side']} pixels"
        zero = result["counts"]["pairs_with_zero_threshold"]
        more = f"; {zero} pairs have a threshold of 0" if zero else ""
        rows.append((name, f"{at['comparison']} alpha x {at['basis']}, in {where}{more}"))
    return ["", *Table.of(("", ""), rows, left=(0, 1)).text(heads=False)]


def _main(results: Mapping[str, Any]) -> tuple[str, str] | None:
    """Find the protocol and threshold that cuts are shown for: the first protocol, at 0.1 or its highest alpha."""
    for name, result in results["protocols"].items():
        alphas = [alpha for alpha, _ in _by_alpha(result["pck"])]
        return name, "0.1" if "0.1" in alphas else alphas[-1]
    return None


def _flag_lines(results: Mapping[str, Any]) -> list[str]:
    chosen = _main(results)
    if chosen is None or not results["protocols"][chosen[0]]["by_flag"]:
        return []
    name, alpha = chosen
    rows = [
        (flag, value, _cell(cut[alpha]["image"]), cut["pairs"])
        for flag, values in results["protocols"][name]["by_flag"].items()
        for value, cut in values.items()
    ]
    title = f"by flag, {name} per image at alpha {alpha}"
    return ["", *Table.of(("flag", "value", "PCK", "pairs"), rows, title, left=(0, 1)).text()]


def _confidence_lines(results: Mapping[str, Any]) -> list[str]:
    chosen = _main(results)
    if chosen is None:
        return []
    name, alpha = chosen
    figures = results["protocols"][name]["calibration"].get(alpha, {})
    if not figures:
        return []
    recalls = list(dict.fromkeys(recall for one in figures.values() for recall in one["precision_at_recall"]))
    columns = (
        TableColumn("confidence", left=True),
        TableColumn("AUC", form=".3f"),
        TableColumn("calibration error", form=".3f"),
        TableColumn("n"),
        *(TableColumn(f"kept {float(recall):.0%}") for recall in recalls),
    )
    rows = []
    for confidence, one in figures.items():
        bars = one["precision_at_recall"]
        shown = [_percent(bars[recall]["precision"], 1) if recall in bars else None for recall in recalls]
        rows.append((confidence, one["auc"], one["calibration_error"], one["matches"], *shown))
    title = f"is a match right? {name} at alpha {alpha}; precision in % when so much of what is right is kept"
    return ["", *Table(columns, tuple(rows), title).text()]


def _published_lines(results: Mapping[str, Any]) -> list[str]:
    data = results["conditions"]["dataset"]
    rows = []
    for name, result in results["protocols"].items():
        for alpha, _ in _by_alpha(result["pck"]):
            for row in published(data["name"], str(data.get("split", "")), float(alpha), None, name):
                label = row.label(comparable(results, row))
                rows.append((name, alpha, _percent(row.value), f"{label}: {row.conditions}"))
    table = Table.of(("",) * 4, rows, "published, not ours:", left=(0, 3))
    return ["", *table.text(heads=False)] if rows else []


def _count_lines(results: Mapping[str, Any]) -> list[str]:
    counts = results["counts"]
    said = {
        "pairs_failed": "pairs failed and take no part",
        "pairs_pending": "pairs are not done yet",
        "pairs_without_points": "pairs have no keypoint",
        "points_unmatched": "points were refused by the matcher and count as wrong",
        "points_read_at_the_border": "source points lie outside their image and were read at its border",
    }
    lines = [f"{counts[key]} {text}" for key, text in said.items() if counts[key]]
    left_out = results["conditions"]["dataset"].get("left_out", {})
    lines += [f"{count} listed pairs were left out by the loader: {kind}" for kind, count in left_out.items()]
    lines += [f"  {one['pair']}: {one['error']}" for one in counts["failures"][:10]]
    return ["", *lines] if lines else []


_MARK = "\u2020"  # a dagger


def result_table(
    runs: Sequence[tuple[str, Mapping[str, Any]]],
    protocol: str,
    alpha: float,
    by: str = "image",
    *,
    show_published: bool = False,
) -> Table:
    """Make the poster's table: methods by SPair-71k's 18 classes, or the data set's own, and All.

    Args:
        runs: per method, its name and its results.
        protocol: whose figures.
        alpha: the threshold.
        by: ``image`` or ``point``.
        show_published: add what was published for this data set, threshold, mean and basis, labelled.

    Raises:
        InputError: a run lacks the protocol or the threshold, or there is no run.
    """
    if by not in ("image", "point") or not runs:
        raise InputError(f"{len(runs)} results averaged by {by!r}; allowed: at least one, by image or point")
    key = alpha_key(alpha)
    _same_pairs(runs, protocol)
    for name, results in runs:
        have = results["protocols"].get(protocol)
        if have is None or key not in have["pck"]:
            alphas = ", ".join(a for a, _ in _by_alpha(have["pck"])) if have else "none"
            raise InputError(f"'{name}' has no {protocol} figures at alpha {key}; it has {alphas}; score it again")
    data = runs[0][1]["conditions"]["dataset"]
    present = {name for _, results in runs for name in results["protocols"][protocol]["by_class"]}
    spair = data["name"] == "spair" and present <= set(SPAIR_CLASSES)
    classes = list(SPAIR_CLASSES) if spair else sorted(present)
    # Only what was averaged alike under the same protocol may stand in one table.
    extra = published(data["name"], str(data.get("split", "")), alpha, by, protocol) if show_published else []
    alike = all(comparable(results, row) for _, results in runs for row in extra)
    rows: list[tuple[Cell, ...]] = [(row.label(alike, _MARK), *_published_figures(row, classes)) for row in extra]
    for name, results in runs:
        result = results["protocols"][protocol]
        figures = [result["by_class"][one][key][by]["value"] if one in result["by_class"] else None for one in classes]
        rows.append((name, *figures, result["pck"][key][by]["value"]))
    heads = tuple(SPAIR_CLASSES[one] if spair else one for one in classes)
    caption = _caption(runs, protocol, key, by, bool(extra))
    if extra and not alike:
        caption += f" {_MARK}: not comparable with ours, being of the whole test set of {extra[0].pairs:,} pairs."
    columns = (
        TableColumn("method", left=True),
        *(TableColumn(head, "%", ".2f", unit_shown=False) for head in (*heads, "All")),
    )
    table = Table(columns, tuple(rows), note=caption, quoted=frozenset(range(len(extra))))
    return table.with_best(range(1, len(columns)))


def _same_pairs(runs: Sequence[tuple[str, Mapping[str, Any]]], protocol: str) -> None:
    """Refuse rows of different data sets, pairs or rules: their figures would stand beside each other unmarked."""
    first, results = runs[0]
    for name, other in runs[1:]:
        for what, one, two in (
            ("data set", *(r["conditions"]["dataset"]["name"] for r in (results, other))),
            ("split", *(str(r["conditions"]["dataset"].get("split", "")) for r in (results, other))),
            ("pairs", *(dict(zip(r["pairs"]["names"], r["pairs"]["digests"], strict=True)) for r in (results, other))),
            ("rules", *(_rules(r, protocol) for r in (results, other))),
        ):
            if one != two:
                shown = f": '{one}' and '{two}'" if isinstance(one, str) else ""
                raise InputError(
                    f"'{first}' and '{name}' differ in their {what}{shown}; one table holds runs over the same pairs, "
                    "scored alike: make one for each"
                )


def _rules(results: Mapping[str, Any], protocol: str) -> Any:
    """Say what decides a protocol's figures on a data set, beside the thresholds."""
    if protocol not in results["protocols"]:
        return None
    at = results["protocols"][protocol]["conditions"]
    return {name: at.get(name) for name in ("frame", "side", "basis", "comparison", "clip")}


def _published_figures(row: PublishedRow, classes: Sequence[str]) -> tuple[float | None, ...]:
    known = row.classes or {}
    return (*(known.get(one) for one in classes), row.value)


def _caption(
    runs: Sequence[tuple[str, Mapping[str, Any]]], protocol: str, alpha: str, by: str, with_published: bool
) -> str:
    results = runs[0][1]
    at, data = results["protocols"][protocol]["conditions"], results["conditions"]["dataset"]
    counts = sorted({(r["counts"]["pairs_scored"], r["counts"]["points"]) for _, r in runs})
    numbers = "; ".join(f"{pairs} pairs, {points} points" for pairs, points in counts)
    where = "original pixels" if at["frame"] == "original" else f"a {at['frame']} of {at['side']} pixels"
    models = ", ".join(sorted({r["conditions"]["model"]["name"] for _, r in runs}))
    note = "Published rows are the papers' own, under their conditions." if with_published else ""
    best = "Best of each column in bold." if len(runs) > 1 else ""
    return (
        f"{data['name']} {data.get('split', '')}, PCK@{alpha} per {by} in %, protocol {protocol} ({at['comparison']} "
        f"alpha times the {at['basis']}, in {where}); {numbers}; model {models}; difftap "
        f"{results['conditions']['difftap']}. {' '.join(part for part in (best, note) if part)}".rstrip()
    )
