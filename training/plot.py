"""Plot a run: losses and validation over training time.

From the repository root:

    python -m training.plot --run runs/pocket --out runs/pocket/plot.png
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

LOSSES = ("align_up1", "align_up2", "relation", "denoise", "reconstruct")


def read(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a .jsonl log. A run that was killed and resumed repeats some steps; the later row counts."""
    rows = {}
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue  # the last line of a killed run may be cut short
        rows[row["step"]] = row
    return [rows[step] for step in sorted(rows)]


def smooth(values: np.ndarray, width: int) -> np.ndarray:
    """Compute the running mean over the last `width` values."""
    total = np.cumsum(np.insert(values, 0, 0.0))
    index = np.arange(1, len(values) + 1)
    first = np.maximum(index - width, 0)
    return (total[index] - total[first]) / (index - first)


def plot(run: Path, out: Path) -> None:
    """Write the figure. Raises FileNotFoundError if the run has no log yet."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    log_path, validation_path = run / "log.jsonl", run / "validation.jsonl"
    if not log_path.exists():
        raise FileNotFoundError(f"no {log_path}: nothing was trained in this run folder yet")
    log = read(log_path)
    minutes = np.array([r["seconds"] for r in log]) / 60
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4))
    for name in LOSSES:
        left.plot(minutes, smooth(np.array([r[name] for r in log]), 50), label=name)
    left.set(xlabel="minutes of training", ylabel="loss, unweighted", title="Losses (mean of 50 steps)", ylim=(0, 1.2))
    rows = read(validation_path) if validation_path.exists() else []
    times = [r["seconds"] / 60 for r in rows]
    for name in ("up2_warp", "up1_warp", "up2_aligned", "up1_aligned"):
        for column, style in ((0, "--"), (1, "-")):
            label = name.replace("_", " ") + (" @.10" if column else " @.05")
            right.plot(times, [r[name][column] for r in rows], style, marker=".", label=label)
    right.set(xlabel="minutes of training", ylabel="PCK, %", title="Held-out training photographs", ylim=(0, 100))
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(out, dpi=110)


def main() -> int:
    """Parse the arguments and plot."""
    parser = argparse.ArgumentParser(description="plot a training run", allow_abbrev=False)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    try:
        plot(args.run, args.out)
    except FileNotFoundError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
