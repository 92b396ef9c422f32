"""The curve of `difftap.bench.ensembles` as a table, as JSON and as a picture."""

from __future__ import annotations

import io
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from difftap.artifacts.files import output_errors, write_atomic
from difftap.bench.ensembles import KINDS, Curve
from difftap.errors import require

__all__ = ["SCHEMA", "format_curve", "save_curve", "to_json"]

SCHEMA = "difftap.bench.ensembles/1"


def format_curve(curve: Curve) -> list[str]:
    """Lines for a terminal."""
    case = curve.case
    lines = [
        f"{curve.conditions['model']['name']}, {case.recipe.size[0]} x {case.recipe.size[1]}, "
        f"{'+'.join(curve.conditions['taps'])}, {len(curve.images)} images; against the mean of {case.limit} members",
        f"{'timestep':>8}  {'noise':28}{'passes':>7}{'relative':>11}{'spread':>10}{'cosine':>11}{'worth':>8}",
    ]
    for point in curve.points:
        equals = "" if point.equals is None else f"{point.equals:.1f}"
        lines.append(
            f"{point.timestep:>8}  {point.kind:28}{point.passes:>7}{point.relative:>11.2e}{point.spread:>10.1e}"
            f"{point.cosine:>11.7f}{equals:>8}"
        )
    lines.append("relative: L2 error over L2 norm; spread: over images; worth: independent passes that come as close")
    return lines


def save_curve(curve: Curve, folder: Path) -> list[Path]:
    """Write ``ensembles.json``, ``ensembles.txt`` and ``ensembles.png``.

    Raises:
        OutputError: the folder cannot be written.
        MissingExtraError: matplotlib is not installed.
    """
    picture = _draw(curve)
    with output_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"ensembles.{kind}" for kind in ("json", "txt", "png")]
    write_atomic(files[0], json.dumps(to_json(curve), indent=1) + "\n")
    write_atomic(files[1], "\n".join(format_curve(curve)) + "\n")
    write_atomic(files[2], picture)
    return files


def to_json(curve: Curve) -> dict[str, Any]:
    """The curve as plain data, with the schema's name and version first."""
    case = {**asdict(curve.case), "recipe": curve.case.recipe.to_dict()}
    points = [
        {**asdict(p), "equals": p.equals if p.equals is None or math.isfinite(p.equals) else None} for p in curve.points
    ]
    return {
        "schema": SCHEMA,
        "case": case,
        "conditions": dict(curve.conditions),
        "images": list(curve.images),
        "points": points,
    }


def _draw(curve: Curve) -> bytes:
    require("matplotlib", "bench", "drawing plots").use("Agg")
    steps = curve.case.timesteps
    figure = require("matplotlib.figure", "bench", "drawing plots").Figure(
        figsize=(2.6 * len(steps) + 1.2, 3.6), layout="constrained"
    )
    styles = {KINDS[0]: ("#5c5c5c", "o-"), KINDS[1]: ("#d1495b", "s-"), KINDS[2]: ("#1f6f8b", "^--")}
    first = None
    for place, timestep in enumerate(steps):
        axes = figure.add_subplot(1, len(steps), place + 1, sharey=first)
        first = first or axes
        for kind, (colour, style) in styles.items():
            points = curve.at(timestep, kind)
            axes.loglog(
                [p.passes for p in points],
                [max(p.relative, 1e-12) for p in points],
                style,
                color=colour,
                ms=4,
                label=kind if place == 0 else None,
            )
        axes.set_title(f"t = {timestep}", fontsize=9)
        axes.set_xticks(curve.case.passes, [str(n) for n in curve.case.passes], fontsize=8)
        axes.minorticks_off()
        axes.set_xlabel("passes", fontsize=8)
        axes.tick_params(axis="y", labelsize=7)
        axes.grid(alpha=0.25, which="both")
        axes.spines[["top", "right"]].set_visible(False)
        if place == 0:
            axes.set_ylabel(f"relative error to {curve.case.limit} members", fontsize=8)
    figure.suptitle(
        f"{curve.conditions['model']['name']}, {'+'.join(curve.conditions['taps'])}, {len(curve.images)} images",
        fontsize=10,
    )
    figure.legend(fontsize=8, frameon=False, loc="outside lower center", ncols=3)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=130, metadata={"Software": None})
    return picture.getvalue()
