"""``difftap data``: the benchmarks' data sets."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from difftap.bench.datasets.check import Part


@click.group()
def data() -> None:
    """Look at the benchmarks' data sets."""


@data.command(epilog="Exit codes: 0 all is well; 1 something is broken; 2 no such data set.")
@click.argument("name")
@click.argument("root", type=click.Path(path_type=Path))
@click.option("--decode/--no-decode", default=True, show_default=True, help="Decode every image, not its header alone.")
@click.option("--all", "show_all", is_flag=True, help="List every broken pair, not the first ten of a list.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON, with every broken pair.")
def check(name: str, root: Path, decode: bool, show_all: bool, as_json: bool) -> None:
    """Say what the data set NAME in the folder ROOT holds, and what in it is broken.

    NAME is spair, pf-pascal, pf-willow or synthetic (any folder of images).

    \b
    difftap data check spair SPair-71k
    """
    from difftap.bench.datasets.check import check as check_dataset

    report = check_dataset(name, root, decode=decode)
    if as_json:
        click.echo(json.dumps(report.to_dict(), indent=2))
    else:
        for part in report.parts:
            _show(part, None if show_all else 10)
        click.echo(f"{name} in {root}: {'all is well' if report.ok else 'broken'}")
    if not report.ok:
        raise click.exceptions.Exit(1)


def _show(part: Part, most: int | None) -> None:
    """Print one list of pairs: a line for all, one for each class, the notes, what is broken."""
    click.echo(
        f"{' '.join(str(value) for value in part.options.values())}: {part.pairs:,} pairs, {part.usable:,} usable, "
        f"{part.images:,} images, {part.keypoints:,} keypoints"
    )
    width = max(map(len, part.classes), default=0)
    for category, counts in part.classes.items():
        click.echo(
            f"  {category:<{width}}  {counts['usable']:>7,} pairs {counts['images']:>7,} images "
            f"{counts['keypoints']:>9,} keypoints"
        )
    for note in part.notes:
        click.echo(f"  note: {note}")
    for kind, count in Counter(problem.kind for problem in part.problems).items():
        click.echo(f"  broken: {count:,} pairs, {kind}")
    for problem in part.problems[:most]:
        click.echo(f"    {problem.pair}: {problem.message}")
    if most is not None and len(part.problems) > most:
        click.echo(f"    ... and {len(part.problems) - most:,} more (--all lists them)")
