"""Draw matches for the model card: good and bad ones, between different objects of one class.

From the repository root:

    python -m training.pictures --config training/pocket.toml --data DIR --out FILE.png --setting "up1+up2, 256 px, t=1"

Photographs are held-out ones of Caltech-101 (CC BY 4.0). Pairs are sorted by how many of the teacher's round-trip
matches the model finds too; the best and the worst of different classes are drawn.
"""

from __future__ import annotations

import argparse
import sys
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from training.data import Config, ImageCache
from training.evaluate import network
from training.model import load
from training.pairs import Pair, class_pairs, match, pck
from training.teacher import TargetCache

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw(axis: Axes, pair: Pair, predicted: np.ndarray, count: int = 9) -> None:
    """Draw both images side by side, with `count` matches as dots of one colour; a cross marks a wrong answer."""
    from matplotlib import colormaps

    size = pair.a.shape[0]
    axis.imshow(np.concatenate([pair.a, pair.b], 1))
    chosen = np.linspace(0, len(predicted) - 1, min(count, len(predicted))).astype(int)
    extent = np.ptp(pair.points_b, axis=0).max()
    for n, k in enumerate(chosen):
        colour = colormaps["tab10"](n)
        (xa, ya), (xb, yb) = pair.points_a[k] * size, predicted[k] * size
        near = np.linalg.norm(predicted[k] - pair.points_b[k]) <= 0.1 * extent
        axis.plot([xa, xb + size], [ya, yb], color=colour, linewidth=0.7, alpha=0.6)
        axis.plot(xa, ya, "o", color=colour, markersize=5, markeredgecolor="white")
        axis.plot(xb + size, yb, "o" if near else "X", color=colour, markersize=5, markeredgecolor="white")
    axis.set_axis_off()


def run(config: Config, data: Path, out: Path, setting: str) -> None:
    """Write the figure. Raises ValueError for an unknown setting."""
    from matplotlib import use

    use("Agg")
    from matplotlib import pyplot

    torch.set_num_threads(config["run"]["threads"])
    images = ImageCache(data, Path(config["run"]["cache"]), config["data"]["max_short_side"])
    targets = TargetCache(images, config["teacher"], Path(config["run"]["cache"]))
    pairs = class_pairs(images, targets, config["data"]["held_out_one_in"], 40, 256, seed=11)
    pocket, std = load(Path(config["run"]["export"]))
    functions = dict(network(pocket, std, ("up1", "up2", "up1+up2"), 2))
    if setting not in functions:
        raise ValueError(f"setting {setting!r} is unknown; one of: {'; '.join(functions)}")
    maps = functions[setting]([p.a for p in pairs] + [p.b for p in pairs])
    found = []
    for n, pair in enumerate(pairs):
        predicted = match(maps[n], maps[len(pairs) + n], pair.points_a)
        found.append((float(pck(predicted, pair.points_b, (0.1,))[0]), pair, predicted))
    found.sort(key=lambda row: -row[0])
    figure, axes = pyplot.subplots(3, 2, figsize=(9, 7))
    for row in range(3):
        for column, (share, pair, predicted) in enumerate((found[2 * row], found[-1 - 2 * row])):
            draw(axes[row, column], pair, predicted)
            axes[row, column].set_title(f"{'good' if column == 0 else 'bad'}: {100 * share:.0f} %", fontsize=8)
    figure.tight_layout()
    figure.savefig(out, dpi=80)


def main() -> int:
    """Parse the arguments and draw."""
    parser = argparse.ArgumentParser(description="draw matches of the embedded model", allow_abbrev=False)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--setting", required=True)
    args = parser.parse_args()
    try:
        run(tomllib.loads(args.config.read_text()), args.data, args.out, args.setting)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
