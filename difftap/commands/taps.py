"""``difftap taps``: what can be tapped in a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from difftap.commands.options import cache_option, checkpoint_options

if TYPE_CHECKING:
    from difftap.recipe import ModelReference


@click.command()
@checkpoint_options
@cache_option
def taps(reference: ModelReference, cache: Path | None) -> None:
    """List a model's taps: name, channels, image pixels per cell, module path.

    \b
    difftap taps --model sd15 --random-weights 0
    """
    from difftap.artifacts.table import Table
    from difftap.pipeline.environment import open_cache, open_checkpoint

    opened = open_checkpoint(reference, open_cache(cache))
    rows = [(tap.name, tap.channels, tap.stride, tap.module) for tap in opened.taps]
    click.echo("\n".join(Table.of(("tap", "channels", "stride", "module"), rows, left=(0, 3)).text()))
