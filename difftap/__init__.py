"""difftap: fast intermediate features of Stable Diffusion's UNet, and what to do with them.

The public names load on first use, so that ``import difftap`` costs nothing and needs no optional package.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

from difftap.version import __version__

_HOMES = {
    "DifftapError": "difftap.errors",
    "Extractor": "difftap.features.extract",
    "FeatureMap": "difftap.featuremap",
    "FeatureStore": "difftap.features.store",
    "Image": "difftap.images",
    "Pipeline": "difftap.pipeline.pipeline",
    "Recipe": "difftap.recipe",
    "Runtime": "difftap.pipeline.environment",
    "extract_to_store": "difftap.features.extract",
    "load_image": "difftap.images",
    "load_recipe": "difftap.recipe",
    "match_points": "difftap.matching",
    "mutual_matches": "difftap.matching",
    "open_source": "difftap.features.sources",
}

__all__ = ["__version__", *_HOMES]


_RENAMED = {
    "difftap.bench.datasets": "difftap.datasets.keypoints",
    "difftap.bench.objects": "difftap.datasets.objects",
    "difftap.extraction": "difftap.features.extract",
    "difftap.index": "difftap.retrieval (its 'build' is 'builder', its 'sources' is 'vectors')",
    "difftap.sources": "difftap.features.sources",
    "difftap.store": "difftap.features.store",
}


class _Renamed:
    """Answer the import of a module that was renamed with its new name; asked only for what nobody else finds."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> None:  # noqa: ARG004 - the protocol's
        if name in _RENAMED:
            # No ModuleNotFoundError: `from difftap.bench import datasets` would hide its text.
            raise ImportError(f"{name} was renamed: import {_RENAMED[name]}", name=name)


sys.meta_path.append(_Renamed)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'difftap' has no attribute '{name}'; public names: {', '.join(_HOMES)}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
