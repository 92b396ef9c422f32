"""What the study compares (metrics, layers, timesteps, offsets), the maps of each case, and the paper's values."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from difftap.backbones.checkpoint import Checkpoint
from difftap.errors import RecipeError
from difftap.prototypes import TableSpec, narrowed
from difftap.recipe import Branch, Recipe
from difftap.taps import Tap

__all__ = [
    "AXES",
    "OFFSETS",
    "SOURCE",
    "STUDY_METRICS",
    "TIMESTEPS",
    "Case",
    "columns",
    "layer_cases",
    "published_dunn",
    "step_cases",
    "table_name",
    "union_recipe",
]

AXES = ("distances", "layers", "steps", "transforms", "video")
TIMESTEPS = (1, 50, 100, 200, 300, 400, 500)
"""The study's inference steps: timesteps of the pass."""
OFFSETS = (1, 2, 3, 4, 5, 10, 20, 30, 40)
"""The study's offsets between two video frames, in frames."""
STUDY_METRICS = ("euclidean", "correlation", "manhattan", "cosine", "dcor")
"""The columns of the paper's Table 1, and distance correlation, which the paper's formula gives."""


@dataclass(frozen=True)
class Case:
    """One case of a comparison, drawn as a group of boxes.

    Attributes:
        label: its name in the figure.
        taps: the taps whose maps are joined.
        timestep: the timestep of the pass.
        group: the figure it belongs to.
    """

    label: str
    taps: tuple[str, ...]
    timestep: int
    group: str = ""


