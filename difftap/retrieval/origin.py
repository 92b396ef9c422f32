"""Where an index's vectors come from: what must be the same of everything that is added to it or sought in it."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

from difftap.errors import InputError
from difftap.features.provider import precision_of, precisions_agree
from difftap.recipe import Recipe

__all__ = ["Origin"]


@dataclass(frozen=True)
class Origin:
    """What decides the vectors.

    Attributes:
        source: ``prototypes`` (an object's mean) or ``patches`` (a cell of the joined map).
        feature_key: the recipe's, of the maps.
        model_key: the checkpoint's.
        taps: which maps, in order; a tap of several passes with its timestep.
        timestep: of the pass; -1 for several.
        rule: from masks to cells.
        join: how the maps of patches are joined, as far as it changes them; empty for one map and for prototypes.
        recipe: plain data, to make vectors of queries by; the matcher in it has no say.
        precision: what engines computed in; all of floating point are one.
        stored: how the feature store that maps were read from kept them, in words; empty for engines' own. It has no
            say: queries cannot be made so.
    """

    source: str
    feature_key: str
    model_key: str
    taps: str
    timestep: int
    rule: str
    join: str
    recipe: Mapping[str, Any]
    precision: str = "fp32"
    stored: str = ""

    def check(self, other: Origin, what: str) -> None:
        """Make sure that other vectors are of the same kind.

        Args:
            other: their origin.
            what: they, as the subject of a sentence.

        Raises:
            InputError: they are not; the message names what differs.
        """
        mine, theirs = asdict(self), asdict(other)
        for name in (f.name for f in fields(self) if f.name not in ("recipe", "stored")):
            alike = precisions_agree if name == "precision" else operator.eq
            if not alike(mine[name], theirs[name]):
                raise InputError(
                    f"{what} is of another origin than the index: {name.replace('_', ' ')} {theirs[name]!r}, the "
                    f"index's {mine[name]!r}; vectors of two recipes or models cannot be compared"
                )

    def to_dict(self) -> dict[str, Any]:
        """Plain data; `from_dict` reads it back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Origin:
        """Read what `to_dict` gave.

        Raises:
            KeyError, TypeError: it is none.
        """
        return cls(**{f.name: data[f.name] for f in fields(cls) if f.name in data or f.default is MISSING})

    @classmethod
    def of_table(cls, provenance: Mapping[str, Any], taps: str, timestep: int, path: Path) -> Origin:
        """The origin of a table of prototypes.

        Raises:
            InputError: its provenance is incomplete.
        """
        try:
            return cls(
                "prototypes",
                str(provenance["feature_key"]),
                str(provenance["model_key"]),
                taps,
                timestep,
                str(provenance["rule"]),
                "",
                dict(provenance["conditions"]["recipe"]),
                precision_of(provenance["conditions"]),
                _kept_as(provenance["conditions"]),
            )
        except (KeyError, TypeError) as error:
            raise InputError(
                f"'{path}' does not say how its prototypes were made ({error} is missing); build it again with "
                "'difftap prototypes build'"
            ) from error

    @classmethod
    def of_patches(cls, recipe: Recipe, conditions: Mapping[str, Any]) -> Origin:
        """The origin of cells of a recipe's joined map, made under a pipeline's conditions."""
        times = {branch.timestep for branch in recipe.branches}
        taps = [(tap, branch) for branch in recipe.branches for tap in branch.taps]
        label = "+".join(tap if len(times) == 1 else f"{tap}@{branch.timestep}" for tap, branch in taps)
        shares = ":".join(f"{branch.weight:g}" for branch in recipe.branches)
        join = f"{recipe.upsample} {shares}" if len(taps) > 1 else ""
        timestep = times.pop() if len(times) == 1 else -1
        return cls(
            "patches",
            recipe.feature_key(),
            str(conditions["model"]["key"]),
            label,
            timestep,
            "area",
            join,
            recipe.to_dict(),
            precision_of(conditions),
            _kept_as(conditions),
        )


def _kept_as(conditions: Mapping[str, Any]) -> str:
    """How the store kept the maps, in words; empty without one."""
    encoding = conditions.get("store", {}).get("encoding", {})
    return ", ".join(f"{name} {value}" for name, value in sorted(encoding.items()) if value is not None)
