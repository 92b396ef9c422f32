"""Small pairs, predictions and prompt files, for the benchmark's tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from difftap.bench.predictions import Prediction, Predictions
from difftap.datasets.keypoints import Sample
from difftap.prompts.learned import fits_of, save_learned
from difftap.recipe import Branch, Recipe
from tests.harness import write_picture


def prediction(
    target, found, *, size=(200, 100), box=(0.0, 0.0, 100.0, 50.0), index=0, category="cat", visible=None, **more
):
    """A prediction from target points and the places found."""
    target = np.reshape(np.array(target, np.float64), (-1, 2))
    found = np.reshape(np.array(found, np.float64), (-1, 2))
    count = len(target)
    ids = tuple(str(k) for k in range(count))
    rest = np.reshape(np.array(visible if visible is not None else [], np.float64), (-1, 2))
    fields = {
        "index": index,
        "name": f"pair-{index}",
        "category": category,
        "source": "a.png",
        "target": "b.png",
        "mirrored": False,
        "flags": {},
        "source_points": np.zeros((count, 2)),
        "target_points": target,
        "keypoint_ids": ids,
        "target_visible": np.concatenate([target, rest]),
        "target_ids": (*ids, *(f"other-{k}" for k in range(len(rest)))),
        "target_size": size,
        "target_box": box,
        "found": found,
        "score": np.linspace(0.1, 0.9, count),
        "margin": np.full(count, np.nan),
        "cycle_error": np.full(count, np.nan),
    }
    return Prediction(**{**fields, **more})


def predictions(pairs, dataset="spair"):
    """A run's predictions with the conditions that reports need."""
    recipe = Recipe((Branch(("up1",), 20),), size=(64, 64), ensemble=1)
    conditions = {
        "difftap": "0",
        "recipe": recipe.to_dict(),
        "recipe_key": recipe.key(),
        "model": {"name": "pocket", "key": "0"},
        "backend": {"name": "ort", "precision": "fp32"},
        "matching": {"combine": "concat", "reading": "centres", "confidence": True},
        "dataset": {"name": dataset, "split": "test"},
        "pairs": len(pairs),
    }
    return Predictions(conditions, tuple(pairs))


def random_pairs(seed, count, *, classes=("cat", "dog"), spread=12.0):
    """Pairs with random points and errors; boxes and flags too."""
    rng = np.random.default_rng(seed)
    pairs = []
    for k in range(count):
        size = (int(rng.integers(60, 300)), int(rng.integers(60, 300)))
        n = int(rng.integers(1, 9))
        target = rng.uniform(0, np.array(size), (n, 2))
        found = target + rng.normal(0, spread, (n, 2))
        x1, y1 = rng.uniform(-20, 30, 2)
        box = (x1, y1, x1 + rng.uniform(10, 200), y1 + rng.uniform(10, 200))
        pairs.append(
            prediction(
                target,
                found,
                size=size,
                box=box,
                index=k,
                category=classes[k % len(classes)],
                visible=rng.uniform(0, 60, (3, 2)),
                flags={"occlusion": k % 3},
                score=rng.uniform(0, 1, n),
                margin=rng.uniform(0, 1, n),
                cycle_error=rng.uniform(0, 9, n),
            )
        )
    return pairs


def samples(folder: Path, count=6, classes=("cat", "dog"), seed=0) -> list[Sample]:
    """Pairs of pictures with random whole-pixel keypoints; each class has three pictures."""
    rng = np.random.default_rng(seed)
    images = {
        (c, k): (
            write_picture(folder / c / f"{k}.png", (40 + 7 * k, 30 + 5 * i), 10 * i + k + seed),
            (40 + 7 * k, 30 + 5 * i),
        )
        for i, c in enumerate(classes)
        for k in range(3)
    }
    made = []
    for index in range(count):
        category = classes[index * len(classes) // count]
        first, second = rng.choice(3, 2, replace=False)
        (source, source_size), (target, target_size) = images[category, first], images[category, second]
        n = int(rng.integers(1, 6))
        points = [np.floor(rng.uniform(0, 1, (n, 2)) * size) for size in (source_size, target_size)]
        ids = tuple(str(k) for k in range(n))
        made.append(
            Sample(
                f"{index:03d}",
                source,
                target,
                category,
                points[0],
                points[1],
                ids,
                points[1],
                ids,
                source_size,
                target_size,
                None,
                (2.0, 3.0, 33.0, 25.0),
                {"occlusion": index % 2},
                index == 3,
            )
        )
    return made


def prompt_file(folder: Path, kind: str, recipe: Recipe, value: float = 0.0, **about) -> Path:
    """A file of learned prompts for a recipe; what it says besides may be changed."""
    classes = [] if kind == "single" else ["cat", "dog"]
    said = {
        "kind": kind,
        "classes": classes,
        "fits": fits_of(recipe),
        "model": {"name": recipe.model.name, "key": "0" * 16},
        **dict.fromkeys(("data", "settings", "scores", "steps")),
    }
    embedding = np.full((max(1, len(classes)), 3, 2), value, np.float32)
    folder.mkdir(parents=True, exist_ok=True)
    save_learned(folder, {**said, **about}, [{"embedding": embedding} for _ in recipe.branches])
    return folder
