"""The study's tables: rows of text, for the terminal, Markdown and HTML alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from difftap.study.figures import TITLES, UNITS

__all__ = ["TextTable", "axis_tables", "conditions_line", "trend_lines"]

Results = Mapping[str, Any]


@dataclass(frozen=True)
class TextTable:
    """A table ready for print.

    Attributes:
        title: what it shows.
        heads: the columns.
        rows: the cells.
        note: the conditions and conventions a reader needs.
    """

    title: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""

    def markdown(self) -> str:
        """A Markdown table under a heading."""

        def line(cells: Sequence[str]) -> str:
            return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

        lines = [f"### {self.title}", "", line(self.heads), "|---|" + "---:|" * (len(self.heads) - 1)]
        lines += [line(row) for row in self.rows]
        return "\n".join([*lines, "", *([self.note, ""] if self.note else [])])

    def text(self) -> list[str]:
        """Lines for a terminal."""
        widths = [max(len(row[k]) for row in (self.heads, *self.rows)) for k in range(len(self.heads))]

        def line(cells: Sequence[str]) -> str:
            first, *rest = zip(cells, widths, strict=True)
            return "  ".join([f"{first[0]:<{first[1]}}", *(f"{cell:>{width}}" for cell, width in rest)]).rstrip()

        return [self.title, line(self.heads), *map(line, self.rows)]


def number(value: float | None, digits: int = 4) -> str:
    """A figure for print; ``-`` where there is none."""
    return "-" if value is None else f"{value:.{digits}g}"


def conditions_line(data: Results) -> str:
    """What a reader must know of a data set's figures, on one line."""
    at, counts, about = data["conditions"], data["counts"], data["data"]
    recipe = at["recipe"]
    size = f"{recipe['size'][0]} x {recipe['size'][1]}"
    wanted = about["wanted"]
    text = (
        f"{TITLES.get(about['name'], about['name'])} {about['split']}: {counts['objects']} objects over "
        f"{100 * wanted['min_area']:g} % of their image, in {counts['images']} images; model {at['model']['name']}, "
        f"{size}, E={recipe['ensemble']}, seed {recipe['seed']}; cells by {data['rule']}, "
        f"{counts['kept_by_largest_cell']} objects kept by their largest cell; backend {at['backend']['name']} "
        f"{at['backend'].get('precision', '')}; difftap {at['difftap']}"
    )
    missing = about.get("missing", 0)
    if missing or counts["images_failed"]:
        text += f"; {missing} listed images missing, {counts['images_failed']} failed"
    return text


def _verdict(case: Results) -> str:
    trend = case["trend"]
    if trend["holds"] is None:
        return "not known"
    share = trend["share_of_draws"]
    return ("holds" if trend["holds"] else "does not hold") + ("" if share is None else f" ({100 * share:.0f} %)")


def trend_lines(results: Results) -> list[str]:
    """Per data set and case whether the paper's order of means holds; one line each."""
    lines = []
    for name, data in results["datasets"].items():
        title = f"{TITLES.get(name, name)} ({data['counts']['images']} images)"
        if results["axis"] == "video":
            held = [row for row in data["offsets"] if row["holds"]]
            known = [row for row in data["offsets"] if row["holds"] is not None]
            lines.append(f"{title}: sidi < scdi at {len(held)} of {len(known)} offsets")
            continue
        for case in data["cases"]:
            label = UNITS[case["metric"]] if results["axis"] == "distances" else case["label"]
            order = " < ".join(case["trend"]["order"])
            lines.append(f"{title}, {label}: {order} {_verdict(case)}")
    return lines


def _means(name: str, data: Results, axis: str) -> TextTable:
    sets = ["sidi", "scsi", "dcsi"] if axis == "transforms" else ["scsi", "scdi", "dcsi", "dcdi"]
    rows = []
    for case in data["cases"]:
        cells = [case["metric"] if axis == "distances" else case["label"]]
        for key in sets:
            one = case["sets"].get(key)
            box = one["box"] if one else {}
            cells.append(f"{number(box.get('mean'))} ± {number(box.get('std'), 3)}" if one and one["count"] else "-")
        rows.append((*cells, _verdict(case)))
    counts = ", ".join(
        f"{key} {data['cases'][0]['sets'][key]['count']:,}" for key in sets if key in data["cases"][0]["sets"]
    )
    order = " < ".join(data["cases"][0]["trend"]["order"])
    metric = "" if axis == "distances" else f" {UNITS[data['cases'][0]['metric']]}."
    note = (
        f"Mean ± standard deviation over pairs.{metric} Pairs: {counts}. Trend: {order}, and the share of bootstrap "
        f"draws over images in which it holds. {conditions_line(data)}."
    )
    head = "measure" if axis == "distances" else "case"
    return TextTable(f"{TITLES.get(name, name)}: distances by set", (head, *sets, "trend"), tuple(rows), note)


