"""Write and print the study's results: tables and figures of each axis, and one HTML page of everything in a folder."""

from __future__ import annotations

import contextlib
import dataclasses
import html
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from difftap.artifacts.files import JsonObject, only_writer, output_errors, write_atomic
from difftap.artifacts.table import Table, json_text
from difftap.errors import InputError
from difftap.pages.page import html_page, html_picture
from difftap.prototypes import SceneSource
from difftap.study.axes import AXES
from difftap.study.figures import NAMES, TITLES, UNITS, draw_axis, draw_frames
from difftap.study.study import VIDEO, Study, base_case, tables
from difftap.study.video import clips

__all__ = ["axis_tables", "finish_axis", "load_axes", "study_folder", "trend_lines", "write_report"]


def number(value: float | None, digits: int = 4) -> str:
    """Format a figure for print; ``-`` for None."""
    return "-" if value is None else f"{value:.{digits}g}"


def conditions_line(data: JsonObject) -> str:
    """Write the conditions of a data set's figures on one line."""
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


def _verdict(case: JsonObject) -> str:
    trend = case["trend"]
    if trend["holds"] is None:
        return "not known"
    share = trend["share_of_draws"]
    return ("holds" if trend["holds"] else "does not hold") + ("" if share is None else f" ({100 * share:.0f} %)")


def trend_lines(results: JsonObject) -> list[str]:
    """Write, for each data set and case, one line that tells whether the paper's order of means holds."""
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


def _means(name: str, data: JsonObject, axis: str) -> Table:
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
    return Table.of((head, *sets, "trend"), rows, f"{TITLES.get(name, name)}: distances by set", note)


def _dunn(name: str, data: JsonObject, axis: str) -> Table:
    """Tabulate Dunn's index of every pair of sets; for the axis ``distances`` beside the paper's values."""
    pairs = list(dict.fromkeys(pair for case in data["cases"] for pair in case["pairs"]))
    rows: list[tuple[str, ...]] = []
    published = set()
    for case in data["cases"]:
        label = case["metric"] if axis == "distances" else case["label"]
        for form in ("dunn_minmax", "dunn_mean"):
            cells = [number(case["pairs"].get(pair, {}).get(form)) for pair in pairs]
            rows.append((f"{label}, {form}", *cells))
        paper = case.get("published_dunn") or {}
        if paper:
            published.add(len(rows))
            rows.append((f"{label}, published", *(f"{paper[p]:.5f}" if p in paper else "-" for p in pairs)))
    note = (
        "dunn_minmax: least distance between members of two sets over the largest within one. dunn_mean: distance of "
        "the two means over the larger mean distance within a set. Larger is better."
    )
    if any(case.get("published_dunn") for case in data["cases"]):
        note += " Published rows are the paper's Table 1 (its images and model; which form is not said), not ours."
    table = Table.of(("", *pairs), rows, f"{TITLES.get(name, name)}: Dunn index by pair of sets", note)
    return dataclasses.replace(table, quoted=frozenset(published))


def _tests(name: str, data: JsonObject, axis: str) -> Table:
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
    return Table.of(heads, rows, f"{TITLES.get(name, name)}: tests", note)


def _p(value: float | None) -> str:
    if value is None:
        return "-"
    return "< 1e-300" if value == 0 else f"{value:.2g}"  # 0 is an underflow: no p-value is 0


def _video(name: str, data: JsonObject) -> Table:
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
    return Table.of(heads, rows, f"{TITLES.get(name, name)}: offsets between frames", note)


def axis_tables(results: JsonObject) -> list[Table]:
    """Make all tables of an axis, data set by data set."""
    axis, made = results["axis"], []
    for name, data in results["datasets"].items():
        if axis == "video":
            made.append(_video(name, data))
        else:
            made += [_means(name, data, axis), _dunn(name, data, axis), _tests(name, data, axis)]
    return made


_HEADINGS = {
    "distances": "Distance measures",
    "layers": "Layers and grids",
    "steps": "Inference steps",
    "transforms": "Transforms",
    "video": "Video",
}


def load_axes(folder: Path) -> dict[str, JsonObject]:
    """Read the results of every axis that a study's folder holds.

    Raises:
        InputError: a file cannot be read, or holds other data.
    """
    found = {}
    for axis in AXES:
        path = folder / f"{axis}.json"
        if not path.is_file():
            continue
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if data["axis"] != axis or not data["datasets"]:
                raise ValueError("it belongs to another axis")
            found[axis] = data
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"'{path}' is no result of the study ({error}); run its axis again") from error
    return found


