"""Draw the study's figures: box plots, the curve over offsets, and annotated frames. Needs matplotlib.

All but the frames are drawn from the numbers in the results' JSON, so results can be drawn again without the distances.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from difftap.artifacts.files import JsonObject, output_errors, write_atomic
from difftap.errors import require
from difftap.pages.figure import figure_bytes, new_figure, plain_axes
from difftap.prototypes import Scene, SceneSource
from difftap.study.video import Clip

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["NAMES", "TITLES", "UNITS", "draw_axis", "draw_frames"]

COLOURS = {"sidi": "#8d6a9f", "scsi": "#1f6f8b", "scdi": "#66a182", "dcsi": "#edae49", "dcdi": "#d1495b"}
NAMES = {
    "sidi": "same instance, different image",
    "scsi": "same class, same image",
    "scdi": "same class, different image",
    "dcsi": "different class, same image",
    "dcdi": "different class, different image",
}
UNITS = {
    "euclidean": "Euclidean distance",
    "manhattan": "Manhattan distance",
    "cosine": "1 - cosine",
    "correlation": "1 - Pearson correlation",
    "dcor": "1 - distance correlation",
}
TITLES = {"voc": "VOC 2012", "coco": "COCO 2017", "davis": "DAVIS 2017", "folder": "images"}


def _save(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Write a figure as PNG and as SVG; equal results give equal bytes."""
    with output_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{name}.png", folder / f"{name}.svg"]
    for path in files:
        write_atomic(path, figure_bytes(figure, path.suffix[1:], dpi=150, salt=name))
    return files


def _box(one: JsonObject) -> dict[str, float] | None:
    """Give a set's figures under the names that matplotlib's ``bxp`` takes; None for an empty set."""
    box = one["box"]
    if not box["count"]:
        return None
    keys = {"med": "median", "q1": "q1", "q3": "q3", "whislo": "low", "whishi": "high", "mean": "mean"}
    return {key: box[name] for key, name in keys.items()}


def _boxes(axes: Axes, boxes: Sequence[tuple[float, str, JsonObject]], width: float) -> None:
    """Draw boxes at (place, set, figures), coloured by set; a white dot marks the mean."""
    for place, name, one in boxes:
        figures = _box(one)
        if figures is None:
            axes.annotate("none", (place, 0.02), xycoords=("data", "axes fraction"), ha="center", fontsize=7)
            continue
        drawn = axes.bxp(
            [figures], positions=[place], widths=width, showfliers=False, showmeans=True, patch_artist=True,
            medianprops={"color": "black"},
            meanprops={"marker": "o", "markerfacecolor": "white", "markeredgecolor": "black", "markersize": 3.5},
        )  # fmt: skip
        drawn["boxes"][0].set(facecolor=COLOURS[name], linewidth=0.8)


def _title(name: str, data: JsonObject) -> str:
    counts = data["counts"]
    return f"{TITLES.get(name, name)}: {counts['objects']} objects, {counts['images']} images"


def _distances(results: JsonObject, _group: str) -> Figure:
    """Draw the measures side by side, each with its own unit; one row per data set."""
    datasets = results["datasets"]
    cases = max(len(data["cases"]) for data in datasets.values())
    figure: Figure = new_figure(2.5 * cases + 0.4, 3.3 * len(datasets))
    parts = figure.subfigures(len(datasets), 1, squeeze=False)[:, 0]
    for part, (name, data) in zip(parts, datasets.items(), strict=True):
        part.suptitle(_title(name, data), fontsize=10)
        # strict=False: a data set may have fewer cases than the one with most.
        for axes, case in zip(part.subplots(1, cases, squeeze=False)[0], data["cases"], strict=False):
            sets = [key for key in ("scsi", "scdi", "dcsi", "dcdi") if key in case["sets"]]
            _boxes(axes, [(k, key, case["sets"][key]) for k, key in enumerate(sets)], 0.6)
            ticks = [f"{key}\nn={_short(case['sets'][key]['count'])}" for key in sets]
            axes.set_xticks(range(len(sets)), ticks, fontsize=7)
            axes.set_ylabel(UNITS[case["metric"]], fontsize=8)
            axes.set_xlim(-0.6, len(sets) - 0.4)
            plain_axes(axes)
            axes.tick_params(axis="y", labelsize=8)
    return figure


