"""What `difftap.bench.throughput` measured, as a table, as JSON and as a picture."""

from __future__ import annotations

import io
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from difftap.artifacts.files import output_errors, write_atomic
from difftap.bench.throughput import OWN_STAGES, Row, Throughput
from difftap.errors import require

__all__ = ["SCHEMA", "format_throughput", "save_throughput", "to_json"]

SCHEMA = "difftap.bench.throughput/1"
_COLOURS = {"vae": "#1f6f8b", "unet": "#d1495b", "own": "#edae49"}


def to_json(result: Throughput) -> dict[str, Any]:
    """The result as plain data, with the schema's name and version first; docs/throughput.md describes it."""
    case = asdict(result.case)
    case["recipe"] = result.case.recipe.to_dict()
    case["cache"] = str(result.case.cache) if result.case.cache else None
    case["images"] = [str(path) for path in result.case.images]
    return {
        "schema": SCHEMA,
        "case": case,
        "conditions": dict(result.conditions),
        "macs": dict(result.macs),
        "gemm": dict(result.gemm),
        "reference": result.reference,
        "rows": [_plain(row) for row in result.rows],
    }


def _plain(row: Row) -> dict[str, Any]:
    data = asdict(row)
    label = {"label": row.contender.label, "rival": row.contender.rival}
    return {**label, **data, "fidelity": {name: one.to_dict() for name, one in row.fidelity.items()}}


def format_throughput(result: Throughput) -> list[str]:
    """Lines for a terminal."""
    case, at = result.case, result.conditions
    recipe = case.recipe
    branches = " with ".join(f"{'+'.join(b.taps)} at t={b.timestep}" for b in recipe.branches)
    head = (
        f"{at['model']['name']}, {recipe.size[0]} x {recipe.size[1]}, {branches}, ensemble {recipe.ensemble} "
        f"({recipe.noise}), batch {case.batch}, {at['threads']} threads"
    )
    columns = (
        f"{'way':20}{'images/s':>10}{'ratio':>8}{'ms/image':>10}{'low':>9}{'high':>9}{'decode':>8}{'VAE':>9}{'UNet':>9}"
        f"{'match':>8}{'own %':>7}{'peak MB':>9}{'GFLOP/s':>9}{'of GEMM':>8}{'relative':>10}{'cosine':>10}"
    )
    lines = [head, columns, *(_line(row) for row in result.rows)]
    lines += [f"  {row.contender.label}: {note}" for row in result.rows for note in row.about.get("notes", ())]
    own = [row for row in result.rows if row.own_share is not None]
    for row in own:
        parts = ", ".join(f"{kind} {1e3 * row.stages.get(kind, 0.0):.1f}" for kind in OWN_STAGES)
        lines.append(
            f"  {row.contender.label}: {100 * (row.own_share or 0):.2f} % around the engine calls; ms: {parts}"
        )
    if result.reference:
        lines.append(f"relative error and mean cosine: first image's features against {result.reference}")
    products = ", ".join(f"{kind} {rate / 1e9:.0f}" for kind, rate in result.gemm.items())
    lines.append(f"matrix products in this run, GFLOP/s: {products}")
    if result.macs["vae"] is not None and result.macs["unet"] is not None:
        lines.append(f"GMAC: VAE {result.macs['vae'] / 1e9:.1f}, UNet {result.macs['unet'] / 1e9:.1f} a member")
    else:
        lines.append(f"arithmetic not counted: {at.get('uncounted')}")
    kept = "processes kept alive between rounds" if at["resident"] else "a fresh process each turn"
    graphics = f"; {at['gpu']}" if at.get("gpu") else ""
    lines += [
        f"{at['cpu']}, {at['cores']} cores{graphics}; load {at['load_before']:.1f} to {at['load_after']:.1f}; "
        f"{at['rounds']} rounds, interleaved, {kept}",
        f"warm-up: {at['warm_up']}; timed: {at['inside']}",
    ]
    return lines


