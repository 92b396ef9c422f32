"""Pictures of matches: both images side by side, a line per correspondence, and one point's heat map."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PIL
from PIL import ImageDraw, ImageFont

from difftap.artifacts.files import atomic_path
from difftap.errors import OutputError
from difftap.images import Image
from difftap.matching import Matches

__all__ = ["CAPTION_HEIGHT", "check_output", "draw_matches", "place_on_target", "save_picture"]

_HEIGHT = 480  # pixels of each panel
_GAP = 12
CAPTION_HEIGHT = 26  # pixels above the panels, for a line of text
_STOPS = np.array(
    [[20, 11, 52], [114, 31, 129], [205, 64, 113], [254, 159, 109], [252, 253, 191]], np.float64
)  # dark to light
_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}


def _colour(index: int) -> tuple[int, int, int]:
    """Well-separated hues: steps of the golden ratio around the colour circle."""
    r, g, b = colorsys.hsv_to_rgb((0.05 + index * 0.61803398875) % 1.0, 0.85, 1.0)
    return round(r * 255), round(g * 255), round(b * 255)


def _panel(pixels: NDArray[np.uint8]) -> PIL.Image:
    picture = PIL.fromarray(pixels)
    return picture.resize(_panel_size(picture.size), PIL.Resampling.LANCZOS)


def _panel_size(size: tuple[int, int]) -> tuple[int, int]:
    """Give a panel's (width, height); a very wide image is squeezed rather than drawn ever wider."""
    return min(max(1, round(size[0] * _HEIGHT / size[1])), 4 * _HEIGHT), _HEIGHT