def _short(count: int) -> str:
    if count < 10_000:
        return str(count)
    return f"{count / 1e3:.3g}k" if count < 1_000_000 else f"{count / 1e6:.3g}M"


def _grouped(results: JsonObject, group: str) -> Figure:
    """Draw the cases side by side, with the boxes of all sets in each; one row per data set."""
    datasets = results["datasets"]
    cases = {name: [one for one in data["cases"] if one["group"] == group] for name, data in datasets.items()}
    most = max(len(rows) for rows in cases.values())
    figure: Figure = new_figure(min(12.0, max(5.5, 1.25 * most + 1.2)), 3.4 * len(datasets))
    order = ("sidi", "scsi", "scdi", "dcsi", "dcdi")
    grid = figure.subplots(len(datasets), 1, squeeze=False)[:, 0]
    for axes, (name, rows) in zip(grid, cases.items(), strict=True):
        sets = [key for key in order if any(row["sets"].get(key, {}).get("count") for row in rows)]
        width = 0.8 / max(1, len(sets))
        places = []
        for g, row in enumerate(rows):
            for k, key in enumerate(sets):
                places.append((g + (k - (len(sets) - 1) / 2) * width, key, row["sets"][key]))
        _boxes(axes, places, 0.85 * width)
        axes.set_xticks(range(len(rows)), [_wrapped(row["label"]) for row in rows], fontsize=8)
        axes.set_xlim(-0.5, len(rows) - 0.5)
        for g in range(1, len(rows)):
            axes.axvline(g - 0.5, color="#cccccc", linewidth=0.6)
        axes.set_ylabel(UNITS[rows[0]["metric"]], fontsize=9)
        axes.set_xlabel(_AXES[group], fontsize=9)
        counts = ", ".join(f"{key} {_numbers(rows, key)}" for key in sets)
        axes.set_title(f"{_title(name, datasets[name])}\nn: {counts}", fontsize=9)
        plain_axes(axes)
        axes.tick_params(axis="y", labelsize=8)
        patches = require("matplotlib.patches", "bench", "drawing figures")
        handles = [patches.Patch(facecolor=COLOURS[key], edgecolor="black", label=key) for key in sets]
        axes.legend(handles=handles, fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


_AXES = {
    "resolution": "grid of the joined attention layers, cells a side",
    "side": "half of the UNet, and its grid in cells a side",
    "layer": "encoder layer",
    "steps": "timestep t",
    "transforms": "transform",
}


def _wrapped(label: str) -> str:
    return (
        label.replace(", ", ",\n")
        .replace("crop-shift ", "crop-shift\n")
        .replace("flip ", "flip\n")
        .replace("rotate ", "rotate\n")
        .replace("encoder ", "encoder\n")
        .replace("decoder ", "decoder\n")
    )


def _numbers(rows: Sequence[JsonObject], key: str) -> str:
    counts = sorted({row["sets"][key]["count"] for row in rows})
    return _short(counts[0]) if len(counts) == 1 else f"{_short(counts[0])} to {_short(counts[-1])}"


def _offsets(results: JsonObject, _group: str) -> Figure:
    """Draw the means over offsets with their intervals, and below how often a person is nearest to itself."""
    figure: Figure = new_figure(7.5, 5.6)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[2.2, 1])
    for name, data in results["datasets"].items():
        rows = data["offsets"]
        for key, style in (("sidi", "-"), ("scdi", "--")):
            known = [row for row in rows if row[key]["count"]]
            xs, ys = [row["offset"] for row in known], [row[key]["box"]["mean"] for row in known]
            label = f"{key}: {'the same person' if key == 'sidi' else 'another person'}, that many frames later"
            upper.plot(xs, ys, style, marker="o", ms=4, color=COLOURS[key], label=label)
            spans = [(row["offset"], *row[key]["interval"]) for row in known if None not in row[key]["interval"]]
            if spans:
                upper.fill_between(*zip(*spans, strict=True), color=COLOURS[key], alpha=0.18, linewidth=0)
        scsi = data["scsi"]["box"]
        if scsi["count"]:
            label = f"scsi: two people in one frame (n={_short(scsi['count'])})"
            upper.axhline(scsi["mean"], color=COLOURS["scsi"], linestyle=":", label=label)
        upper.set_ylabel(f"mean {UNITS[data['metric']]}", fontsize=9)
        shares = [(row["offset"], 100 * row["nearest"]["share"], row["nearest"]["count"]) for row in rows
                  if row["nearest"]["share"] is not None]  # fmt: skip
        lower.plot([x for x, _, _ in shares], [y for _, y, _ in shares], marker="o", ms=4, color="#2e4057")
        for x, y, n in shares:
            lower.annotate(f"{n}", (x, y), textcoords="offset points", xytext=(0, -11), ha="center", fontsize=6.5)
        counts, people = data["counts"], sum(len(clip["people"]) for clip in data["clips"].values())
        upper.set_title(
            f"{TITLES.get(name, name)}: {people} people, seen {counts['objects']} times in {counts['images']} frames of"
            f" {len(data['clips'])} clip{'s' if len(data['clips']) > 1 else ''}; bands: 95 % intervals from resampled "
            "frames\nbelow, how often a person's nearest in the later frame is itself, and in how many cases",
            fontsize=9,
        )
    offsets = sorted({row["offset"] for data in results["datasets"].values() for row in data["offsets"]})
    lower.set(ylim=(0, 108), xlabel="offset, frames", xscale="log", xlim=(0.9 * offsets[0], 1.1 * offsets[-1]))
    lower.set_xticks(offsets, [str(offset) for offset in offsets], fontsize=8)
    lower.set_xticks([], minor=True)
    lower.set_ylabel("nearest is\nitself, %", fontsize=9)
    upper.set_ylim(0, None)
    upper.legend(fontsize=8, frameon=False)
    for axes in (upper, lower):
        plain_axes(axes)
        axes.tick_params(axis="y", labelsize=8)
    return figure