def _line(row: Row) -> str:
    if row.failed is not None or row.timing is None or row.rate is None:
        return f"{row.contender.label:20}  not measured: {row.failed}"

    def milli(seconds: float | None, width: int) -> str:
        if seconds is None:
            return f"{'-':>{width}}"
        return f"{1e3 * seconds:>{width}.{1 if seconds < 10 else 0}f}"

    worst = max((one.relative for one in row.fidelity.values()), default=None)
    cosine = min((one.cosine_mean for one in row.fidelity.values()), default=None)
    speed = "-" if row.flop_rate is None else f"{row.flop_rate / 1e9:.0f}"
    share = "-" if row.gemm_share is None else f"{100 * row.gemm_share:.0f} %"
    memory = (row.peak or 0) / 1e6
    cells = [
        f"{row.contender.label:20}{row.rate:>10.3g}",
        f"{'-' if row.ratio is None else f'{row.ratio:.2f}x':>8}",
        milli(row.timing.median, 10) + milli(row.timing.low, 9) + milli(row.timing.high, 9),
        milli(row.stages.get("decode"), 8) + milli(row.stages.get("vae"), 9) + milli(row.stages.get("unet"), 9),
        milli(row.matching, 8),
        f"{'-' if row.own_share is None else f'{100 * row.own_share:.2f}':>7}{memory:>9.0f}{speed:>9}{share:>8}",
        f"{'-' if worst is None else f'{worst:.1e}':>10}{'-' if cosine is None else f'{cosine:.6f}':>10}",
    ]
    gpu = "" if row.device_peak is None else f"  {row.device_peak / 1e6:.0f} MB on the GPU"
    return "".join(cells) + gpu


def save_throughput(result: Throughput, folder: Path) -> list[Path]:
    """Write ``throughput.json``, ``throughput.txt`` and, where matplotlib is installed, ``throughput.png``.

    Raises:
        OutputError: the folder cannot be written.
    """
    with output_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    files = [folder / "throughput.json", folder / "throughput.txt", folder / "throughput.png"]
    write_atomic(files[0], json.dumps(to_json(result), indent=1, allow_nan=False) + "\n")
    write_atomic(files[1], "\n".join(format_throughput(result)) + "\n")
    write_atomic(files[2], draw_throughput(result))
    return files


def draw_throughput(result: Throughput) -> bytes:
    """A PNG: time an image by stage, one bar a contender, with its images a second and its ratio.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    require("matplotlib", "bench", "drawing plots").use("Agg")
    rows = [row for row in reversed(result.rows) if row.timing is not None and row.rate is not None]
    figure = require("matplotlib.figure", "bench", "drawing plots").Figure(
        figsize=(9, 1.9 + 0.42 * max(1, len(rows))), layout="constrained"
    )
    axes = figure.add_subplot()
    recipe, at = result.case.recipe, result.conditions
    axes.set_title(
        f"{at['model']['name']}, {recipe.size[0]} x {recipe.size[1]} px, ensemble {recipe.ensemble}, batch "
        f"{result.case.batch}\n{at.get('gpu') or at['cpu']}, {at['threads']} threads",
        fontsize=10,
    )
    left = [0.0] * len(rows)
    for stage in ("vae", "unet", "own"):
        widths = [_width(row, stage) for row in rows]
        names = {"vae": "VAE", "unet": "UNet", "own": "decoding, noise, copies, checks, joining"}
        axes.barh(range(len(rows)), widths, left=left, color=_COLOURS[stage], label=names[stage])
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for place, row in enumerate(rows):
        ratio = "" if row.ratio is None else f", {row.ratio:.2f} x"
        high = row.timing.high if row.timing else 0.0
        left[place] = max(left[place], high)
        axes.text(left[place], place, f"  {row.rate:.3g} images/s{ratio}", va="center", fontsize=8)
        if row.timing is not None:
            axes.plot([row.timing.low, high], [place, place], color="#333333", lw=1)
    axes.set_yticks(range(len(rows)), [row.contender.label for row in rows], fontsize=8)
    axes.set(xlabel="seconds an image: median by stage; line: fastest to slowest", xlim=(0, 1.28 * max(left or [1.0])))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", alpha=0.25)
    if rows:
        figure.legend(fontsize=8, frameon=False, loc="outside lower center", ncols=3)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=130, metadata={"Software": None})
    return picture.getvalue()


def _width(row: Row, stage: str) -> float:
    """A bar's part: medians of stages, and for the rest what brings the bar to the median of whole calls."""
    engines = row.stages["vae"] + row.stages["unet"]
    if stage != "own":
        return row.stages[stage]
    return max(0.0, (row.timing.median if row.timing else engines) - engines)
