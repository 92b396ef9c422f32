"""``difftap bench distances``: distances of all pairs beside other packages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from difftap.commands.options import json_option

__all__ = ["distances"]

_FILE = click.Path(path_type=Path)


@click.command()
@click.option("--vectors", type=click.IntRange(2), default=500, show_default=True, help="All pairs of this many.")
@click.option("--width", type=click.IntRange(1), default=1280, show_default=True, help="Numbers of a vector.")
@click.option(
    "--metric",
    "metrics",
    multiple=True,
    default=("dcor",),
    show_default=True,
    metavar="M",
    help="euclidean, manhattan, cosine, correlation or dcor (repeatable).",
)
@click.option(
    "--pairs",
    type=click.IntRange(1),
    default=2000,
    show_default=True,
    help="Pairs that the dcor package is given; its time is scaled to all.",
)
@click.option("--threads", type=click.IntRange(1), default=2, show_default=True, help="For BLAS and the dcor package.")
@click.option("--repeats", type=click.IntRange(1), default=3, show_default=True, help="Rounds; each runs every way.")
@click.option("--device", default="cpu", show_default=True, help="Of ours: cpu or cuda.")
@json_option
def distances(metrics: tuple[str, ...], json_file: Path | None, **options: Any) -> None:
    """Distances of all pairs beside the dcor package and scipy, in one run."""
    from difftap.artifacts.files import write_atomic
    from difftap.bench.distances import format_table, run, to_json

    result = run(metrics=metrics, **options)
    for line in format_table(result):
        click.echo(line)
    if json_file is not None:
        write_atomic(json_file, json.dumps(to_json(result), indent=1) + "\n")
