"""``difftap data``: the benchmarks' data sets."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from difftap.commands.options import Command, excludes, option
from difftap.errors import InputError

if TYPE_CHECKING:
    from difftap.datasets.check import ObjectPart, Part
    from difftap.datasets.layout import Problem


@click.group()
def data() -> None:
    """Look at the benchmarks' data sets."""


@data.command(
    cls=Command,
    epilog="Exit codes: 0 all is well; 1 something is broken; 2 no such data set.",
)
@click.argument("name")
@click.argument("root", type=click.Path(path_type=Path))
@click.option("--decode/--no-decode", default=True, show_default=True, help="Decode every image, not its header alone.")
@option(
    "--all",
    "show_all",
    is_flag=True,
    help="List every broken pair, not the first ten of a list.",
    rules=(excludes("--json has every broken pair; leave --all out", "as_json"),),
)
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON, with every broken pair.")
def check(name: str, root: Path, decode: bool, show_all: bool, as_json: bool) -> None:
    """Say what the data set NAME in the folder ROOT holds, and what in it is broken.

    NAME is spair, pf-pascal, pf-willow or synthetic (any folder of images), for pairs of points; voc, coco, davis or
    folder (pictures and mask PNGs), for objects, whose images and masks are always decoded.

    \b
    difftap data check spair SPair-71k
    difftap data check voc VOCdevkit
    """
    from difftap.datasets import keypoints, objects
    from difftap.datasets.check import check as check_dataset
    from difftap.datasets.check import check_objects

    if name not in keypoints.NAMES and name not in objects.NAMES:
        raise InputError(f"no data set '{name}'; allowed: {', '.join((*keypoints.NAMES, *objects.NAMES))}")
    if name in objects.NAMES and not decode:
        raise InputError(f"images and masks of '{name}' are always decoded; leave --no-decode out")
    report = check_objects(name, root) if name in objects.NAMES else check_dataset(name, root, decode=decode)
    if as_json:
        click.echo(json.dumps(report.to_dict(), indent=2))
    else:
        for part in report.parts:
            _show(part, None if show_all else 10)
        verdict = "all is well" if report.whole else "usable, but not all of it is used" if report.ok else "broken"
        click.echo(f"{name} in {root}: {verdict}")
    if not report.ok:
        sys.exit(1)  # click would swallow an Exit: the command line does not run standalone


def _show(part: Part | ObjectPart, most: int | None) -> None:
    """Print one list: a line for all, one for each class, the notes, what is broken."""
    from difftap.datasets.check import ObjectPart

    if isinstance(part, ObjectPart):
        _show_objects(part)
        _show_problems("images", part.problems, most)
    else:
        _show_pairs(part)
        _show_problems("pairs", part.problems, most)


def _show_objects(part: ObjectPart) -> None:
    click.echo(f"{part.split}: {part.images:,} images, {part.usable:,} usable, {part.objects:,} objects")
    _show_classes(part.classes, ("objects", "images"))
    for reason, count in part.left_out.items():
        click.echo(f"  left out: {count:,} objects, {reason}")
    for line in part.unused:
        click.echo(f"  not used: {line}")


def _show_pairs(part: Part) -> None:
    click.echo(
        f"{' '.join(str(value) for value in part.options.values())}: {part.pairs:,} pairs, {part.usable:,} usable, "
        f"{part.images:,} images, {part.keypoints:,} keypoints"
    )
    _show_classes(part.classes, ("usable", "images", "keypoints"))
    for note in part.notes:
        click.echo(f"  note: {note}")
    for line in part.unused:
        click.echo(f"  not used: {line}")


def _show_classes(classes: Mapping[str, Mapping[str, int]], counted: Sequence[str]) -> None:
    from difftap.artifacts.table import Table

    heads = ("class", *("pairs" if name == "usable" else name for name in counted))
    rows = [(category, *(f"{counts[name]:,}" for name in counted)) for category, counts in classes.items()]
    for line in Table.of(heads, rows).text() if rows else ():
        click.echo(f"  {line}")


def _show_problems(what: str, problems: Sequence[Problem], most: int | None) -> None:
    for kind, count in Counter(problem.kind for problem in problems).items():
        click.echo(f"  broken: {count:,} {what}, {kind}")
    for problem in problems[:most]:
        click.echo(f"    {problem.pair}: {problem.message}")
    if most is not None and len(problems) > most:
        click.echo(f"    ... and {len(problems) - most:,} more (--all lists them)")
