"""What is kept of a finished training: the prompts' tensors, and its course as a table and a picture.

Axis letters: K classes; T prompt tokens; D their width.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from difftap.artifacts.files import atomic_path, write_atomic
from difftap.datasets.samples import Sample
from difftap.errors import require
from difftap.features.shelf import View
from difftap.tuning.learner import Key, Learner, key_of

__all__ = ["class_keys", "save_course", "save_plot", "tensors_of"]

CLASS_PAIRS = 200
"""Training pairs of a class whose conditional prompts are averaged for the ``class`` mode."""


def class_keys(samples: Sequence[Sample], kind: str, classes: Sequence[str]) -> list[list[Key]]:
    """The keys whose prompts a file's rows are the mean of: one row, or one a class."""
    if kind == "single":
        return [[Key()]]
    if kind == "class":
        return [[Key(name)] for name in classes]
    rows = []
    for name in classes:
        own = [key_of(sample, kind) for sample in samples if sample.category == name]
        count = min(CLASS_PAIRS, len(own))
        rows.append([own[k * len(own) // count] for k in range(count)])
    return rows


def tensors_of(
    learner: Learner, rows: Sequence[Sequence[Key]], tokens: Callable[[View], NDArray[np.float32]]
) -> dict[str, NDArray[np.float32]]:
    """A branch's tensors as a prompt file holds them; means are taken before the text encoder."""
    import torch

    device = learner.space.empty.device
    with torch.no_grad():
        embeddings = []
        for keys in rows:
            total = torch.zeros(1, device=device)
            for key in keys:
                total = total + learner.sequences([key], lambda view: torch.from_numpy(tokens(view)).to(device))
            embeddings.append(learner.space.encode(total / len(keys))[0].float().cpu().numpy())
    found = {"embedding": np.stack(embeddings)}
    if learner.head is not None:
        found |= {f"head.{name}": value.cpu().numpy() for name, value in learner.head.state_dict().items()}
    elif learner.rows is not None:
        found["tokens"] = learner.rows.detach().cpu().numpy()
    return found


def save_course(path: Path, groups: Sequence[dict[str, Any]]) -> None:
    """Each training's losses and epochs as JSON."""
    write_atomic(path, json.dumps({"schema": 1, "groups": list(groups)}, indent=1) + "\n")


def save_plot(path: Path, groups: Sequence[dict[str, Any]]) -> None:
    """Loss and validation PCK of each training, side by side.

    Raises:
        MissingExtraError: matplotlib is not installed.
        OutputError: it cannot be written.
    """
    require("matplotlib", "tune", "drawing a training's course")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for number, group in enumerate(groups):
        name = "" if len(groups) == 1 else f"branch {group['branches'][0]} "
        losses, rows = np.asarray(group["losses"]), group["history"]
        colour = f"C{number}"
        left.plot(np.arange(1, len(losses) + 1), losses, color=colour, alpha=0.3, linewidth=0.8)
        if rows:
            steps = len(losses) / len(rows)
            left.plot(
                [steps * (row["epoch"] - 0.5) for row in rows],
                [row["loss"] for row in rows],
                color=colour,
                label=f"{name}mean of the epoch",
            )
            epochs = [row["epoch"] for row in rows]
            right.plot(epochs, [100 * row["0.1"] for row in rows], color=colour, marker=".", label=f"{name}learned")
        right.axhline(100 * group["empty"]["0.1"], color=colour, linestyle=":", label=f"{name}empty prompt")
        if group["best"]:
            best = rows[group["best"] - 1]
            right.plot([best["epoch"]], [100 * best["0.1"]], "o", color=colour, markerfacecolor="none", markersize=10)
    left.set(xlabel="step", ylabel="loss", title="Training loss")
    right.set(xlabel="epoch", ylabel="PCK@0.10, per cent", title="Validation (nearest cell; ring: kept)")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
    with atomic_path(path) as scratch, open(scratch, "wb") as handle:
        figure.savefig(handle, format="png", dpi=110)
