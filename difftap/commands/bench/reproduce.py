"""``difftap bench reproduce``: the poster's table on this machine."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from difftap.commands.options import Command, excludes, option, runtime_option, runtime_options
from difftap.commands.progress import progress_bar
from difftap.errors import InputError

if TYPE_CHECKING:
    from difftap.pipeline.environment import Runtime
    from difftap.pipeline.pipeline import Provider
    from difftap.recipe import Recipe

__all__ = ["reproduce"]

_DIR = click.Path(path_type=Path)


@click.command(
    cls=Command, epilog="Exit codes: 0 done; 1 done, but some rows or pairs failed; 2 bad input, nothing done."
)
@click.option("-o", "--output", type=_DIR, required=True, metavar="DIR", help="Folder for all runs and tables.")
@click.option("--spair", type=_DIR, metavar="ROOT", help="SPair-71k.")
@click.option("--pf-pascal", type=_DIR, metavar="ROOT", help="PF-PASCAL.")
@click.option("--pf-willow", type=_DIR, metavar="ROOT", help="PF-WILLOW.")
@click.option("--synthetic", type=_DIR, metavar="ROOT", help="Any folder of images, warped.")
@click.option("--model", metavar="M", help="Stable Diffusion 2.1.  [default: the embedded model stands in]")
@option(
    "--size",
    type=click.IntRange(8),
    metavar="N",
    help="Input of the stand-in, in pixels.",
    rules=(excludes("--size is the stand-in's; the poster's rows have their own", "model"),),
)
@click.option(
    "--prompts-root",
    type=_DIR,
    metavar="DIR",
    help="Learned prompts, a folder a row: DIR/sd4match-single, or DIR/pocket-single of the stand-in.  [default: "
    "prompts, where it is there]",
)
@click.option("--limit", type=click.IntRange(1), metavar="N", help="The first N pairs of each data set only.")
@click.option("--per-class", type=click.IntRange(1), metavar="N", help="N pairs of each class, evenly spaced.")
@click.option("--allow-missing", is_flag=True, help="Leave out pairs whose files are missing, and say so.")
@click.option("--features", type=_DIR, metavar="DIR", help="Where features are kept.  [default: DIR/features]")
@runtime_option("--memory", type=click.IntRange(1), default=2048, show_default=True, metavar="MB", help="For features.")
@click.option("--overwrite", is_flag=True, help="Start every row afresh instead of resuming; features stay.")
@runtime_options
def reproduce(
    output: Path,
    spair: Path | None,
    pf_pascal: Path | None,
    pf_willow: Path | None,
    synthetic: Path | None,
    model: str | None,
    size: int | None,
    prompts_root: Path | None,
    limit: int | None,
    per_class: int | None,
    allow_missing: bool,
    features: Path | None,
    memory: int,
    overwrite: bool,
    runtime: Runtime,
) -> None:
    """Fill the poster's table with this machine's own figures; stop and go on at will.

    The poster's rows with learned prompts run where 'difftap tune' has left
    prompts for them (docs/tuning.md), and are named where it has not.

    \b
    difftap bench reproduce -o out/poster --spair SPair-71k --model sd21/ --prompts-root prompts --batch 8
    """
    from difftap.bench.poster import choose_rows
    from difftap.bench.reproduce import reproduce as run
    from difftap.bench.session import Selection, load_pairs, make_folder
    from difftap.features.provider import is_store
    from difftap.pipeline.pipeline import Pipeline as Opened
    from difftap.recipe import ModelReference

    roots = {"spair": spair, "pf-pascal": pf_pascal, "pf-willow": pf_willow, "synthetic": synthetic}
    if not any(roots.values()):
        raise InputError("no data set was given; allowed: --spair, --pf-pascal, --pf-willow, --synthetic")
    rows, absent = choose_rows(None if model is None else ModelReference(model), size, prompts_root)
    if features is not None and is_store(features):
        raise InputError(f"'{features}' is a store of 'difftap extract', of one recipe; rows keep features in a folder")
    folder = make_folder(output)
    sets = [
        load_pairs(Selection(name, root, {}, allow_missing, limit, per_class), folder / name / "targets")
        for name, root in roots.items()
        if root is not None
    ]

    def opener(filled: Recipe) -> Provider:
        return Opened.open(filled, runtime)

    def say(text: str) -> None:
        click.echo(text, err=True)

    if absent:
        say(
            f"left out, having no learned prompts in '{prompts_root or 'prompts'}': {', '.join(absent)}; 'difftap "
            "tune' makes them (docs/tuning.md)"
        )
    results = run(
        rows,
        sets,
        folder,
        opener,
        memory=memory << 20,
        features=features,
        overwrite=overwrite,
        say=say,
        bar=progress_bar,
    )
    for name in (name for name, rows_ in results.items() if rows_):
        click.echo((folder / name / "table.md").read_text(encoding="utf-8"), nl=False)
    failed = sum(one["counts"]["pairs_failed"] for rows_ in results.values() for one in rows_.values())
    if failed or sum(len(rows_) for rows_ in results.values()) < len(rows) * len(sets):
        sys.exit(1)
