"""What the study writes: results, tables and figures of each axis, and the report of all that a folder holds."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from difftap.artifacts.files import only_writer, output_errors, write_atomic
from difftap.prototypes import Source
from difftap.study.axes import AXES
from difftap.study.figures import draw_axis
from difftap.study.frames import draw_frames
from difftap.study.html import load_axes, report
from difftap.study.study import VIDEO, Study, base_case, tables
from difftap.study.summary import axis_tables, trend_lines
from difftap.study.video import clips

__all__ = ["finish_axis", "study_folder", "write_report"]


@contextlib.contextmanager
def study_folder(path: Path) -> Iterator[Path]:
    """A study's folder, made if need be, held for this process alone.

    Raises:
        OutputError: it cannot be made, or another run is writing it.
    """
    with output_errors(path):
        path.mkdir(parents=True, exist_ok=True)
    with only_writer(path, path / ".study.lock"):
        yield path


def finish_axis(study: Study, results: Mapping[str, Any], sources: Mapping[str, Source]) -> list[str]:
    """Write an axis' results, tables and figures.

    Returns:
        lines for a terminal.
    """
    axis = results["axis"]
    made = axis_tables(results)
    figures = draw_axis(results, study.folder / "figures")
    if axis == "video":
        # The frames need images and masks again, which no result holds.
        [table] = tables(study, sources[VIDEO], [base_case(study)], VIDEO)
        found = clips(table, study.metric, study.device)
        drawn = draw_frames(sources[VIDEO], found, study.offsets, study.metric, study.folder / "figures")
        figures += [drawn] if drawn else []
    listed = [[title, path.name] for title, path in figures]
    text = json.dumps({**results, "figures": listed}, indent=1, ensure_ascii=False, allow_nan=False)
    trends = trend_lines(results)
    lines = "\n".join(f"- {line}" for line in trends)
    write_atomic(study.folder / f"{axis}.md", f"## {axis}\n\n{lines}\n\n" + "\n".join(one.markdown() for one in made))
    write_atomic(study.folder / f"{axis}.json", text + "\n")
    shown = [one for one in made if not one.title.endswith(": tests")]
    return [*trends, "", *(line for one in shown for line in (*one.text(), ""))]


def write_report(folder: Path) -> Path:
    """Gather everything a study's folder holds into ``report.html``."""
    axes = load_axes(folder)
    figures = {
        axis: [(title, folder / "figures" / name) for title, name in axes[axis].get("figures", ())]
        for axis in AXES
        if axis in axes
    }
    there = {axis: [one for one in listed if one[1].is_file()] for axis, listed in figures.items()}
    path = folder / "report.html"
    write_atomic(path, report(axes, there))
    return path