_FIGURES: dict[str, tuple[tuple[str, str, Callable[[JsonObject, str], Figure], str], ...]] = {
    "distances": (("fig3-distances", "", _distances, "Distance measures (as Fig. 3)"),),
    "layers": (
        ("fig4-resolution", "resolution", _grouped, "Spatial resolution (as Fig. 4)"),
        ("fig5-encoder-decoder", "side", _grouped, "Encoder and decoder (as Fig. 5)"),
        ("fig6-layers", "layer", _grouped, "Layers of the coarsest encoder block (as Fig. 6)"),
    ),
    "steps": (("fig7-steps", "steps", _grouped, "Inference steps (as Fig. 7)"),),
    "transforms": (("fig8-transforms", "transforms", _grouped, "Transforms (as Fig. 8)"),),
    "video": (("fig9-offsets", "", _offsets, "Offsets between frames (as Fig. 9)"),),
}
"""Axis -> (file name, group of cases, drawing function, title) of its figures. The numbers of Figs. 4 to 8 are our
reading of the paper."""


def draw_axis(results: JsonObject, folder: Path) -> list[tuple[str, Path]]:
    """Draw the figures of an axis.

    Returns:
        title and SVG file of each figure; a PNG is beside it.

    Raises:
        MissingExtraError: matplotlib is not installed.
        OutputError: a file cannot be written.
    """
    drawn = []
    for name, group, draw, title in _FIGURES[results["axis"]]:
        if group and not any(one["group"] == group for d in results["datasets"].values() for one in d["cases"]):
            continue
        drawn.append((title, _save(draw(results, group), folder, name)[1]))
    return drawn


