"""``difftap engines``: build, list, verify and remove engines."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from difftap.commands.options import build_recipe, cache_option, recipe_options, runtime_options, take_runtime


@click.group()
def engines() -> None:
    """Build, list, verify and remove engines."""


@engines.command()
@recipe_options
@runtime_options
def build(revision: str | None, random_weights: int | None, **options: Any) -> None:
    """Export what a recipe needs, open it on a backend, and hold it against torch where torch is installed.

    \b
    difftap engines build
    difftap engines build --model path/to/checkpoint --size 512
    """
    from difftap.engines import build_engines

    runtime = take_runtime(options)
    recipe = build_recipe(**options)
    for record, parity in build_engines(recipe, runtime, revision=revision, random_weights=random_weights):
        click.echo(f"{record.path}")
        if record.not_run:
            click.echo(f"  built; neither run nor held against torch here: {record.not_run}")
        elif parity is None:
            click.echo("  ran once, all finite (torch is not installed or is the backend: no parity)")
        for name, one in (parity or {}).items():
            click.echo(f"  {name:<16} {one.summary}")


def _open(cache: Path | None) -> Any:
    from difftap.engine import Cache, default_cache_folder

    return Cache(cache or default_cache_folder())


@engines.command("list")
@cache_option
def list_(cache: Path | None) -> None:
    """List the graphs and engines in the cache, with the size of the files they use (weights may be shared)."""
    from difftap.engines import Artefact, list_artefacts

    store = _open(cache)
    found = list_artefacts(store)
    click.echo(f"{len(found)} graphs and engines in {store.folder}")
    for one in found:
        if isinstance(one, Artefact):
            click.echo(f"{one.manifest.kind:<7}{one.size / 1e6:>9.1f} MB  {one.path.parent.name}/{one.path.name}")
        else:
            click.echo(f"BROKEN  {one}")


@engines.command(epilog="Exit codes: 0 all whole; 1 something is broken.")
@cache_option
def verify(cache: Path | None) -> None:
    """Read the files of every graph and engine again in full and compare them with their manifests."""
    from difftap.engines import Artefact, list_artefacts, verify_artefact
    from difftap.errors import DifftapError

    store = _open(cache)
    broken = 0
    for one in list_artefacts(store):
        try:
            if not isinstance(one, Artefact):
                raise one
            note = verify_artefact(one)
            click.echo(f"whole   {one.path.name}{f'  (files alone: {note})' if note else ''}")
        except DifftapError as error:
            broken += 1
            click.echo(f"BROKEN  {error}")
    if broken:
        sys.exit(1)


@engines.command()
@click.option("--checkpoints", is_flag=True, help="Also remove checkpoints built with random weights.")
@cache_option
def clean(cache: Path | None, checkpoints: bool) -> None:
    """Remove every graph and engine from the cache; your own checkpoints and the embedded model stay."""
    from difftap.engines import clean as remove

    store = _open(cache)
    freed, kept = remove(store, checkpoints)
    click.echo(f"freed {freed / 1e6:.1f} MB in {store.folder}")
    if kept:
        click.echo(f"kept {kept / 1e6:.1f} MB of checkpoints with random weights (--checkpoints removes them)")
