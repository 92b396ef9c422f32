"""``difftap bench semantics``: the semantic study, axis by axis, and its report."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from difftap.commands.options import (
    Command,
    Decorator,
    feature_options,
    gives,
    parse_numbers,
    runtime_options,
    stack,
    was_given,
)
from difftap.commands.progress import progress_bar
from difftap.commands.prototypes import STUDY_DEFAULT, semantic_recipe
from difftap.errors import InputError

if TYPE_CHECKING:
    from difftap.pipeline.environment import Runtime
    from difftap.recipe import Recipe
    from difftap.study.setup import StudySets

__all__ = ["semantics"]

_DIR = click.Path(path_type=Path)


_SETS = (
    *("splits", "listing", "allow_missing", "min_area"),
    *("voc", "coco", "folder", "davis", "limit", "coco_classes", "davis_classes"),
)


@dataclass(frozen=True)
class _Job:
    """One axis, or all of them: under which recipe, where, of which data sets."""

    output: Path
    sets: StudySets
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
        callback=parse_numbers(1, 100_000),
    )
    timesteps = click.option(
        "--timesteps",
        metavar="T,T",
        help="To compare.  [default: 1,50,100,200,300,400,500]",
        callback=parse_numbers(0, 999),
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
        gives("sets", "difftap.study.setup:StudySets", *_SETS),
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


def _run(name: str, job: _Job) -> None:
    """Run one axis, or all of them."""
    from difftap.study.setup import open_study, run_study

    if name == "layers" and was_given("taps"):
        raise InputError("the layers axis compares the UNet's own layers; leave --tap out")
    if name == "steps" and was_given("timestep"):
        raise InputError("the steps axis compares several timesteps; give --timesteps in place of --timestep")

    def say(text: str) -> None:
        click.echo(text, err=True)

    sources = job.sets.open(say)
    study = open_study(
        job.recipe,
        job.runtime,
        job.output,
        rule=job.rule,
        metric=job.metric,
        timesteps=job.timesteps,
        offsets=job.offsets,
        draws=job.draws,
        seed=job.draw_seed,
        overwrite=job.overwrite,
        say=say,
        bar=lambda count: progress_bar(count, "images"),
    )
    failed = 0
    for results, lines in run_study(study, name, sources):
        for line in lines:
            click.echo(line)
        failed += sum(data["counts"]["images_failed"] for data in results["datasets"].values())
    if failed:
        sys.exit(1)