def _overlay(image: Image, heat: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Lay a ``(H, W)`` map over its image, dark for its lowest value and light for its highest."""
    low, high = float(heat.min()), float(heat.max())
    level = (heat - low) / max(high - low, 1e-12) * (len(_STOPS) - 1)
    base = np.minimum(level.astype(np.intp), len(_STOPS) - 2)
    colours = _STOPS[base] + (level - base)[..., None] * (_STOPS[base + 1] - _STOPS[base])
    grey = image.pixels.mean(axis=2, keepdims=True)
    mixed: NDArray[np.uint8] = np.clip(0.72 * colours + 0.28 * grey, 0, 255).astype(np.uint8)
    return mixed


def draw_matches(
    source: Image,
    target: Image,
    matches: Matches,
    heat: tuple[int, NDArray[np.float32]] | None = None,
    limit: int = 60,
) -> PIL.Image:
    """Both images with coloured, numbered correspondences; surer matches have stronger lines.

    Args:
        source: left panel.
        target: right panel.
        matches: in pixels of the two images; those without a target are hollow rings.
        heat: index of one match and its ``(H, W)`` cosine map over the target, shown as a third panel.
        limit: at most this many matches are drawn, those of the largest margin; the caption says so.
    """
    chosen = _surest(matches, limit, None if heat is None else heat[0])
    panels = [_panel(source.pixels), _panel(target.pixels)]
    captions = ["source", "target"]
    if len(chosen) < len(matches):
        captions[0] += f"; {len(chosen)} of {len(matches)} matches drawn"
    if heat is not None:
        panels.append(_panel(_overlay(target, heat[1])))
        captions.append(f"cosine to point {heat[0] + 1}: {heat[1].min():.2f} (dark) to {heat[1].max():.2f} (light)")
    canvas, lefts = _lay_out(panels, captions)
    starts = _place(matches.source, source, lefts[0])
    ends = _place(matches.target, target, lefts[1])
    found: NDArray[np.bool_] = np.asarray(np.isfinite(ends).all(axis=1))
    lines = PIL.new("RGBA", canvas.size, (0, 0, 0, 0))
    pen = ImageDraw.Draw(lines)
    marks: list[tuple[float, float, int, bool]] = []  # x, y, match, filled
    for i in chosen:
        marks.append((*starts[i], i, bool(found[i])))
        if found[i]:
            # The margin says how far the best place stands above the next one; 0.2 is as good as certain.
            strength = 110 + round(140 * float(np.clip(np.nan_to_num(matches.margin[i]) / 0.2, 0, 1)))
            ways = [tuple(starts[i]), tuple(ends[i])]
            pen.line(ways, fill=(0, 0, 0, strength // 2), width=4)  # a dark edge, to be seen on white
            pen.line(ways, fill=(*_colour(i), strength), width=2)
            marks.append((*ends[i], i, True))
    canvas.paste(lines, (0, 0), lines)
    if heat is not None and found[heat[0]]:
        marks.append((ends[heat[0]][0] + lefts[2] - lefts[1], ends[heat[0]][1], heat[0], True))
    _mark(canvas, marks, numbered=len(chosen) <= 30)
    return canvas


def _surest(matches: Matches, limit: int, wanted: int | None) -> list[int]:
    """Choose at most ``limit`` matches, those of the largest margin and the wanted one, in their own order."""
    order = np.argsort(-np.nan_to_num(matches.margin, nan=-1.0), kind="stable")[:limit].tolist()
    if wanted is not None and wanted not in order:
        order[-1:] = [wanted]
    return sorted(order)


def _lay_out(panels: Sequence[PIL.Image], captions: Sequence[str]) -> tuple[PIL.Image, list[int]]:
    """Panels side by side under their captions, and each one's left edge."""
    lefts = [sum(p.width for p in panels[:i]) + _GAP * i for i in range(len(panels))]
    canvas = PIL.new("RGB", (lefts[-1] + panels[-1].width, _HEIGHT + CAPTION_HEIGHT), (225, 225, 225))
    pen = ImageDraw.Draw(canvas)
    for panel, left, caption in zip(panels, lefts, captions, strict=True):
        canvas.paste(panel, (left, CAPTION_HEIGHT))
        pen.text((left + 4, 4), caption, fill=(40, 40, 40), font=ImageFont.load_default(15))
    return canvas, lefts


def _mark(canvas: PIL.Image, marks: Sequence[tuple[float, float, int, bool]], numbered: bool) -> None:
    """Dots in each match's colour, rings where there is no match, and their numbers."""
    pen = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(15)
    for x, y, i, filled in marks:
        pen.ellipse([x - 6, y - 6, x + 6, y + 6], fill=_colour(i) if filled else None, outline=(0, 0, 0), width=2)
    for x, y, i, _ in marks if numbered else ():  # after all dots, so that none covers a number
        pen.text((x + 8, y - 9), str(i + 1), fill=(255, 255, 255), font=font, stroke_width=2, stroke_fill=(0, 0, 0))


def place_on_target(points: NDArray[np.float64], target: Image, picture: PIL.Image) -> NDArray[np.float64]:
    """Convert the target's pixels ``(N, 2)`` to pixels of a picture of `draw_matches` without a heat map."""
    return _place(points, target, picture.width - _panel_size(target.size)[0])


def _place(points: NDArray[np.float64], image: Image, left: int) -> NDArray[np.float64]:
    """Image pixels ``(N, 2)`` to canvas pixels."""
    scale = np.divide(_panel_size(image.size), image.size)
    placed: NDArray[np.float64] = (np.reshape(points, (-1, 2)) + 0.5) * scale - 0.5 + np.array([left, CAPTION_HEIGHT])
    return placed


def check_output(path: Path, inputs: Sequence[Path] = ()) -> None:
    """Make sure that a picture can be written, before it is made.

    Raises:
        OutputError: its ending is none we write, its folder does not exist, or it is one of the inputs.
    """
    _format(path)
    if not path.parent.is_dir():
        raise OutputError(f"cannot write '{path}': its folder does not exist; make it first")
    if path.exists() and any(other.exists() and path.samefile(other) for other in inputs):
        raise OutputError(f"cannot write '{path}': it is one of the images to match; choose another file")


def _format(path: Path) -> str:
    kind = _FORMATS.get(path.suffix.lower())
    if kind is None:
        raise OutputError(f"cannot write '{path}': its ending is '{path.suffix}'; allowed: {', '.join(_FORMATS)}")
    return kind


def save_picture(picture: PIL.Image, path: Path) -> None:
    """Write a picture, whole or not at all.

    Raises:
        OutputError: the ending is unknown, or the file cannot be written.
    """
    kind = _format(path)
    with atomic_path(path) as scratch, open(scratch, "wb") as handle:
        picture.save(handle, kind, quality=92)