def _report(axes: Mapping[str, JsonObject], figures: Mapping[str, Sequence[tuple[str, Path]]]) -> str:
    """Build the report as one HTML document.

    Args:
        axes: the results of each axis.
        figures: title and file of each axis' figures.
    """
    recipe = next(iter(axes.values()))["settings"]["recipe"]
    taps = "+".join(recipe["branches"][0]["taps"])
    about = (
        f"{recipe['model']}, {taps} at t = {recipe['branches'][0]['timestep']}, {recipe['size'][0]} x "
        f"{recipe['size'][1]} pixels"
    )
    parts = [
        f"<h1>Semantic study</h1><p>{html.escape(about)}</p>",
        "<p>Distances between object prototypes, each the mean of a feature map over an object's mask. A box spans the "
        "quartiles with the median as a line and the mean as a white dot; whiskers reach the last value within 1.5 "
        "interquartile ranges; values beyond are not drawn.</p><dl>",
        *(f"<dt>{key}</dt><dd>{html.escape(text)}</dd>" for key, text in NAMES.items()),
        "</dl><h2>Does the paper's trend hold?</h2>",
        '<p class="note">In brackets, the share of bootstrap draws over images in which the whole order holds.</p>',
    ]
    for axis, results in axes.items():
        lines = "".join(f"<li>{html.escape(line)}</li>" for line in trend_lines(results))
        parts.append(f"<h3>{_HEADINGS[axis]}</h3><ul>{lines}</ul>")
    for axis, results in axes.items():
        parts.append(f"<h2>{_HEADINGS[axis]}</h2>")
        parts += [html_picture(title, path) for title, path in figures.get(axis, ())]
        parts += [table.html() for table in axis_tables(results)]
        if results.get("published"):
            parts.append(f'<p class="note">Published values: {html.escape(results["published"])}.</p>')
    return html_page(f"Semantic study: {about}", parts)


@contextlib.contextmanager
def study_folder(path: Path) -> Iterator[Path]:
    """Make a study's folder if it does not exist, and lock it for this process.

    Raises:
        OutputError: it cannot be made, or another run is writing it.
    """
    with output_errors(path):
        path.mkdir(parents=True, exist_ok=True)
    with only_writer(path, path / ".study.lock"):
        yield path


def finish_axis(study: Study, results: JsonObject, sources: Mapping[str, SceneSource]) -> list[str]:
    """Write the results, tables and figures of an axis.

    Returns:
        lines for a terminal.

    Raises:
        MissingExtraError: matplotlib is not installed.
        OutputError: a file cannot be written.
    """
    axis = results["axis"]
    made = axis_tables(results)
    figures = draw_axis(results, study.folder / "figures")
    if axis == "video":
        # Frames are drawn from images and masks, which the results do not hold.
        [table] = tables(study, sources[VIDEO], [base_case(study)], VIDEO)
        found = clips(table, study.metric, study.device)
        drawn = draw_frames(sources[VIDEO], found, study.offsets, study.metric, study.folder / "figures")
        figures += [drawn] if drawn else []
    listed = [[title, path.name] for title, path in figures]
    trends = trend_lines(results)
    lines = "\n".join(f"- {line}" for line in trends)
    write_atomic(study.folder / f"{axis}.md", f"## {axis}\n\n{lines}\n\n" + "\n".join(one.markdown() for one in made))
    # The JSON last: `load_axes` reads it, so an axis counts only when its other files are there.
    write_atomic(study.folder / f"{axis}.json", json_text({**results, "figures": listed}))
    shown = [one for one in made if not one.title.endswith(": tests")]  # tests have many rows; the files have them
    return [*trends, "", *(line for one in shown for line in (*one.text(), ""))]


def write_report(folder: Path) -> Path:
    """Write ``report.html`` from everything that a study's folder holds; return its path."""
    axes = load_axes(folder)
    figures = {
        axis: [(title, folder / "figures" / name) for title, name in axes[axis].get("figures", ())]
        for axis in AXES
        if axis in axes
    }
    there = {axis: [one for one in listed if one[1].is_file()] for axis, listed in figures.items()}
    path = folder / "report.html"
    write_atomic(path, _report(axes, there))
    return path
