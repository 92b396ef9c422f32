"""The rows of the poster's table: presets on a checkpoint, or the same on the embedded model."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from difftap.errors import InputError
from difftap.matching import Joining
from difftap.prompts.learned import find_learned, remembered
from difftap.recipe import Branch, Recipe, load_recipe

__all__ = ["LEARNED", "POSTER", "PROMPT", "Row", "learned_rows", "poster_rows", "stand_in_rows"]

PROMPT = "a photo of a {category}"
"""DIFT's, filled in per class."""

POSTER = ("dift", "dift-bicubic", "dual")
"""Presets of the poster's rows without learned prompts, in its order."""

LEARNED = ("sd4match-single", "sd4match-class", "sd4match-cpm", "dual-single", "dual-class", "dual-cpm")
"""Presets of those with learned prompts, in its order."""


@dataclass(frozen=True)
class Row:
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
    def joining(self) -> Joining:
        """How this row joins and matches."""
        return Joining.of(self.recipe, reading=self.reading)

    @property
    def kept(self) -> bool:
        """Whether its maps can be kept in files: not those under prompts made of images."""
        asked = self.recipe.learned
        return asked is None or remembered(asked.path).mode(asked) not in ("pair", "image")


def poster_rows(model: str) -> list[Row]:
    """The poster's rows that need no learned prompts, on a Stable Diffusion 2.1 checkpoint."""
    return [Row(name, dataclasses.replace(load_recipe(name), model=model)) for name in POSTER]


def learned_rows(model: str, folder: Path) -> list[Row]:
    """The poster's rows with learned prompts, as far as ``folder`` holds them under their presets' names."""
    rows = []
    for name in LEARNED:
        recipe = load_recipe(name)
        try:
            find_learned(folder / name)
        except InputError:
            continue
        assert recipe.learned is not None  # noqa: S101 - these presets' own
        asked = dataclasses.replace(recipe.learned, path=str(folder / name))
        rows.append(Row(name, dataclasses.replace(recipe, model=model, learned=asked)))
    return rows


def stand_in_rows(size: int | None = None) -> list[Row]:
    """The same rows on the embedded model: the same path where there is neither a checkpoint nor a GPU."""
    recipe = load_recipe("pocket")
    if size is not None:
        recipe = dataclasses.replace(recipe, size=(size, size))
    branch = dataclasses.replace(recipe.branches[0], prompt=PROMPT)
    recipe = dataclasses.replace(recipe, branches=(branch,))
    bicubic = dataclasses.replace(recipe, matcher=dataclasses.replace(recipe.matcher, interpolation="bicubic"))
    layers = tuple(Branch((tap,), branch.timestep, PROMPT) for tap in ("up1", "up2"))
    dual = dataclasses.replace(recipe, branches=layers, combine="score-sum")
    return [Row("pocket", recipe), Row("pocket-bicubic", bicubic), Row("pocket-dual", dual)]
