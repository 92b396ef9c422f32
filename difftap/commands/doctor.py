"""``difftap doctor``: what is here, what is missing, and how to get it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from difftap.commands.options import (
    RECIPE_NAMES,
    Command,
    cache_option,
    feature_options,
    needs,
    runtime_option,
)

if TYPE_CHECKING:
    from difftap.recipe import Recipe

_MEASURED = ("device", "precision", "threads", *RECIPE_NAMES)


@click.command(
    cls=Command,
    rules=(
        needs(
            "measure",
            "a recipe, a device or a precision says what is measured; give --measure with them",
            of=_MEASURED,
        ),
    ),
)
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
@click.option(
    "--measure", is_flag=True, help="First measure, for --backend auto, which backend is fastest for a recipe."
)
@runtime_option("--device", default="auto", show_default=True, help="With --measure: auto, cpu or cuda.")
@runtime_option("--precision", default="fp32", show_default=True, metavar="P", help="With --measure: the precision.")
@runtime_option(
    "--threads", type=click.IntRange(min=1), metavar="N", help="With --measure: CPU threads.  [default: all]"
)
@cache_option
@feature_options("pocket; dift with --model")
def doctor(
    as_json: bool,
    measure: bool,
    device: str,
    precision: str,
    threads: int | None,
    cache: Path | None,
    recipe: Recipe,
) -> None:
    """List backends, extras, devices and the cache; say what is missing and the pip line that brings it.

    With --measure, the options of a recipe say what is measured; without it they have no use and are refused.

    \b
    difftap doctor
    difftap doctor --measure --recipe dift --model sd21/
    """
    from difftap.doctor import examine, format_health, to_json
    from difftap.pipeline.environment import open_cache

    store = open_cache(cache)
    if measure:
        from difftap.pipeline.environment import Runtime
        from difftap.pipeline.fastest import AUTO, choose

        runtime = Runtime(AUTO, device, threads, cache=store.folder, precision=precision)
        choose(recipe, runtime, afresh=True)
    health = examine(store)
    if as_json:
        click.echo(json.dumps(to_json(health), indent=1))
        return
    for line in format_health(health):
        click.echo(line)
