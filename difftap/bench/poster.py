"""The rows of the poster's table: presets on a checkpoint, or the same methods on the embedded model."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from difftap.errors import InputError
from difftap.matching import MatchRule
from difftap.prompts import made_of_images
from difftap.prompts.learned import find_learned
from difftap.recipe import KINDS, Branch, Learned, ModelReference, Recipe, load_recipe

__all__ = [
    "LEARNED",
    "POSTER",
    "PROMPT",
    "PosterRow",
    "choose_rows",
    "learned_rows",
    "poster_rows",
    "stand_in_rows",
    "with_prompts",
]

PROMPT = "a photo of a {category}"
"""DIFT's prompt; the class is filled in for each pair."""

POSTER = ("dift", "dift-bicubic", "dual")
"""Presets of the poster's rows that need no learned prompts, in the poster's order."""

LEARNED = tuple(f"{method}-{kind}" for method in ("sd4match", "dual") for kind in KINDS)
"""Presets of the rows that need learned prompts, which are in folders of these names (docs/tuning.md)."""


@dataclass(frozen=True)
class PosterRow:
    """One method of the table.

    Attributes:
        name: name of the row and of its folder.
        recipe: the recipe of the features and the matcher.
        reading: how pixels become cells, ``centres`` or ``corners``.
    """

    name: str
    recipe: Recipe
    reading: str = "centres"

    @property
    def rule(self) -> MatchRule:
        """The rule by which this row joins maps and matches points."""
        return MatchRule.of(self.recipe, reading=self.reading)

    @property
    def keepable(self) -> bool:
        """Whether its maps can be kept for other pairs and rows; not if prompts are made from each image."""
        return not made_of_images(self.recipe)


def poster_rows(model: ModelReference) -> list[PosterRow]:
    """List the poster's rows that need no learned prompts, on a Stable Diffusion 2.1 checkpoint."""
    return [PosterRow(name, dataclasses.replace(load_recipe(name), model=model)) for name in POSTER]


def stand_in_rows(size: int | None = None) -> list[PosterRow]:
    """List the same rows on the embedded model, for machines without a checkpoint or a GPU.

    Args:
        size: side of the square input in pixels; None for the preset's.
    """
    recipe = load_recipe("pocket")
    if size is not None:
        recipe = dataclasses.replace(recipe, size=(size, size))
    branch = dataclasses.replace(recipe.branches[0], prompt=PROMPT)
    recipe = dataclasses.replace(recipe, branches=(branch,))
    bicubic = dataclasses.replace(recipe, matcher=dataclasses.replace(recipe.matcher, interpolation="bicubic"))
    layers = tuple(Branch((tap,), branch.timestep, PROMPT) for tap in ("up1", "up2"))
    dual = dataclasses.replace(recipe, branches=layers, combine="score-sum")
    return [PosterRow("pocket", recipe), PosterRow("pocket-bicubic", bicubic), PosterRow("pocket-dual", dual)]


def learned_rows(model: ModelReference | None = None, size: int | None = None) -> list[PosterRow]:
    """List the rows with learned prompts.

    SD4Match's rows read pixels by corners, as its authors do. On the embedded model, rows are called ``pocket-single``
    and so on.

    Args:
        model: a Stable Diffusion 2.1 checkpoint; None for the embedded model.
        size: side of the embedded model's square input in pixels.
    """
    if model is not None:
        readings = {"kernel-softargmax": "corners"}  # this matcher is SD4Match's
        recipes = {name: dataclasses.replace(load_recipe(name), model=model) for name in LEARNED}
        return [PosterRow(name, one, readings.get(one.matcher.name, "centres")) for name, one in recipes.items()]
    rows = []
    for base in ("pocket", "pocket-dual"):
        recipe = load_recipe(base)
        if size is not None:
            recipe = dataclasses.replace(recipe, size=(size, size))
        for kind in KINDS:
            name = f"{base}-{kind}"
            rows.append(PosterRow(name, dataclasses.replace(recipe, learned=Learned(f"prompts/{name}", kind))))
    return rows


def with_prompts(rows: Sequence[PosterRow], root: Path) -> tuple[list[PosterRow], list[str]]:
    """Find learned prompts below a folder.

    Returns:
        the rows whose prompts are there, which now read them from there; and the names of the other rows.
    """
    found, absent = [], []
    for row in rows:
        learned = row.recipe.learned
        place = root / row.name
        try:
            find_learned(place)
        except InputError:
            absent.append(row.name)
            continue
        if learned is not None:
            learned = dataclasses.replace(learned, path=str(place))
        found.append(dataclasses.replace(row, recipe=dataclasses.replace(row.recipe, learned=learned)))
    return found, absent


def choose_rows(
    model: ModelReference | None, size: int | None, prompts_root: Path | None
) -> tuple[list[PosterRow], list[str]]:
    """Choose the rows that can be computed: rows without learned prompts, and rows whose prompts exist.

    Args:
        model: a Stable Diffusion 2.1 checkpoint; None for the embedded model.
        size: side of the embedded model's square input in pixels.
        prompts_root: folder of learned prompts, with one folder per row; None for ``prompts``, if it exists.

    Returns:
        the rows, and the names of the rows whose prompts are missing.

    Raises:
        InputError: ``prompts_root`` is given and holds prompts of no row.
    """
    learned, absent = with_prompts(learned_rows(model, size), prompts_root or Path("prompts"))
    if prompts_root is not None and not learned:
        raise InputError(
            f"'{prompts_root}' holds no learned prompts for a row; allowed: a folder with {', '.join(absent)}, or some "
            "of them, as 'difftap tune' writes them"
        )
    return [*(stand_in_rows(size) if model is None else poster_rows(model)), *learned], absent
