"""What `difftap.bench.gpucheck` found, as a table and as JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from difftap.bench.gpucheck import SCHEMA, Cell, CellResult, GpuCheck

__all__ = ["format_gpu_check", "to_json"]

_YARDSTICKS = ("torch:fp16", "ort:fp16", "ort:fp32")
"""What the fastest is compared with, where it was measured."""


def to_json(result: GpuCheck) -> dict[str, Any]:
    """The result as plain data, with the schema's name and version first; docs/gpu.md describes it."""
    return {
        "schema": SCHEMA,
        "conditions": dict(result.conditions),
        "limit": result.case.limit,
        "absent": dict(result.absent),
        "cells": [
            {
                "backend": cell.contender.name,
                "precision": cell.contender.precision,
                "device": cell.contender.device,
                "size": list(cell.size),
                "batch": cell.batch,
                **asdict(one),
                "sound": one.sound,
            }
            for cell, one in result.cells
        ],
    }


def format_gpu_check(result: GpuCheck) -> list[str]:
    """Lines for a terminal."""
    case, at = result.case, result.conditions
    recipe = case.recipe
    branches = " with ".join(f"{'+'.join(b.taps)} at t={b.timestep}" for b in recipe.branches)
    lines = [
        f"{recipe.model}, {branches}, ensemble {recipe.ensemble}; {at['gpu'] or 'no NVIDIA GPU'}; "
        f"{at['cpu']}, {at['threads']} threads; difftap {at['difftap']}"
    ]
    for size in case.sizes:
        lines += _table(result, size)
    lines += [f"not run: {name}: {reason}" for name, reason in result.absent.items()]
    lines.append(f"reference: {case.reference.label}; parity is that of the first picture's features")
    lines.append(f"timed: {at['inside']}")
    return lines


def _table(result: GpuCheck, size: tuple[int, int]) -> list[str]:
    rows = [(cell, one) for cell, one in result.cells if cell.size == size]
    head = (
        f"{f'{size[0]} x {size[1]}':22}{'batch':>6}{'images/s':>10}{'ms/image':>10}{'low':>9}{'high':>9}{'VAE':>8}"
        f"{'UNet':>9}{'GPU MB':>8}{'build s':>9}{'open s':>8}{'relative':>10}{'cosine':>10}  parity"
    )
    return ["", head, *(_line(cell, one) for cell, one in rows), *_summary(rows)]


def _line(cell: Cell, one: CellResult) -> str:
    start = f"{cell.contender.label:22}{cell.batch:>6}"
    if one.failed is not None or one.timing is None or one.rate is None:
        return f"{start}  not run: {one.failed}"
    worst = max((two["relative"] for two in one.fidelity.values()), default=None)
    cosine = min((two["cosine_mean"] for two in one.fidelity.values()), default=None)
    times = [*(one.timing[name] for name in ("median", "low", "high")), *(one.stages.get(n) for n in ("vae", "unet"))]
    widths = zip(times, (10, 9, 9, 8, 9), strict=True)
    ms = "".join(f"{'-' if t is None else f'{1e3 * t:.1f}':>{width}}" for t, width in widths)
    held = "-" if one.device_peak is None else f"{one.device_peak / 1e6:.0f}"
    built = "-" if one.build_seconds is None else f"{one.build_seconds:.0f}"
    parity = {None: "the reference" if not one.fidelity else "", True: "good", False: "LOW"}[one.sound]
    return (
        f"{start}{one.rate:>10.3g}{ms}{held:>8}{built:>9}{one.open_seconds or 0:>8.1f}"
        f"{'-' if worst is None else f'{worst:.1e}':>10}{'-' if cosine is None else f'{cosine:.6f}':>10}  {parity}"
    ).rstrip()


def _summary(rows: list[tuple[Cell, CellResult]]) -> list[str]:
    """The fastest cell whose features are right, and how it stands to the yardsticks' own best."""
    timed = [(cell, one.rate) for cell, one in rows if one.rate is not None and one.sound is not False]
    if not timed:
        return ["fastest: nothing was measured"]
    best, rate = max(timed, key=lambda pair: pair[1])
    against = []
    for label in _YARDSTICKS:
        theirs = [other for cell, other in timed if cell.contender.label == label]
        if theirs and label != best.contender.label:
            against.append(f"{rate / max(theirs):.2f} x {label}")
    ratios = f" = {', '.join(against)} at their best batches" if against else ""
    return [f"fastest: {rate:.3g} images/s, {best.contender.label} at batch {best.batch}{ratios}"]
