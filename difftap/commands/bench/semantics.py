"""``difftap bench semantics``: the semantic study, axis by axis, and its report."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from difftap.commands.options import (
    Command,
    Decorator,
    feature_options,
    gives,
    runtime_options,
    stack,
    was_given,
)
from difftap.commands.progress import progress_bar
from difftap.commands.prototypes import STUDY_DEFAULT, open_objects, semantic_recipe
from difftap.errors import InputError

if TYPE_CHECKING:
    from difftap.pipeline.environment import Runtime
    from difftap.pipeline.pipeline import Provider
    from difftap.prototypes import SceneSource
    from difftap.recipe import Recipe
    from difftap.study.study import Study

__all__ = ["semantics"]

_DIR = click.Path(path_type=Path)


def _numbers(low: int, high: int) -> Callable[[click.Context, click.Parameter, str | None], tuple[int, ...] | None]:
    """Make a callback that reads whole numbers with commas between, each once."""

    def parse(_ctx: click.Context, param: click.Parameter, text: str | None) -> tuple[int, ...] | None:
        if text is None:
            return None
        parts = [part.strip() for part in text.split(",")]
        if not all(part.isdecimal() and low <= int(part) <= high for part in parts):
            raise InputError(
                f"{param.opts[0]} is {text!r}; allowed: whole numbers from {low} to {high}, with commas between"
            )
        return tuple(dict.fromkeys(int(part) for part in parts))

    return parse


@dataclass(frozen=True)
class _Sets:
    """The data sets that were given, and what of them is taken; an axis that has no use for one leaves its default."""

    splits: tuple[str, ...]
    listing: Path | None
    allow_missing: bool
    min_area: float
    voc: Path | None = None
    coco: Path | None = None
    folder: Path | None = None
    davis: Path | None = None
    limit: int | None = None
    coco_classes: str | None = None
    davis_classes: str | None = None


@dataclass(frozen=True)
class _Job:
    """One axis, or all of them: under which recipe, where, of which data sets."""

    output: Path
    sets: _Sets
    recipe: Recipe
    runtime: Runtime
    rule: str
    draws: int
    draw_seed: int
    overwrite: bool
    metric: str = "correlation"
    timesteps: tuple[int, ...] | None = None
    offsets: tuple[int, ...] | None = None


def _options(name: str) -> Decorator:
    """Say what an axis takes; an option stands where it does something."""
    voc = click.option("--voc", type=_DIR, metavar="ROOT", help="VOC 2012: VOCdevkit or the folder VOC2012.")
    coco = click.option("--coco", type=_DIR, metavar="ROOT", help="COCO 2017: the folder that holds annotations/.")
    folder = click.option("--folder", type=_DIR, metavar="ROOT", help="Your own images/ and masks/.")
    limit = click.option(
        "--limit", type=click.IntRange(1), metavar="N", help="N images of each set, evenly spaced; clips stay whole."
    )
    classes = click.option(
        "--coco-classes", default="voc", show_default=True, metavar="A,B", help="voc (VOC's 20), all, or names."
    )
    davis = click.option("--davis", type=_DIR, metavar="ROOT", help="DAVIS 2017: the folder that holds JPEGImages/.")
    people = click.option(
        "--davis-classes", metavar="A,B", help="all, or names.  [default: person; all where no class is known]"
    )
    offsets = click.option(
        "--offsets",
        metavar="D,D",
        help="Between frames.  [default: 1,2,3,4,5,10,20,30,40]",
        callback=_numbers(1, 100_000),
    )
    timesteps = click.option(
        "--timesteps", metavar="T,T", help="To compare.  [default: 1,50,100,200,300,400,500]", callback=_numbers(0, 999)
    )
    metric = click.option(
        "--metric", default="correlation", show_default=True, metavar="M",
        help="euclidean, manhattan, cosine, correlation or dcor" + ("; distances takes all." if name == "all" else "."),
    )  # fmt: skip
    stills = [voc, coco, folder, limit, classes] if name != "video" else []
    clips = [davis, people, offsets] if name in ("video", "all") else []
    steps = [timesteps] if name in ("steps", "all") else []
    measure = [metric] if name != "distances" else []
    options: list[Decorator] = [
        click.option("-o", "--output", type=_DIR, required=True, metavar="DIR", help="Folder for all that is written."),
        *stills,
        *clips,
        click.option(
            "--split",
            "splits",
            multiple=True,
            metavar="NAME=SPLIT",
            help="A split, coco=train2017 (repeatable).",
        ),
        click.option("--list", "listing", type=_DIR, metavar="FILE", help="Images and clips: a CSV src,dataset."),
        click.option("--allow-missing", is_flag=True, help="Leave out listed images that are missing, and say so."),
        click.option("--min-area", type=float, default=0.01, show_default=True, metavar="F", help="Of the image."),
        click.option("--rule", default="area", show_default=True, metavar="RULE", help="Mask to cells: area, nearest."),
        *measure,
        *steps,
        click.option(
            "--draws", type=click.IntRange(1), default=1000, show_default=True, metavar="N", help="Bootstrap draws."
        ),
        click.option(
            "--draw-seed", type=click.IntRange(0), default=0, show_default=True, metavar="N", help="Of the bootstrap."
        ),
        click.option("--overwrite", is_flag=True, help="Build prototypes anew instead of resuming."),
        feature_options(STUDY_DEFAULT, make=semantic_recipe),
        runtime_options,
        gives("sets", _Sets),
        gives("job", _Job),
    ]

    return stack(options)


@click.group()
def semantics() -> None:
    """Study how near objects of one class, and one object seen twice, lie to each other.

    Each axis builds the prototypes it needs (or finds them in the folder), and writes AXIS.json, AXIS.md, its figures
    as PNG and SVG, and report.html with everything the folder holds.
    """


_HELP = {
    "distances": "Five distance measures on the study's layer (its Table 1 and Fig. 3).",
    "layers": "Grids, encoder against decoder, and the layers of the coarsest encoder block (Figs. 4 to 6).",
    "steps": "Timesteps 1 to 500 (Fig. 7).",
    "transforms": "Objects cropped, shifted, flipped and turned (Fig. 8).",
    "video": "People in later frames of a clip (Figs. 9 and 10); needs --davis.",
    "all": "Every axis that the data sets given allow.",
}


def _command(name: str) -> click.Command:
    @_options(name)
    def run(job: _Job) -> None:
        _run(name, job)

    return click.command(
        name,
        cls=Command,
        help=f"{_HELP[name]}\n\n\b\ndifftap bench semantics {name} "
        + ("--davis DAVIS" if name == "video" else "--voc VOCdevkit --coco coco" + (" --davis DAVIS" * (name == "all")))
        + " -o out/study",
        short_help=_HELP[name].split(" (")[0].split(";")[0].rstrip("."),
        epilog="Exit codes: 0 done; 1 done, but some images failed; 2 bad input.",
    )(run)


for _name in _HELP:
    semantics.add_command(_command(_name))


def _sources(sets: _Sets) -> dict[str, SceneSource]:
    """Open the data sets that were given, open."""
    roots = {"voc": sets.voc, "coco": sets.coco, "folder": sets.folder, "davis": sets.davis}
    splits = dict(pair.partition("=")[::2] for pair in sets.splits)
    unknown = sorted(name for name in splits if roots.get(name) is None)
    if unknown:
        raise InputError(f"--split names '{unknown[0]}', which is not given; allowed: NAME=SPLIT of a set that is")
    asked = {"coco": sets.coco_classes, "davis": sets.davis_classes}
    classes = {name: None if text == "all" else text for name, text in asked.items()}
    if asked["davis"] is None and roots["davis"] is not None:
        listing = None if "davis" in splits else sets.listing
        classes["davis"] = _people(roots["davis"], splits.get("davis"), listing, sets.allow_missing)
    if not any(roots.values()):
        raise InputError("no data set was given; allowed: --voc, --coco, --davis, --folder")
    found = {}
    for name, root in roots.items():
        if root is None:
            continue
        source = open_objects(
            name,
            root,
            split=splits.get(name),
            listing=None if name in splits else sets.listing,
            classes=classes.get(name),
            min_area=sets.min_area,
            allow_missing=sets.allow_missing,
        )
        found[name] = source if name == "davis" else _limited(source, sets.limit)
    return found


def _people(root: Path, split: str | None, listing: Path | None, allow_missing: bool) -> str | None:
    """Choose the class of clips that the study takes: people, or all objects (None) where nothing tells them."""
    from difftap.datasets.davis import PEOPLE

    source = open_objects("davis", root, split=split, listing=listing, allow_missing=allow_missing)
    if source.about["semantics"] != "built in" or any(key.partition("/")[0] in PEOPLE for key in source.keys):
        return "person"
    click.echo(f"nothing says which objects of {root} are people (davis_semantics.json): all are taken", err=True)
    return None


def _limited(source: SceneSource, limit: int | None) -> SceneSource:
    """So many scenes, evenly spaced; frames of clips stay whole."""
    if limit is None or limit >= len(source):
        return source
    keys = [source.keys[k * len(source) // limit] for k in range(limit)]
    return dataclasses.replace(source, keys=tuple(keys), about={**source.about, "limit": limit})


def _run(name: str, job: _Job) -> None:
    """Run one axis, or all of them."""
    from difftap.study.axes import AXES
    from difftap.study.study import prepare, run_axis
    from difftap.study.summary import finish_axis, study_folder, write_report

    if name == "layers" and was_given("taps"):
        raise InputError("the layers axis compares the UNet's own layers; leave --tap out")
    if name == "steps" and was_given("timestep"):
        raise InputError("the steps axis compares several timesteps; give --timesteps in place of --timestep")
    sources = _sources(job.sets)
    stills = [one for one in sources if one != "davis"]
    if name == "all":
        axes = [axis for axis in AXES if (axis == "video") <= ("davis" in sources) and (axis == "video" or stills)]
    else:
        axes = [name]
        if name == "video" and "davis" not in sources:
            raise InputError("the video axis needs clips; give --davis ROOT")
        if name != "video" and not stills:
            raise InputError(f"the {name} axis needs images; give --voc, --coco or --folder ROOT")
    failed = 0
    with study_folder(job.output) as folder:
        study = _study(folder, job)
        if name == "all":
            prepare(study, sources, axes)
        for axis in axes:
            results = run_axis(study, axis, sources)
            for line in finish_axis(study, results, sources):
                click.echo(line)
            failed += sum(data["counts"]["images_failed"] for data in results["datasets"].values())
            report = write_report(folder)  # after every axis: a run that is stopped leaves a report of what it did
        click.echo(f"wrote {report}", err=True)
    if failed:
        sys.exit(1)


def _distance_device(device: str) -> str:
    """Where distances are computed: with the features on a GPU, if torch can use it; else on the CPU."""
    if device != "cuda":
        return "cpu"
    from difftap.errors import MissingExtraError, require

    try:
        torch = require("torch", "bench", "distances on a GPU")
    except MissingExtraError:
        return "cpu"
    return "cuda" if torch.cuda.is_available() else "cpu"


def _study(folder: Path, job: _Job) -> Study:
    """Set up the study that the options ask for."""
    from difftap.engine import model_key
    from difftap.pipeline.environment import check_fits, open_cache, open_checkpoint
    from difftap.pipeline.fastest import resolve
    from difftap.pipeline.pipeline import Pipeline as Opened
    from difftap.prototypes import RULES
    from difftap.retrieval.distances import METRICS
    from difftap.study.axes import OFFSETS, TIMESTEPS
    from difftap.study.study import Study

    recipe = job.recipe
    for what, value, allowed in (("--metric", job.metric, METRICS), ("--rule", job.rule, RULES)):
        if value not in allowed:
            raise InputError(f"{what} is {value!r}; allowed: {', '.join(allowed)}")
    if len(recipe.branches) != 1:
        raise InputError(f"the study's recipe has one branch, this one {len(recipe.branches)}; choose another --recipe")
    cache = open_cache(job.runtime.cache)
    model = open_checkpoint(recipe.model, cache, recipe.size)
    check_fits(recipe, model)
    runtime = resolve(recipe, job.runtime)  # once: tables of several recipes must be of one backend

    def opener(filled: Recipe) -> Provider:
        return Opened.open(filled, runtime)

    return Study(
        recipe,
        model,
        model_key(cache, model),
        runtime.backend,
        runtime.precision,
        opener,
        folder,
        rule=job.rule,
        metric=job.metric,
        timesteps=job.timesteps or TIMESTEPS,
        offsets=job.offsets or OFFSETS,
        draws=job.draws,
        seed=job.draw_seed,
        device=_distance_device(runtime.device),
        overwrite=job.overwrite,
        say=lambda text: click.echo(text, err=True),
        bar=lambda count: progress_bar(count, "images"),
    )
