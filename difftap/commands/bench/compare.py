"""``difftap bench compare``: whether the difference of two results is real."""

from __future__ import annotations

import json
from pathlib import Path

import click

from difftap.commands.options import json_option

__all__ = ["compare"]

_FILE = click.Path(path_type=Path)


@click.command()
@click.argument("first", metavar="A.json", type=_FILE)
@click.argument("second", metavar="B.json", type=_FILE)
@click.option(
    "--by", multiple=True, metavar="MEAN", help="image, point, class-image, class-point.  [default: headline]"
)
@click.option("--draws", type=click.IntRange(1), default=10000, show_default=True, help="Bootstrap resamplings.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the resampling.")
@json_option
def compare(first: Path, second: Path, by: tuple[str, ...], draws: int, seed: int, json_file: Path | None) -> None:
    """Two results over the same pairs: is the difference real? A paired bootstrap over pairs."""
    from difftap.artifacts.files import write_atomic
    from difftap.bench.compare import compare as run
    from difftap.bench.compare import format_comparison, load_results, to_json

    comparison = run(load_results(first), load_results(second), by=by, count=draws, seed=seed)
    for line in format_comparison(comparison):
        click.echo(line)
    if json_file is not None:
        write_atomic(json_file, json.dumps(to_json(comparison), indent=1) + "\n")
