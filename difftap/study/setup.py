"""Set up and run the study: open data sets, check recipe and runtime once, then run one axis after another."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from difftap.artifacts.files import JsonObject
from difftap.artifacts.run import ProgressBar, check_conditions, no_bar
from difftap.datasets.chosen_objects import open_objects
from difftap.datasets.davis import PEOPLE
from difftap.datasets.objects import SceneSource
from difftap.engine import model_key
from difftap.errors import InputError, MissingExtraError, require
from difftap.pipeline.environment import Runtime, check_fits, open_cache, open_checkpoint
from difftap.pipeline.fastest import resolve
from difftap.pipeline.pipeline import Pipeline, Provider
from difftap.prototypes import RULES
from difftap.recipe import Recipe
from difftap.retrieval.distances import METRICS
from difftap.study.axes import AXES, OFFSETS, TIMESTEPS
from difftap.study.study import VIDEO, Study, prepare, run_axis, still_sources
from difftap.study.summary import finish_axis, load_axes, study_folder, write_report

__all__ = ["StudySets", "open_study", "run_study"]


@dataclass(frozen=True)
class StudySets:
    """The data sets of a study, and which part of them is used.

    Attributes:
        splits: texts ``NAME=SPLIT``; a data set that is not named has its default split.
        listing: a file that names the images or clips to take; it does not apply to a data set named in ``splits``.
        allow_missing: leave out listed images that are missing.
        min_area: an object must cover more than this fraction of the image.
        voc: root of VOC 2012, or None not to use it.
        coco: root of COCO 2017, or None.
        folder: root of the user's own ``images/`` and ``masks/``, or None.
        davis: root of DAVIS 2017, or None.
        limit: take this many images of each data set, evenly spaced; clips are never cut.
        coco_classes: class names with commas between, ``voc`` or ``all``.
        davis_classes: class names or ``all``; None for people, or all if the data do not tell which objects are people.
    """

    splits: tuple[str, ...] = ()
    listing: Path | None = None
    allow_missing: bool = False
    min_area: float = 0.01
    voc: Path | None = None
    coco: Path | None = None
    folder: Path | None = None
    davis: Path | None = None
    limit: int | None = None
    coco_classes: str | None = "voc"
    davis_classes: str | None = None

    def open(self, say: Callable[[str], None] = lambda text: None) -> dict[str, SceneSource]:
        """Open the data sets; give them by name.

        Args:
            say: called with remarks for the user.

        Raises:
            InputError: no data set is given, ``splits`` names one that is not given, or a folder is not laid out as
                expected.
        """
        given = {"voc": self.voc, "coco": self.coco, "folder": self.folder, VIDEO: self.davis}
        roots = {name: root for name, root in given.items() if root is not None}
        splits = dict(pair.partition("=")[::2] for pair in self.splits)
        unknown = sorted(splits.keys() - roots.keys())
        if unknown:
            raise InputError(
                f"--split names '{unknown[0]}', which is not given; allowed: NAME=SPLIT of a given data set"
            )
        if not roots:
            raise InputError("no data set was given; allowed: --voc, --coco, --davis, --folder")
        asked = {"coco": self.coco_classes, VIDEO: self.davis_classes}
        classes = {name: None if text == "all" else text for name, text in asked.items()}
        if self.davis_classes is None and VIDEO in roots:
            classes[VIDEO] = self._people(roots[VIDEO], splits.get(VIDEO), say)
        found = {}
        for name, root in roots.items():
            source = open_objects(
                name,
                root,
                split=splits.get(name),
                listing=None if name in splits else self.listing,
                classes=classes.get(name),
                min_area=self.min_area,
                allow_missing=self.allow_missing,
            )
            # Clips are not thinned: offsets between frames would be lost.
            found[name] = source if name == VIDEO else _limited(source, self.limit)
        return found

    def _people(self, root: Path, split: str | None, say: Callable[[str], None]) -> str | None:
        """Choose the class of DAVIS' objects: ``person``, or None for all if the data do not tell who is a person."""
        listing = self.listing if split is None else None
        source = open_objects(VIDEO, root, split=split, listing=listing, allow_missing=self.allow_missing)
        if source.about["semantics"] != "built in" or any(key.partition("/")[0] in PEOPLE for key in source.keys):
            return "person"
        say(f"{root} does not say which objects are people (it has no davis_semantics.json): all objects are taken")
        return None


