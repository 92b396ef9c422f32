"""A benchmark from a data set's folder to the files of one run: what ``bench pck`` and ``bench reproduce`` share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from difftap.artifacts.files import output_errors, write_atomic
from difftap.artifacts.run import ProgressBar, no_bar
from difftap.bench.predictions import Predictions, load_predictions
from difftap.bench.protocols import Protocol
from difftap.bench.report import dump_results, result_table
from difftap.bench.runner import PredictRun, count_passes, digest, predict, subset
from difftap.bench.scoring import Resampling, score
from difftap.datasets.keypoints import Sample, load, loader
from difftap.datasets.parts import take_part
from difftap.errors import InputError
from difftap.features.keeper import Generators
from difftap.features.provider import is_store, open_features
from difftap.matching import MatchRule
from difftap.pipeline.environment import Runtime
from difftap.pipeline.pipeline import Provider
from difftap.prompts import wants_category
from difftap.prompts.learned import remembered
from difftap.recipe import Recipe

__all__ = [
    "Pairs",
    "Selection",
    "check_run",
    "clear_pictures",
    "load_pairs",
    "make_folder",
    "match_pairs",
    "match_selection",
    "write_results",
]


@dataclass(frozen=True)
class Selection:
    """Which pairs are asked for.

    Attributes:
        name: the data set.
        root: its folder.
        options: of its loader, ``split`` and such.
        allow_missing: leave broken pairs out, and count them.
        limit: the first so many pairs.
        per_class: so many of each class, evenly spaced.
        part: of the images, one of `difftap.datasets.parts.PARTS`; None for all.
    """

    name: str
    root: Path
    options: Mapping[str, Any] = field(default_factory=dict)
    allow_missing: bool = False
    limit: int | None = None
    per_class: int | None = None
    part: str | None = None


@dataclass(frozen=True)
class Pairs:
    """The pairs, and what there is to say of them.

    Attributes:
        samples: the pairs.
        about: name, split, options, and what was left out: part of the conditions of every figure.
        generators: images that have to be made when they are first needed.
    """

    samples: Sequence[Sample]
    about: Mapping[str, Any]
    generators: Generators = field(default_factory=dict)


def make_folder(path: Path) -> Path:
    """Make a folder, unless it is there.

    Raises:
        OutputError: it cannot be made.
    """
    with output_errors(path):
        path.mkdir(parents=True, exist_ok=True)
    return path


def load_pairs(chosen: Selection, made: Path) -> Pairs:
    """Read the pairs; images that have to be made (the synthetic set's targets) will go to ``made``.

    Raises:
        InputError: the folder is not laid out as expected, or pairs are broken and may not be.
    """
    data = load(chosen.name, chosen.root, allow_missing=chosen.allow_missing, cache=made, **chosen.options)
    about = {
        "name": data.name,
        **chosen.options,
        "split": data.split,
        "listed": len(data) + len(data.problems),
        "left_out": data.problem_counts(),
        "problems": [{"pair": one.pair, "kind": one.kind, "message": one.message} for one in data.problems],
        "notes": list(data.notes),
        "subset": {"limit": chosen.limit, "per_class": chosen.per_class}
        | ({} if chosen.part is None else {"part": chosen.part}),
    }
    samples = data.samples if chosen.part is None else take_part(data.samples, chosen.part, chosen.root, made)
    return Pairs(subset(samples, chosen.limit, chosen.per_class), about, data.generators)


def check_run(chosen: Selection, folder: Path, recipe: Recipe | None, matching: Mapping[str, Any]) -> Iterator[str]:
    """Make sure that a run's predictions are of the pairs, and by the recipe, that are asked for.

    Args:
        chosen: the pairs. If their folder is not there (predictions outlive it) only what was recorded is compared.
        folder: the run's.
        recipe: asked for; None if nothing was said of it.
        matching: what was said of joining and confidence, by the names of the conditions' ``matching``.

    Yields:
        remarks.

    Raises:
        InputError: they differ; the message says in what.
    """
    file = folder / "predictions.jsonl"
    at = load_predictions(file).conditions
    data = at["dataset"]
    subset_asked = {"limit": chosen.limit, "per_class": chosen.per_class, "part": chosen.part}
    asked: list[tuple[str, Any, Any]] = [
        ("data set", chosen.name, data["name"]),
        *((f"--{name}", value, data.get(name)) for name, value in chosen.options.items()),
        *((f"--{name.replace('_', '-')}", value, data["subset"].get(name)) for name, value in subset_asked.items()),
        *((f"--{name}", value, at["matching"][name]) for name, value in matching.items() if value is not None),
    ]
    if recipe is not None:
        asked.append(("recipe", recipe.key(), at["recipe_key"]))
        if recipe.learned is not None:  # the folder is part of the key, and may have been learned into again
            now = remembered(recipe.learned.path).sha256
            asked.append(("learned prompts of sha256", now, at.get("prompts", {}).get("sha256")))
    for what, wanted, there in asked:
        if wanted != there:
            raise InputError(
                f"'{file}' was made with {what} {_said(there)}, and {_said(wanted)} is asked for; "
                "give what the run was made with, or another -o"
            )
    loader(chosen.name)
    if not chosen.root.is_dir():
        yield f"'{chosen.root}' is not there: the pairs could not be compared with the predictions"
        return
    options = {**chosen.options, **{name: data[name] for name in _LISTED if name in data and name != "split"}}
    again = replace(chosen, options={**options, "split": data["split"]}, allow_missing=bool(data["left_out"]))
    if digest(load_pairs(again, folder / "targets").samples) != at["pairs_sha256"]:
        raise InputError(
            f"the pairs in '{chosen.root}' are not those of '{file}'; give the folder that the run was made from"
        )


def _said(value: Any) -> str:
    return "none" if value is None else str(value)


_LISTED = ("split", "layout", "pairs", "flip")
"""Options of loaders that the conditions hold."""


def clear_pictures(folder: Path) -> None:
    """Remove the plots and the gallery of an earlier run, whose predictions are about to be replaced."""
    from difftap.bench.gallery import clear_gallery
    from difftap.bench.plots import clear_plots

    clear_gallery(folder / "gallery")
    clear_plots(folder / "plots")


def match_pairs(
    pipeline: Provider,
    pairs: Pairs,
    recipe: Recipe,
    folder: Path,
    *,
    rule: MatchRule,
    confidence: bool = True,
    overwrite: bool = False,
    memory: int = 2 << 30,
    features: Path | None = None,
    progress: Callable[[int], None] = lambda count: None,
) -> PredictRun:
    """Fill ``predictions.jsonl`` of a run's folder; arguments as `difftap.bench.runner.predict`."""
    return predict(
        pipeline,
        pairs.samples,
        recipe,
        make_folder(folder) / "predictions.jsonl",
        dataset=pairs.about,
        rule=rule,
        confidence=confidence,
        overwrite=overwrite,
        memory=memory,
        features=features,
        generators=pairs.generators,
        progress=progress,
    )


def match_selection(
    selection: Selection,
    recipe: Recipe,
    folder: Path,
    runtime: Runtime,
    *,
    rule: MatchRule,
    confidence: bool = True,
    overwrite: bool = False,
    memory: int = 2 << 30,
    features: Path | None = None,
    say: Callable[[str], None] = lambda text: None,
    bar: ProgressBar = no_bar,
) -> PredictRun:
    """Read a selection's pairs, open the recipe, match, and fill ``predictions.jsonl`` of a run's folder.

    Args:
        selection: the pairs.
        recipe: what makes features; its prompts may hold ``{category}``.
        folder: the run's.
        runtime: where the recipe runs.
        rule: how maps are combined and matched.
        confidence: also compute margin and cycle error, at twice the matching's cost.
        overwrite: start afresh whatever the folder holds.
        memory: bytes kept in memory of maps and their norms; more goes to a scratch folder.
        features: a store of ``difftap extract``, or a folder in which branches' maps are kept for later runs.
        say: told of remarks.
        bar: shows progress over so many pairs.

    Raises:
        InputError: the pairs or the features cannot be used.
        OutputError: the predictions cannot be written, or belong to another run.
    """
    if overwrite:
        clear_pictures(folder)
    stored = features if features is not None and is_store(features) else None
    if stored and wants_category(recipe.branches):
        raise InputError(
            f"the recipe prompts by category, and the store '{stored}' holds one map an image, which is of "
            "none: it would never be used; extract with --prompt '' and give the same here, or name a folder to keep "
            "features in"
        )
    pairs = load_pairs(selection, folder / "targets")
    passes = count_passes(pairs.samples, recipe)
    say(f"{len(pairs.samples)} pairs, {passes} passes of an image through a branch, less what is there")
    with open_features(recipe, stored, runtime) as pipeline, bar(len(pairs.samples)) as advance:
        run = match_pairs(
            pipeline,
            pairs,
            recipe,
            folder,
            rule=rule,
            confidence=confidence,
            overwrite=overwrite,
            memory=memory,
            features=None if stored else features,
            progress=advance,
        )
    earlier = f", {run.skipped} already there" if run.skipped else ""
    say(f"{run.written} pairs in {run.seconds:.1f} s{earlier}, {run.failed} failed")
    if stored:
        say(f"features of {run.from_store} images from '{stored}', of {run.not_in_store} extracted, not being in it")
    return run


def write_results(
    folder: Path,
    protocols: Sequence[Protocol],
    settings: Resampling | None = None,
    *,
    show_published: bool = True,
    plots: bool = False,
    gallery: int = 0,
) -> dict[str, Any]:
    """Score a run's predictions; write ``results.json``, the tables, and the pictures asked for.

    The tables are of the first protocol that applies, at alpha 0.05 where it has that.

    Returns:
        the results.
    """
    predictions: Predictions = load_predictions(folder / "predictions.jsonl")
    results = score(predictions, protocols, settings)
    write_atomic(folder / "results.json", dump_results(results))
    for name, result in results["protocols"].items():
        alpha = 0.05 if "0.05" in result["pck"] else result["conditions"]["alphas"][0]
        by = "point" if result["conditions"]["headline"] == "point" else "image"
        label = folder.resolve().name  # of '.', too
        table = result_table([(label, results)], name, alpha, by, show_published=show_published)
        write_atomic(folder / "table.md", table.markdown())
        write_atomic(folder / "table.tex", table.latex())
        break
    if plots:
        from difftap.bench.plots import save_plots

        save_plots([(folder.resolve().name, results)], folder / "plots")
    if gallery:
        from difftap.bench.gallery import save_gallery

        save_gallery(predictions, protocols[0], folder / "gallery", gallery)
    return results
