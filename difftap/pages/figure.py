"""Figures of matplotlib in one style, as bytes that are the same for the same data. Needs matplotlib."""

from __future__ import annotations

import io
from typing import Any

from difftap.errors import require

__all__ = ["LINE_COLOURS", "figure_bytes", "new_figure", "plain_axes"]

LINE_COLOURS = ("#1f6f8b", "#d1495b", "#edae49", "#66a182", "#8d6a9f", "#5c5c5c", "#2e4057", "#b5651d")
"""Colours of several methods in one plot, told apart by people who see red and green alike."""


def new_figure(width: float, height: float) -> Any:
    """Make a figure of so many inches that is drawn without a window.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    require("matplotlib", "bench", "drawing plots").use("Agg")
    figure = require("matplotlib.figure", "bench", "drawing plots").Figure
    return figure(figsize=(width, height), layout="constrained")


def plain_axes(axes: Any, grid: str = "y") -> None:
    """Take away the frame above and to the right, and draw a faint grid behind the data."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, alpha=0.25)
    axes.set_axisbelow(True)


def figure_bytes(figure: Any, kind: str = "png", *, dpi: int = 130, salt: str = "") -> bytes:
    """Draw a figure as PNG or SVG, without date or program's name in it.

    Args:
        figure: of `new_figure`.
        kind: ``png`` or ``svg``.
        dpi: pixels an inch, of a PNG.
        salt: names the ids inside an SVG; several on one page need different ones.
    """
    metadata = {"Software": None} if kind == "png" else {"Date": None, "Creator": None}
    picture = io.BytesIO()
    with require("matplotlib", "bench", "drawing plots").rc_context({"svg.hashsalt": salt}):
        figure.savefig(picture, format=kind, dpi=dpi, metadata=metadata)
    return picture.getvalue()