_PEOPLE = ("#ff3b30", "#34c759", "#0a84ff", "#ffd60a", "#bf5af2", "#ff9f0a", "#64d2ff", "#ff375f")
_COLUMNS = 3


def _choose(found: Sequence[Clip], offsets: Sequence[int]) -> tuple[Clip, int, list[int]] | None:
    """Choose a clip, its first frame to show and the offsets of later ones: most people, then most offsets."""
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
    source: SceneSource, found: Sequence[Clip], offsets: Sequence[int], metric: str, folder: Path
) -> tuple[str, Path] | None:
    """Draw a frame of a clip and later frames. Every person is outlined and has its distance to the marked person.

    Args:
        source: the scenes that the clips were built from.
        found: the clips with their distances.
        offsets: offsets of the later frames to show, if the clip has them.
        metric: the distance's metric.
        folder: the folder of the picture.

    Returns:
        the figure's title and its PNG; None if no clip has two frames with one of the offsets.
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
    figure = new_figure(3.9 * _COLUMNS, rows * (3.9 * aspect + 0.35) + 0.4)
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
    png, _ = _save(figure, folder, "fig10-frames")
    return "Annotated frames (as Fig. 10)", png


def _marked(clip: Clip, first: int, scene: Scene, frames: Sequence[int]) -> int:
    """Choose the person of the first frame who is seen most often later; if several are, the largest."""
    rows = np.flatnonzero(clip.frames == first)
    areas: Mapping[str, float] = {one.instance: one.area for one in scene.objects}

    def seen(row: int) -> tuple[int, float]:
        mine = clip.instances == clip.instances[row]
        return int(np.isin(clip.frames[mine], frames).sum()), areas.get(str(clip.instances[row]), 0.0)

    return int(max(rows.tolist(), key=seen))


def _frame(axes: Axes, scene: Scene, clip: Clip, marked: int, frame: int, people: Mapping[str, int]) -> None:
    """Draw one frame with an outline and a label of each person."""
    effects = require("matplotlib.patheffects", "bench", "drawing frames")
    axes.imshow(scene.image.pixels, interpolation="bilinear")
    rows = {str(clip.instances[k]): k for k in np.flatnonzero(clip.frames == frame)}
    nearest = min(rows, key=lambda name: clip.distances[marked, rows[name]]) if rows else None
    placed: list[tuple[float, float]] = []
    for one, mask in zip(scene.objects, scene.masks, strict=True):
        if one.instance not in rows:
            continue
        colour = _PEOPLE[people[one.instance] % len(_PEOPLE)]
        axes.contour(np.pad(mask, 1).astype(np.float32)[1:-1, 1:-1], levels=[0.5], colors=[colour], linewidths=1.4)
        ys, xs = np.nonzero(mask)
        row = rows[one.instance]
        distance = float(clip.distances[marked, row])
        number = one.instance.rpartition("/")[2]
        text = f"{number}*" if row == marked else f"{number}: {distance:.3f}"
        frame_box: dict[str, object] = {"boxstyle": "round,pad=0.2", "facecolor": (0, 0, 0, 0.55), "edgecolor": colour}
        frame_box["linewidth"] = 1.6 if one.instance == nearest and row != marked else 0.0
        x, y = float(xs.mean()), max(float(ys.min()) - 6.0, 0.1 * mask.shape[0])
        while any(abs(x - a) < 0.14 * mask.shape[1] and abs(y - b) < 0.07 * mask.shape[0] for a, b in placed):
            y += 0.075 * mask.shape[0]  # move below the label that is already there
        placed.append((x, y))
        axes.text(
            x, y, text, color="white", fontsize=7.5,
            ha="center", va="bottom", bbox=frame_box, clip_on=True,
            path_effects=[effects.withStroke(linewidth=1.2, foreground="black")],
        )  # fmt: skip
