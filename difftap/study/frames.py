"""The annotated frames (as the paper's Fig. 10): people outlined, with their distances to one in a first frame."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from difftap.errors import require
from difftap.prototypes import Scene, Source
from difftap.study.figures import UNITS, _figure, save_figure
from difftap.study.video import Clip

__all__ = ["draw_frames"]

_COLOURS = ("#ff3b30", "#34c759", "#0a84ff", "#ffd60a", "#bf5af2", "#ff9f0a", "#64d2ff", "#ff375f")
_COLUMNS = 3


def _choose(found: Sequence[Clip], offsets: Sequence[int]) -> tuple[Clip, int, list[int]] | None:
    """A clip, its first frame to show and the later ones: as many people and as many offsets as there are."""
    best: tuple[tuple[int, int, int], Clip, int, list[int]] | None = None
    for clip in found:
        for frame in np.unique(clip.frames):
            people = int(np.count_nonzero(clip.frames == frame))
            later = [d for d in offsets if np.any(clip.frames == frame + d)]
            shown = sum(int(np.count_nonzero(clip.frames == frame + d)) for d in later)
            rank = (min(people, 2), len(later), shown)
            if later and (best is None or rank > best[0]):
                best = (rank, clip, int(frame), later)
    return None if best is None else best[1:]


def _thinned(offsets: Sequence[int], most: int) -> list[int]:
    places = np.unique(np.linspace(0, len(offsets) - 1, min(most, len(offsets))).round().astype(int))
    return [offsets[k] for k in places]


def draw_frames(
    source: Source, found: Sequence[Clip], offsets: Sequence[int], metric: str, folder: Path
) -> tuple[str, Path] | None:
    """Draw a clip's frame and later ones, every person outlined with its distance to the marked person.

    Args:
        source: the scenes that the clips were built from.
        found: the clips with their distances.
        offsets: which later frames to show, of those that are there.
        metric: which distance it is.
        folder: where the picture goes.

    Returns:
        the figure's title and its PNG; None if no clip has two frames that far apart.
    """
    chosen = _choose(found, offsets)
    if chosen is None:
        return None
    clip, first, later = chosen
    shown = [0, *_thinned(later, 2 * _COLUMNS - 1)]
    keys = {int(key.rpartition("/")[2]): key for key in source.keys if key.rpartition("/")[0] == clip.name}
    scenes = [source.read(keys[first + d]) for d in shown]
    marked = _marked(clip, first, scenes[0], [first + d for d in shown])
    aspect = scenes[0].image.size[1] / scenes[0].image.size[0]
    rows = -(-len(shown) // _COLUMNS)
    figure = _figure(3.9 * _COLUMNS, rows * (3.9 * aspect + 0.35) + 0.4)
    grid = figure.subplots(rows, _COLUMNS, squeeze=False).ravel()
    people = {name: k for k, name in enumerate(sorted(set(clip.instances.tolist())))}
    for axes, scene, d in zip(grid, scenes, shown, strict=False):
        _frame(axes, scene, clip, marked, first + d, people)
        axes.set_title(f"frame {first}, marked person *" if d == 0 else f"frame {first + d} (offset {d})", fontsize=8)
    for axes in grid:
        axes.set_axis_off()
    figure.suptitle(
        f"{clip.name}: {UNITS[metric]} to person {str(clip.instances[marked]).rpartition('/')[2]} of frame {first}; "
        "the nearest in each later frame is framed",
        fontsize=9,
    )
    png, _ = save_figure(figure, folder, "fig10-frames")
    return "Annotated frames (as Fig. 10)", png


def _marked(clip: Clip, first: int, scene: Scene, frames: Sequence[int]) -> int:
    """The person of the first frame that is seen most often later; of several, the largest."""
    rows = np.flatnonzero(clip.frames == first)
    areas: Mapping[str, float] = {one.instance: one.area for one in scene.objects}

    def seen(row: int) -> tuple[int, float]:
        mine = clip.instances == clip.instances[row]
        return int(np.isin(clip.frames[mine], frames).sum()), areas.get(str(clip.instances[row]), 0.0)

    return int(max(rows.tolist(), key=seen))


def _frame(axes: Any, scene: Scene, clip: Clip, marked: int, frame: int, people: Mapping[str, int]) -> None:
    """One frame: outlines, and a label on each person."""
    effects = require("matplotlib.patheffects", "bench", "drawing frames")
    axes.imshow(scene.image.pixels, interpolation="bilinear")
    rows = {str(clip.instances[k]): k for k in np.flatnonzero(clip.frames == frame)}
    nearest = min(rows, key=lambda name: clip.distances[marked, rows[name]]) if rows else None
    placed: list[tuple[float, float]] = []
    for one, mask in zip(scene.objects, scene.masks, strict=True):
        if one.instance not in rows:
            continue
        colour = _COLOURS[people[one.instance] % len(_COLOURS)]
        axes.contour(np.pad(mask, 1).astype(np.float32)[1:-1, 1:-1], levels=[0.5], colors=[colour], linewidths=1.4)
        ys, xs = np.nonzero(mask)
        row = rows[one.instance]
        distance = float(clip.distances[marked, row])
        number = one.instance.rpartition("/")[2]
        text = f"{number}*" if row == marked else f"{number}: {distance:.3f}"
        frame_box: dict[str, Any] = {"boxstyle": "round,pad=0.2", "facecolor": (0, 0, 0, 0.55), "edgecolor": colour}
        frame_box["linewidth"] = 1.6 if one.instance == nearest and row != marked else 0.0
        x, y = float(xs.mean()), max(float(ys.min()) - 6.0, 0.1 * mask.shape[0])
        while any(abs(x - a) < 0.14 * mask.shape[1] and abs(y - b) < 0.07 * mask.shape[0] for a, b in placed):
            y += 0.075 * mask.shape[0]  # below the label that stands there
        placed.append((x, y))
        axes.text(
            x, y, text, color="white", fontsize=7.5,
            ha="center", va="bottom", bbox=frame_box, clip_on=True,
            path_effects=[effects.withStroke(linewidth=1.2, foreground="black")],
        )  # fmt: skip
