"""Object prototypes: one vector per object, the mean of a tap's map over the cells of the object's mask."""

from __future__ import annotations

from difftap.datasets.objects import ObjectFilter, Scene, SceneObject, SceneSource, make_scene
from difftap.prototypes.average import prototypes
from difftap.prototypes.build import BuildSummary, TableSpec, build, is_built, narrowed, recipe_column
from difftap.prototypes.cells import RULES, KeptCells, cell_shares, keep_cells
from difftap.prototypes.prototype_table import PrototypeTable, load_provenance

__all__ = [
    "RULES",
    "BuildSummary",
    "KeptCells",
    "ObjectFilter",
    "PrototypeTable",
    "Scene",
    "SceneObject",
    "SceneSource",
    "TableSpec",
    "build",
    "cell_shares",
    "is_built",
    "keep_cells",
    "load_provenance",
    "make_scene",
    "narrowed",
    "prototypes",
    "recipe_column",
]
