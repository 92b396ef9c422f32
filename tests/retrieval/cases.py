"""Small indexes for tests: generated prototypes and their origin."""

import numpy as np

from difftap.prototypes import PrototypeTable
from difftap.recipe import load_recipe
from difftap.retrieval.index import Rows, VectorBatch, VectorOrigin

RECIPE = load_recipe("pocket-semantics")


def origin(**changes):
    data = {
        "source": "prototypes",
        "feature_key": RECIPE.feature_key(),
        "model_key": "m" * 16,
        "taps": "down2.attn0",
        "timestep": 0,
        "rule": "area",
        "join": "",
        "recipe": RECIPE.to_dict(),
    }
    return VectorOrigin(**{**data, **changes})


def objects(count, width=16, seed=0, classes=4, per_image=3):
    """Vectors about class centres, and their rows."""
    rng = np.random.default_rng([seed, width])
    centres = np.random.default_rng(9).standard_normal((classes, width))
    which = rng.integers(0, classes, count)
    vectors = (centres[which] + 0.5 * rng.standard_normal((count, width))).astype(np.float32)
    images = [f"im{seed}_{i // per_image:05d}" for i in range(count)]
    names = [f"{image}/{i % per_image}" for i, image in enumerate(images)]
    return vectors, Rows.objects([f"class{c}" for c in which], images, names)


def batches(vectors, rows, size=37):
    for start in range(0, len(rows), size):
        part = slice(start, start + size)
        yield VectorBatch(vectors[part], rows.take(part))


def write_table(path, count=30, seed=0, **provenance):
    """A table of prototypes as its builder writes it."""
    vectors, rows = objects(count, seed=seed)
    made = {
        "feature_key": RECIPE.feature_key(),
        "model_key": "m" * 16,
        "rule": "area",
        "conditions": {"recipe": RECIPE.to_dict()},
        **provenance,
    }
    ones = np.ones(count)
    PrototypeTable(
        vectors,
        rows.classes,
        rows.images,
        rows.instances,
        ones,
        ones,
        ones,
        np.zeros(count, bool),
        np.array(["down2.attn0"] * count),
        np.zeros(count),
        made,
    ).save(path)
    return path
