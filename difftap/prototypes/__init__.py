"""Object prototypes: one vector an object, the mean of a tap's map over the cells of the object's mask."""

from __future__ import annotations

from difftap.prototypes.table import PrototypeTable

__all__ = ["PrototypeTable"]