def _dunn(name: str, data: Results, axis: str) -> TextTable:
    """Dunn's index of every pair of sets; for measures with what the paper prints."""
    pairs = list(dict.fromkeys(pair for case in data["cases"] for pair in case["pairs"]))
    rows = []
    for case in data["cases"]:
        label = case["metric"] if axis == "distances" else case["label"]
        for form in ("dunn_minmax", "dunn_mean"):
            cells = [number(case["pairs"].get(pair, {}).get(form)) for pair in pairs]
            rows.append((f"{label}, {form}", *cells))
        paper = case.get("published_dunn") or {}
        if paper:
            rows.append((f"{label}, published", *(f"{paper[p]:.5f}" if p in paper else "-" for p in pairs)))
    note = (
        "dunn_minmax: least distance between members of two sets over the largest within one. dunn_mean: distance of "
        "the two means over the larger mean distance within a set. Larger is better."
    )
    if any(case.get("published_dunn") for case in data["cases"]):
        note += " Published rows are the paper's Table 1 (its images and model; which form is not said), not ours."
    return TextTable(f"{TITLES.get(name, name)}: Dunn index by pair of sets", ("", *pairs), tuple(rows), note)


def _tests(name: str, data: Results, axis: str) -> TextTable:
    rows = []
    for case in data["cases"]:
        label = case["metric"] if axis == "distances" else case["label"]
        for pair, one in case["pairs"].items():
            test, effect = one["kruskal_wallis"], one["effect"]
            rows.append(
                (
                    f"{label}, {pair}",
                    number(test["statistic"]),
                    _p(test["p"]),
                    number(effect["value"], 3),
                    f"[{number(effect['low'], 3)}, {number(effect['high'], 3)}]",
                )
            )
    normal = [
        one["shapiro_wilk"]["p"]
        for case in data["cases"]
        for one in case["sets"].values()
        if one["shapiro_wilk"]["p"] is not None
    ]
    rejected = sum(p < 0.05 for p in normal)
    note = (
        f"Kruskal-Wallis of two sets and its effect size epsilon squared (0 none, 1 ranks do not mix), with a 95 % "
        f"interval from resampled images. Shapiro-Wilk rejects normality (p < 0.05) for {rejected} of {len(normal)} "
        "sets. Pairs that share an object are not independent: read the effect size and its interval, not p."
    )
    heads = ("sets", "H", "p", "epsilon squared", "interval")
    return TextTable(f"{TITLES.get(name, name)}: tests", heads, tuple(rows), note)


def _p(value: float | None) -> str:
    if value is None:
        return "-"
    return "< 1e-300" if value == 0 else f"{value:.2g}"


def _video(name: str, data: Results) -> TextTable:
    rows = []
    for row in data["offsets"]:
        cells = [str(row["offset"])]
        for key in ("sidi", "scdi"):
            box = row[key]["box"]
            cells += [f"{number(box['mean'])} ± {number(box['std'], 3)}" if box["count"] else "-", str(box["count"])]
        near = row["nearest"]
        share = "-" if near["share"] is None else f"{100 * near['share']:.1f} %"
        held = {True: "holds", False: "does not hold", None: "not known"}[row["holds"]]
        rows.append((*cells, held, share, str(near["count"])))
    scsi = data["scsi"]["box"]
    note = (
        f"{UNITS[data['metric']]}, mean ± standard deviation. sidi: the same person that many frames later; scdi: "
        f"another person of the clip. Nearest: how often a person's nearest in the later frame is itself, where it and "
        f"another are there. Two people in one frame (scsi): {number(scsi['mean'])} (n = {scsi['count']}). "
        f"{conditions_line(data)}."
    )
    heads = ("offset", "sidi", "n", "scdi", "n", "sidi < scdi", "nearest is itself", "n")
    return TextTable(f"{TITLES.get(name, name)}: offsets between frames", heads, tuple(rows), note)


def axis_tables(results: Results) -> list[TextTable]:
    """All tables of an axis, data set by data set."""
    axis, made = results["axis"], []
    for name, data in results["datasets"].items():
        if axis == "video":
            made.append(_video(name, data))
        else:
            made += [_means(name, data, axis), _dunn(name, data, axis), _tests(name, data, axis)]
    return made
