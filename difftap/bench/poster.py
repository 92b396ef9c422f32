"""The rows of the poster's table: presets on a checkpoint, or the same on the embedded model."""

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
"""DIFT's, filled in per class."""

POSTER = ("dift", "dift-bicubic", "dual")
"""Presets of the poster's rows that need no learned prompts, in its order."""

LEARNED = tuple(f"{method}-{kind}" for method in ("sd4match", "dual") for kind in KINDS)
"""Presets of the rows that do; their prompts lie in folders of these names (docs/tuning.md)."""


@dataclass(frozen=True)
class PosterRow:
    """One method.

    Attributes:
        name: of the row and of its folder.
        recipe: what makes features, joins and matches them.
        reading: how pixels become cells.
    """

    name: str
    recipe: Recipe
    reading: str = "centres"

    @property
    def rule(self) -> MatchRule:
        """How this row joins and matches."""
        return MatchRule.of(self.recipe, reading=self.reading)

    @property
    def keepable(self) -> bool:
        """Whether its maps can be kept for other pairs and rows."""
        return not made_of_images(self.recipe)


def poster_rows(model: ModelReference) -> list[PosterRow]:
    """List the poster's rows that need no learned prompts, on a Stable Diffusion 2.1 checkpoint."""
    return [PosterRow(name, dataclasses.replace(load_recipe(name), model=model)) for name in POSTER]


def stand_in_rows(size: int | None = None) -> list[PosterRow]:
    """List the same rows on the embedded model: the same path where there is neither a checkpoint nor a GPU."""
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
    """List the rows with learned prompts, each from the folder of its name.

    SD4Match's read by corners, as its authors do. On the embedded model they are called ``pocket-single`` and so on.

    Args:
        model: a Stable Diffusion 2.1 checkpoint; None for the embedded model.
        size: of the embedded model's input, in pixels.
    """
    if model is not None:
        readings = {"kernel-softargmax": "corners"}
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
    """Rows whose prompts lie under a folder, reading them there; and the names of those whose prompts do not."""
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
    """Choose the rows that can be filled: all that need no learned prompts, and those whose prompts are there.

    Args:
        model: a Stable Diffusion 2.1 checkpoint; None for the embedded model.
        size: of the embedded model's input, in pixels.
        prompts_root: where learned prompts lie, a folder a row; None for ``prompts``, where it is there.

    Returns:
        the rows, and the names of those whose prompts are missing.

    Raises:
        InputError: a folder was named and holds prompts of no row.
    """
    learned, absent = with_prompts(learned_rows(model, size), prompts_root or Path("prompts"))
    if prompts_root is not None and not learned:
        raise InputError(
            f"'{prompts_root}' holds no learned prompts for a row; allowed: a folder with {', '.join(absent)}, or some "
            "of them, as 'difftap tune' writes them"
        )
    return [*(stand_in_rows(size) if model is None else poster_rows(model)), *learned], absent
