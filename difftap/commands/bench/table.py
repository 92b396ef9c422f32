"""``difftap bench table``: several results in one table."""

from __future__ import annotations

from pathlib import Path

import click

__all__ = ["table"]

_FILE = click.Path(path_type=Path)


@click.command()
@click.argument("files", metavar="RESULTS.json...", type=_FILE, nargs=-1, required=True)
@click.option("--name", "names", multiple=True, help="A row's name, in the files' order.  [default: the file's folder]")
@click.option("--protocol", default="dift", show_default=True, metavar="P", help="Whose figures.")
@click.option("--alpha", type=float, default=0.05, show_default=True, metavar="A", help="At which threshold.")
@click.option("--by", type=click.Choice(["image", "point"]), default="image", show_default=True, help="Which mean.")
@click.option("--format", "kind", type=click.Choice(["markdown", "latex"]), default="markdown", show_default=True)
@click.option("--published/--no-published", default=True, show_default=True, help="Add published rows, labelled.")
@click.option("--plots", type=_FILE, metavar="DIR", help="Draw all results into the same plots.")
def table(
    files: tuple[Path, ...],
    names: tuple[str, ...],
    protocol: str,
    alpha: float,
    by: str,
    kind: str,
    published: bool,
    plots: Path | None,
) -> None:
    """Several results in one table, in the poster's layout, best of each column in bold."""
    from difftap.bench.compare import load_results
    from difftap.bench.report import result_table
    from difftap.errors import InputError

    if names and len(names) != len(files):
        raise InputError(f"{len(names)} names for {len(files)} results; give one --name for each, or none")
    labels = names or tuple(file.resolve().parent.name for file in files)
    runs = [(label, load_results(file)) for label, file in zip(labels, files, strict=True)]
    made = result_table(runs, protocol, alpha, by, show_published=published)
    click.echo(made.markdown() if kind == "markdown" else made.latex(), nl=False)
    if plots is not None:
        from difftap.bench.plots import save_plots

        save_plots(runs, plots, protocol=protocol)
