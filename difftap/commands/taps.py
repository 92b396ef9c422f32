"""``difftap taps``: what can be tapped in a model."""

from __future__ import annotations

from pathlib import Path

import click

from difftap.commands.options import Opening, cache_option, model_options


@click.command()
@model_options
@cache_option
def taps(model: str | None, cache: Path | None, opening: Opening) -> None:
    """List a model's taps: name, channels, image pixels per cell, module path.

    \b
    difftap taps --model sd15 --random-weights 0
    """
    from difftap.backbones.find import open_model
    from difftap.engine import Cache, default_cache_folder

    opened = open_model(model or "pocket", Cache(cache or default_cache_folder()), **opening)
    click.echo(f"{'tap':<14}{'channels':>9}{'stride':>8}  module")
    for tap in opened.taps:
        click.echo(f"{tap.name:<14}{tap.channels:>9}{tap.stride:>8}  {tap.module}")
