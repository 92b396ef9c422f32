"""``difftap bench dense-speed``: how fast dense matching is, from cached maps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from difftap.commands.options import json_option

__all__ = ["dense_speed"]

_FILE = click.Path(path_type=Path)


@click.command()
@click.option("--pairs", type=click.IntRange(1), default=200, show_default=True, help="Pairs to match.")
@click.option("--images", type=click.IntRange(2), default=27, show_default=True, help="Images they are drawn from.")
@click.option("--keypoints", type=click.IntRange(1), default=7, show_default=True, help="Per pair.")
@click.option("--channels", type=click.IntRange(1), default=1280, show_default=True)
@click.option("--grid", type=click.IntRange(1), default=48, show_default=True, help="Side of the maps, in cells.")
@click.option("--image", "size", type=click.IntRange(1), nargs=2, default=(500, 375), show_default=True, metavar="W H")
@click.option("--interpolation", type=click.Choice(["bilinear", "bicubic"]), default="bilinear", show_default=True)
@click.option(
    "--confidence/--no-confidence",
    default=True,
    show_default=True,
    help="Also margin and cycle error, as bench pck does.",
)
@click.option("--memory", type=click.IntRange(1), default=512, show_default=True, metavar="MB", help="For maps.")
@json_option
def dense_speed(json_file: Path | None, **case: Any) -> None:
    """Dense matching from cached maps: pairs a second and peak memory, on generated maps of a benchmark's size."""
    from difftap.artifacts.files import write_atomic
    from difftap.bench.densespeed import SpeedCase, format_speed, run, to_json

    result = run(SpeedCase(**case))
    for line in format_speed(result):
        click.echo(line)
    if json_file is not None:
        write_atomic(json_file, json.dumps(to_json(result), indent=1) + "\n")
