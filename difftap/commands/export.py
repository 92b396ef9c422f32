"""``difftap export``: a model's networks to ONNX, held against torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from difftap.commands.options import Command, cache_option, checkpoint_options, needs, option

if TYPE_CHECKING:
    from difftap.recipe import ModelReference


@click.command(cls=Command)
@checkpoint_options
@click.option(
    "--tap",
    "taps",
    multiple=True,
    default=("up1",),
    show_default=True,
    metavar="TAP",
    help="The UNet graph's outputs (repeatable); it is cut after the deepest.",
)
@option(
    "--beside",
    is_flag=True,
    help="Write the graphs into the model's own folder, to ship them with it.",
    rules=(needs("model", "--beside writes into the model's folder; say which by --model"),),
)
@cache_option
def export(reference: ModelReference, taps: tuple[str, ...], beside: bool, cache: Path | None) -> None:
    """Export the VAE encoder and the tapped UNet, and print each output's parity with torch.

    \b
    difftap export --model path/to/checkpoint --tap up1
    difftap export --model sd15 --random-weights 0 --tap up1
    """
    from difftap.artifacts.table import Table
    from difftap.export.graphs import export_graph
    from difftap.pipeline.environment import open_cache, open_checkpoint

    store = open_cache(cache)
    opened = open_checkpoint(reference, store)
    for name in taps:
        opened.tap(name)
    encoder = [(opened.encoder, ())] if opened.encoder else []
    for component, names in [*encoder, (opened.tapped, taps)]:
        graph, parity = export_graph(store, opened, component, tuple(names), opened.folder if beside else None)
        click.echo(f"{graph.path}" + (f"  (cut after {graph.cut})" if graph.cut else ""))
        rows = [(name, one.summary) for name, one in parity.items()]
        for line in Table.of(("", ""), rows, left=(0, 1)).text(heads=False):
            click.echo(f"  {line}")
