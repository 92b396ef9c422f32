"""One HTML file with the whole study: tables, figures and conditions, nothing loaded from elsewhere."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from difftap.errors import InputError
from difftap.study.axes import AXES
from difftap.study.figures import NAMES
from difftap.study.summary import TextTable, axis_tables, trend_lines

__all__ = ["load_axes", "report"]

_HEADINGS = {
    "distances": "Distance measures",
    "layers": "Layers and grids",
    "steps": "Inference steps",
    "transforms": "Transforms",
    "video": "Video",
}
_MIME = {".svg": "image/svg+xml", ".png": "image/png"}
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; max-width: 68rem; margin: 2rem auto; padding: 0 1.2rem }
h1 { font-size: 1.6rem }
h2 { margin-top: 2.6rem; border-bottom: 1px solid #ccc }
h3 { margin: 1.6rem 0 .4rem; font-size: 1rem }
table { border-collapse: collapse; font-size: .82rem; font-variant-numeric: tabular-nums }
th, td { padding: .22rem .6rem; text-align: right; border-bottom: 1px solid #e4e4e4; white-space: nowrap }
th:first-child, td:first-child { text-align: left }
thead th { border-bottom: 2px solid #888 }
tr.published td { color: #666; font-style: italic }
.wide { overflow-x: auto }
.note, figcaption { color: #555; font-size: .82rem; max-width: 60rem }
figure { margin: 1.2rem 0 }
img { max-width: 100% }
dt { font-weight: 600; float: left; width: 4rem }
dd { margin-left: 4rem }
@media print {
  body { max-width: none; margin: 0; font-size: 11px }
  figure, tr { break-inside: avoid }
  .wide { overflow: visible }
  table { font-size: 8px }
}
""".strip()


def load_axes(folder: Path) -> dict[str, dict[str, Any]]:
    """The results of every axis that a study's folder holds.

    Raises:
        InputError: a file is there that cannot be read.
    """
    found = {}
    for axis in AXES:
        path = folder / f"{axis}.json"
        if not path.is_file():
            continue
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if data["axis"] != axis or not data["datasets"]:
                raise ValueError("it is another axis'")
            found[axis] = data
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"'{path}' is no result of the study ({error}); run its axis again") from error
    return found


def _table(table: TextTable) -> str:
    heads = "".join(f"<th>{html.escape(head)}</th>" for head in table.heads)
    rows = []
    for row in table.rows:
        kind = ' class="published"' if row[0].endswith(", published") else ""
        rows.append(f"<tr{kind}>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>")
    note = f'<p class="note">{html.escape(table.note)}</p>' if table.note else ""
    body = f"<table><thead><tr>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return f'<h3>{html.escape(table.title)}</h3><div class="wide">{body}</div>{note}'


def _picture(title: str, path: Path) -> str:
    content = base64.b64encode(path.read_bytes()).decode()
    source = f"data:{_MIME[path.suffix]};base64,{content}"
    text = html.escape(title)
    return f'<figure><img alt="{text}" src="{source}"><figcaption>{text}</figcaption></figure>'


def report(axes: Mapping[str, Mapping[str, Any]], figures: Mapping[str, Sequence[tuple[str, Path]]]) -> str:
    """The report as one HTML document.

    Args:
        axes: results by axis.
        figures: by axis, each figure's title and file.
    """
    recipe = next(iter(axes.values()))["settings"]["recipe"]
    taps = "+".join(recipe["branches"][0]["taps"])
    about = (
        f"{recipe['model']}, {taps} at t = {recipe['branches'][0]['timestep']}, {recipe['size'][0]} x "
        f"{recipe['size'][1]} pixels"
    )
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">',
        f"<title>Semantic study: {html.escape(about)}</title><style>{_STYLE}</style></head><body>",
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
        parts += [_picture(title, path) for title, path in figures.get(axis, ())]
        parts += [_table(table) for table in axis_tables(results)]
        if results.get("published"):
            parts.append(f'<p class="note">Published values: {html.escape(results["published"])}.</p>')
    return "\n".join([*parts, "</body></html>", ""])
