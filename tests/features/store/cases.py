"""Made features and a recipe for them, for tests of the store."""

import hashlib

import numpy as np

from difftap.coords import Geometry
from difftap.engine import Features
from difftap.featuremap import FeatureMap
from difftap.features.store import Encoding, open_writer
from difftap.recipe import Branch, Recipe

RECIPE = Recipe((Branch(("up1", "down1.attn0"), 261), Branch(("up2",), 50)), size=(64, 48), ensemble=1)
CONDITIONS = {
    "difftap": "test",
    "recipe": RECIPE.to_dict(),
    "model": {"name": "pocket", "key": "ab" * 8},
    "backend": {"name": "fake", "version": "1", "device": "cpu", "precision": "fp32"},
}
SHAPES = ({"up1": (6, 3, 4), "down1.attn0": (4, 6, 8)}, {"up2": (5, 6, 8)})


def made(number, scale=1.0):
    """One image's features, random but for its number."""
    stream = np.random.default_rng(number)
    lay = Geometry.letterbox if number % 2 else Geometry.stretch
    geometry = lay((40 + number % 7, 30), RECIPE.size)
    branches = tuple(
        {
            tap: FeatureMap((scale * stream.standard_normal(shape)).astype(np.float32), geometry)
            for tap, shape in taps.items()
        }
        for taps in SHAPES
    )
    return Features(hashlib.sha256(str(number).encode()).hexdigest(), branches)


def writer(path, encoding=None, shard=4, **options):
    return open_writer(path, CONDITIONS, RECIPE.feature_fields(), encoding or Encoding(), shard=shard, **options)


def fill(path, numbers, encoding=None, bad=(), **options):
    """Write images by number; those in ``bad`` fail."""
    with writer(path, encoding, **options) as opened:
        safe = 0
        for number in numbers:
            safe += opened.fail(f"k{number}", "no good") if number in bad else opened.add(f"k{number}", made(number))
        return safe + opened.finish()


def maps(features):
    return [one for taps in features.branches for one in taps.values()]
