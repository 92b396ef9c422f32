"""Plots of results: PCK over alpha, per class, by flag, and how confidence relates to being right. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from difftap.artifacts.files import output_errors, write_atomic
from difftap.bench.protocols import alpha_key
from difftap.bench.published import SPAIR_CLASSES
from difftap.errors import InputError
from difftap.pages.figure import LINE_COLOURS, figure_bytes, new_figure, plain_axes

__all__ = ["clear_plots", "save_plots"]

Runs = Sequence[tuple[str, Mapping[str, Any]]]

_NAMES = ("pck-over-alpha", "pck-per-class", "pck-by-flag", "reliability")


def save_plots(runs: Runs, folder: Path, *, protocol: str | None = None, alpha: float | None = None) -> list[Path]:
    """Draw all plots that the results hold figures for, as PNG.

    Args:
        runs: per method, its name and its results.
        folder: where the pictures go; made if it is not there.
        protocol: whose figures; the first one's by default.
        alpha: the threshold of the cuts; 0.1, or the highest, by default.

    Returns:
        the files.

    Raises:
        MissingExtraError: matplotlib is not installed.
        InputError: a run lacks the protocol.
    """
    if not runs:
        raise InputError("no results to plot; give at least one")
    chosen = protocol or next(iter(runs[0][1]["protocols"]), "")
    if any(chosen not in results["protocols"] for _, results in runs):
        raise InputError(f"not all results hold protocol '{chosen}'; score them again with --protocol {chosen}")
    have = [key for key in runs[0][1]["protocols"][chosen]["pck"] if key not in ("pairs", "points")]
    key = alpha_key(alpha) if alpha is not None else ("0.1" if "0.1" in have else have[-1])
    if any(key not in results["protocols"][chosen]["pck"] for _, results in runs):
        raise InputError(f"not all results hold alpha {key}; score them again with --alpha {key}")
    with output_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    ways: tuple[Callable[[Any, Runs, str, str], bool], ...] = (_curve, _classes, _flags, _reliability)
    clear_plots(folder)
    files = []
    for name, draw in zip(_NAMES, ways, strict=True):
        figure = new_figure(8, 4.5)
        if draw(figure, runs, chosen, key):
            path = folder / f"{name}.png"
            write_atomic(path, figure_bytes(figure))
            files.append(path)
    return files


def clear_plots(folder: Path) -> None:
    """Remove the plots that an earlier run drew."""
    for name in _NAMES:
        with output_errors(folder):
            (folder / f"{name}.png").unlink(missing_ok=True)


def _axes(figure: Any, runs: Runs, protocol: str, title: str) -> Any:
    """Axes with every condition in the title."""
    data, at = runs[0][1]["conditions"]["dataset"], runs[0][1]["protocols"][protocol]["conditions"]
    counts = runs[0][1]["counts"]
    axes = figure.add_subplot()
    where = f"{data['name']} {data.get('split', '')}, {counts['pairs_scored']} pairs, {counts['points']} points"
    axes.set_title(f"{title}\n{where}; {protocol}: {at['comparison']} alpha x {at['basis']}", fontsize=10)
    plain_axes(axes)
    return axes


def _colour(index: int) -> str:
    return LINE_COLOURS[index % len(LINE_COLOURS)]


def _curve(figure: Any, runs: Runs, protocol: str, _key: str) -> bool:
    axes = _axes(figure, runs, protocol, "PCK over alpha")
    for k, (name, results) in enumerate(runs):
        curve = results["protocols"][protocol]["curve"]
        for by, style in (("image", "-"), ("point", "--")):
            values = [None if value is None else 100 * value for value in curve[by]]
            if any(value is not None for value in values):
                axes.plot(curve["alphas"], values, style, color=_colour(k), label=f"{name}, per {by}")
    axes.set(xlabel="alpha", ylabel="PCK, %", xlim=(0, None), ylim=(0, 100))
    axes.legend(fontsize=8, frameon=False)
    return True


def _bars(axes: Any, groups: Sequence[str], rows: Sequence[tuple[str, Sequence[Mapping[str, Any] | None]]]) -> None:
    """Bars with intervals: a group for each head, a bar for each method."""
    width = 0.8 / max(1, len(rows))
    for k, (name, figures) in enumerate(rows):
        places = [g + (k - (len(rows) - 1) / 2) * width for g in range(len(groups))]
        known = [(x, f) for x, f in zip(places, figures, strict=True) if f is not None and f["value"] is not None]
        heights = [100 * f["value"] for _, f in known]
        spans: list[list[float]] = [
            [max(0.0, h - 100 * f["low"]) for h, (_, f) in zip(heights, known, strict=True)],
            [max(0.0, 100 * f["high"] - h) for h, (_, f) in zip(heights, known, strict=True)],
        ]
        xs = [x for x, _ in known]
        axes.bar(xs, heights, width, yerr=spans, color=_colour(k), ecolor="#444444", capsize=2, label=name)
    axes.set_xticks(range(len(groups)), groups, rotation=35 if len(groups) > 8 else 0, fontsize=8)
    axes.set(ylabel="PCK, %", ylim=(0, 100))
    axes.legend(fontsize=8, frameon=False)


def _classes(figure: Any, runs: Runs, protocol: str, key: str) -> bool:
    present = {name for _, results in runs for name in results["protocols"][protocol]["by_class"]}
    classes: list[str] = [name for name in SPAIR_CLASSES if name in present] + sorted(present - set(SPAIR_CLASSES))
    rows = []
    for name, results in runs:
        cuts = results["protocols"][protocol]["by_class"]
        rows.append((name, [cuts[one][key]["image"] if one in cuts else None for one in classes]))
    axes = _axes(figure, runs, protocol, f"PCK@{key} per image, by class, with intervals")
    _bars(axes, [SPAIR_CLASSES.get(one, one) for one in classes], rows)
    return bool(classes)


def _flags(figure: Any, runs: Runs, protocol: str, key: str) -> bool:
    cuts = [results["protocols"][protocol]["by_flag"] for _, results in runs]
    heads = [(flag, value) for flag, values in cuts[0].items() for value in values]
    if not heads:
        return False
    rows = []
    for (name, _), cut in zip(runs, cuts, strict=True):
        rows.append((name, [cut[f][v][key]["image"] if v in cut.get(f, {}) else None for f, v in heads]))
    axes = _axes(figure, runs, protocol, f"PCK@{key} per image, by difficulty, with intervals")
    numbers = [f"{f.replace('_variation', '')} {v}\n{cuts[0][f][v]['pairs']} pairs" for f, v in heads]
    _bars(axes, numbers, rows)
    axes.tick_params(axis="x", labelsize=6)
    return True


def _places(counts: Sequence[int]) -> list[float]:
    """Where each bin's middle lies among all matches, 0 to 1: bins hold different numbers where matches tie."""
    return [(sum(counts[:k]) + count / 2) / sum(counts) for k, count in enumerate(counts)]


def _reliability(figure: Any, runs: Runs, protocol: str, key: str) -> bool:
    axes = _axes(figure, runs, protocol, f"how often a match is right at alpha {key}, by how sure it is")
    some = False
    for k, (name, results) in enumerate(runs):
        for kind, style in (("score", "-"), ("margin", "--"), ("cycle_error", ":")):
            one = results["protocols"][protocol]["calibration"].get(key, {}).get(kind)
            if one:
                steps = one["reliability"]
                places = _places([step["count"] for step in steps])
                shown = [100 * step["right"] for step in steps]
                area = "-" if one["auc"] is None else f"{one['auc']:.2f}"
                axes.plot(places, shown, style, marker="o", ms=3, color=_colour(k), label=f"{name}, {kind}: AUC {area}")
                some = True
    axes.set(xlabel="matches from least to most sure, share", ylabel="right, %", xlim=(0, 1), ylim=(0, 100))
    if some:
        axes.legend(fontsize=8, frameon=False)
    return some
