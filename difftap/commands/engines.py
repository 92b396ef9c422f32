"""``difftap engines``: build, list, verify and remove engines."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from difftap.commands.options import build_recipe, build_runtime, recipe_options, runtime_options

_CACHE = click.option(
    "--cache",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Cache folder.  [default: $DIFFTAP_CACHE or the user's]",
)


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
    from difftap.export.engines import build_engines

    runtime = build_runtime(**{name: options.pop(name) for name in ("backend", "device", "threads", "batch", "cache")})
    recipe = build_recipe(**options)
    for record, parity in build_engines(recipe, runtime, revision=revision, random_weights=random_weights):
        click.echo(f"{record.path}")
        if parity is None:
            click.echo("  ran once, all finite (torch is not installed or is the backend: no parity)")
        for name, one in (parity or {}).items():
            click.echo(f"  {name:<16} {one.summary}")


def _open(cache: Path | None) -> Any:
    from difftap.engine import Cache, default_cache_folder

    return Cache(cache or default_cache_folder())


@engines.command("list")
@_CACHE
def list_(cache: Path | None) -> None:
    """List the engines in the cache."""
    from difftap.export.engines import list_engines

    store = _open(cache)
    records = list_engines(store)
    click.echo(f"{len(records)} engines in {store.folder}")
    for record in records:
        click.echo(f"{record.size / 1e6:>9.1f} MB  {record.path.parent.name}/{record.path.name}")


@engines.command()
@_CACHE
def verify(cache: Path | None) -> None:
    """Read every engine's files again in full and compare them with their manifests."""
    from difftap.errors import DifftapError
    from difftap.export.engines import list_engines, verify_engine

    store = _open(cache)
    broken = 0
    for record in list_engines(store):
        try:
            verify_engine(record)
            click.echo(f"whole   {record.path.name}")
        except DifftapError as error:
            broken += 1
            click.echo(f"BROKEN  {record.path.name}: {error}")
    if broken:
        sys.exit(1)


@engines.command()
@_CACHE
def clean(cache: Path | None) -> None:
    """Remove every graph and engine from the cache; checkpoints and packaged models stay."""
    from difftap.export.engines import clean as remove

    store = _open(cache)
    click.echo(f"freed {remove(store) / 1e6:.1f} MB in {store.folder}")