def _levels(model: Checkpoint, size: tuple[int, int]) -> Mapping[int, Sequence[Tap]]:
    """Group the attention layers by their grid (cells along the input's shorter side); keep the three finest grids."""
    levels: dict[int, list[Tap]] = {}
    for tap in model.taps:
        if ".attn" in tap.name:
            levels.setdefault(min(size) // tap.stride, []).append(tap)
    return {cells: levels[cells] for cells in sorted(levels, reverse=True)[:3]}


def layer_cases(model: Checkpoint, size: tuple[int, int], timestep: int) -> tuple[Case, ...]:
    """List the cases of Figs. 4 to 6: grids; encoder and decoder on each grid; layers of the coarsest encoder block.

    The case of a grid joins all attention layers on it. If the coarsest block has only one attention layer (the
    embedded model), the residual layer before it is compared with it.

    Raises:
        RecipeError: the UNet has no attention layers in its encoder.
    """
    levels = _levels(model, size)
    everything = tuple(tap.name for taps in levels.values() for tap in taps)
    cases = []
    if len(levels) > 1:
        cases.append(Case("+".join(map(str, levels)), everything, timestep, "resolution"))
    for cells, taps in levels.items():
        cases.append(Case(str(cells), tuple(tap.name for tap in taps), timestep, "resolution"))
    for side, prefix in (("encoder", "down"), ("decoder", "up")):
        for cells, taps in levels.items():
            names = tuple(tap.name for tap in taps if tap.name.startswith(prefix))
            if names:
                cases.append(Case(f"{side} {cells}", names, timestep, "side"))
    coarsest = [tap.name for taps in list(levels.values())[-1:] for tap in taps if tap.name.startswith("down")]
    if not coarsest:
        raise RecipeError(f"the UNet of '{model.name}' has no attention layers in its encoder; allowed: SD 1.x or 2.x")
    block = coarsest[-1].split(".")[0]
    own = [name for name in coarsest if name.startswith(f"{block}.")]
    if len(own) == 1:  # nothing to compare with: add the residual layer before it
        own = [own[0].replace("attn", "res"), own[0]]
    ordinals = ("first", "second", "third", "fourth")
    for k, name in enumerate(own):
        what = "" if all(".attn" in one for one in own) else f"{'attention' if '.attn' in name else 'residual'} layer, "
        cases.append(Case(f"{what or ordinals[k % 4] + ', '}{name}", (name,), timestep, "layer"))
    return tuple(cases)


def step_cases(taps: tuple[str, ...], timesteps: Sequence[int]) -> tuple[Case, ...]:
    """List the cases of Fig. 7: one per timestep."""
    return tuple(Case(str(t), taps, t, "steps") for t in timesteps)


def table_name(taps: tuple[str, ...], timestep: int) -> str:
    """Name the file of a case's table of prototypes; a long list of taps becomes its number and a hash."""
    joined = "+".join(taps)
    short = joined if len(joined) <= 40 else f"{len(taps)}-taps~{hashlib.sha256(joined.encode()).hexdigest()[:10]}"
    return f"{short}.t{timestep:03d}.parquet"


def _by_timestep(model: Checkpoint, cases: Sequence[Case]) -> dict[int, tuple[str, ...]]:
    """Collect the taps of each timestep's pass, in the order in which the network runs them."""
    order = {tap.name: k for k, tap in enumerate(model.taps)}
    wanted: dict[int, set[str]] = {}
    for case in cases:
        wanted.setdefault(case.timestep, set()).update(case.taps)
    return {
        t: tuple(sorted(taps, key=lambda name: (order.get(name, len(order)), name)))
        for t, taps in sorted(wanted.items())
    }


def union_recipe(recipe: Recipe, model: Checkpoint, cases: Sequence[Case]) -> Recipe:
    """Build a recipe that gives the maps of all cases: one branch per timestep, with all taps of that timestep."""
    prompt = recipe.branches[0].prompt
    branches = tuple(Branch(taps, t, prompt) for t, taps in _by_timestep(model, cases).items())
    return replace(recipe, branches=branches)


def columns(recipe: Recipe, model: Checkpoint, cases: Sequence[Case], folder: Path) -> tuple[TableSpec, ...]:
    """List the tables that the cases need, each once; their maps come from the branches of `union_recipe`."""
    times = list(_by_timestep(model, cases))
    made: dict[Path, TableSpec] = {}
    for case in cases:
        path = folder / table_name(case.taps, case.timestep)
        branch = times.index(case.timestep)
        parts = tuple((branch, tap) for tap in case.taps)
        own = narrowed(recipe, case.taps, case.timestep)
        made.setdefault(path, TableSpec(path, own, "+".join(case.taps), case.timestep, parts))
    return tuple(made.values())


SOURCE = (
    "An analysis of pre-trained stable diffusion models through a semantic lens (Neurocomputing 2025), Table 1: "
    "Dunn index, Stable Diffusion 1.5; which form of the index it is, is not said"
)
_METRICS = ("euclidean", "correlation", "manhattan", "cosine")  # the order in which the table prints them
_ROWS = {
    "scsi-scdi": ".30312 .33343 .41411 .33027 .35941 .50012 .39991 .49589",
    "scsi-dcsi": ".65856 .80092 .80684 .78081 .37309 .59327 .42288 .59863",
    "scsi-dcdi": ".60352 .79657 .66042 .79998 .48857 .67989 .56369 .67637",
    "scdi-dcsi": ".04510 .08312 .06120 .08946 .07081 .08545 .05874 .07451",
    "scdi-dcdi": ".23696 .29406 .27972 .29364 .11407 .19403 .13810 .19816",
    "dcsi-dcdi": ".21439 .26777 .22345 .26179 .19077 .27705 .20624 .27002",
}
_PLACES = {("voc", metric): k for k, metric in enumerate(_METRICS)} | {
    ("coco", metric): k + len(_METRICS) for k, metric in enumerate(_METRICS)
}


def published_dunn(dataset: str, metric: str) -> dict[str, float]:
    """Give the paper's Dunn index of each pair of sets, for a data set and metric; empty if the paper has none."""
    place = _PLACES.get((dataset, metric))
    return {} if place is None else {pair: float(row.split()[place]) for pair, row in _ROWS.items()}