def _limited(source: SceneSource, limit: int | None) -> SceneSource:
    """Take at most ``limit`` scenes, evenly spaced."""
    if limit is None or limit >= len(source):
        return source
    keys = [source.keys[k * len(source) // limit] for k in range(limit)]
    return dataclasses.replace(source, keys=tuple(keys), about={**source.about, "limit": limit})


def open_study(
    recipe: Recipe,
    runtime: Runtime,
    folder: Path,
    *,
    rule: str = "area",
    metric: str = "correlation",
    timesteps: tuple[int, ...] | None = None,
    offsets: tuple[int, ...] | None = None,
    draws: int = 1000,
    seed: int = 0,
    overwrite: bool = False,
    say: Callable[[str], None] = lambda text: None,
    bar: ProgressBar = no_bar,
) -> Study:
    """Set up a study. The arguments are attributes of `Study`; timesteps and offsets are the paper's by default.

    Raises:
        InputError: the recipe has several branches, or a name is unknown.
        ModelError: the checkpoint does not fit the recipe.
    """
    for what, value, allowed in (("--metric", metric, METRICS), ("--rule", rule, RULES)):
        if value not in allowed:
            raise InputError(f"{what} is {value!r}; allowed: {', '.join(allowed)}")
    if len(recipe.branches) != 1:
        raise InputError(f"the study's recipe has one branch, this one {len(recipe.branches)}; choose another --recipe")
    cache = open_cache(runtime.cache)
    model = open_checkpoint(recipe.model, cache, recipe.size)
    check_fits(recipe, model)
    chosen = resolve(recipe, runtime)  # once, because the tables of all recipes must come from one backend

    def opener(filled: Recipe) -> Provider:
        return Pipeline.open(filled, chosen)

    return Study(
        recipe,
        model,
        model_key(cache, model),
        chosen.backend,
        chosen.precision,
        opener,
        folder,
        rule=rule,
        metric=metric,
        timesteps=timesteps or TIMESTEPS,
        offsets=offsets or OFFSETS,
        draws=draws,
        seed=seed,
        device=_distance_device(chosen.device),
        overwrite=overwrite,
        say=say,
        bar=bar,
    )


def _distance_device(device: str) -> str:
    """Choose where distances are computed: on the GPU if the features are and torch can use it; else on the CPU."""
    if device != "cuda":
        return "cpu"
    try:
        torch = require("torch", "bench", "distances on a GPU")
    except MissingExtraError:
        return "cpu"
    return "cuda" if torch.cuda.is_available() else "cpu"


def _check_folder(folder: Path, study: Study) -> None:
    """Refuse a folder with axes of another recipe or rule: its report would put them under one heading.

    Raises:
        OutputError: there is one, and nothing is to be overwritten.
    """
    want = {"recipe": study.recipe.to_dict(), "rule": study.rule}
    try:
        made = {} if study.overwrite else load_axes(folder)
    except InputError:  # a damaged result is said when the report is written; running its axis again mends it
        return
    for axis, results in made.items():
        have = {name: results.get("settings", {}).get(name) for name in want}
        check_conditions(folder / f"{axis}.json", have, want, kind="folder", begun="made")


def run_study(study: Study, name: str, sources: Mapping[str, SceneSource]) -> Iterator[tuple[JsonObject, list[str]]]:
    """Run one axis, or all axes that the data sets allow. Write the files of each before the next begins.

    Args:
        study: what to do.
        name: the axis' name, or ``all``.
        sources: the data sets, by name.

    Yields:
        the results of each axis as plain data, and its lines for a terminal.

    Raises:
        InputError: the axis needs a data set that is not given, or no object can be used.
        OutputError: the folder cannot be written, or another run is writing it.
    """
    stills = still_sources(sources)
    if name == "all":
        axes = [axis for axis in AXES if (VIDEO in sources if axis == "video" else stills)]
    else:
        axes = [name]
        if name == "video" and VIDEO not in sources:
            raise InputError("the video axis needs clips; give --davis ROOT")
        if name != "video" and not stills:
            raise InputError(f"the {name} axis needs images; give --voc, --coco or --folder ROOT")
    with study_folder(study.folder) as folder:
        _check_folder(folder, study)
        if name == "all":
            prepare(study, sources, axes)
        for axis in axes:
            results = run_axis(study, axis, sources)
            yield results, finish_axis(study, results, sources)
            report = write_report(folder)  # after every axis, so that a stopped run leaves a report of what it did
        study.say(f"wrote {report}")
