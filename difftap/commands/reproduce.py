"""``difftap bench reproduce``: the poster's table on this machine."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from difftap.commands.options import runtime_options, take_runtime
from difftap.errors import InputError

if TYPE_CHECKING:
    from difftap.pipeline import Pipeline
    from difftap.recipe import Recipe

__all__ = ["reproduce"]

_DIR = click.Path(path_type=Path)


@click.command(epilog="Exit codes: 0 done; 1 done, but some rows or pairs failed; 2 bad input, nothing done.")
@click.option("-o", "--output", type=_DIR, required=True, metavar="DIR", help="Folder for all runs and tables.")
@click.option("--spair", type=_DIR, metavar="ROOT", help="SPair-71k.")
@click.option("--pf-pascal", type=_DIR, metavar="ROOT", help="PF-PASCAL.")
@click.option("--pf-willow", type=_DIR, metavar="ROOT", help="PF-WILLOW.")
@click.option("--synthetic", type=_DIR, metavar="ROOT", help="Any folder of images, warped.")
@click.option("--model", metavar="M", help="Stable Diffusion 2.1.  [default: the embedded model stands in]")
@click.option(
    "--prompts", type=_DIR, metavar="DIR", help="Folder of learned prompts: DIR/dual-cpm and so on.  [default: prompts]"
)
@click.option("--size", type=click.IntRange(8), metavar="N", help="Input of the stand-in, in pixels.")
@click.option("--limit", type=click.IntRange(1), metavar="N", help="The first N pairs of each data set only.")
@click.option("--per-class", type=click.IntRange(1), metavar="N", help="N pairs of each class, evenly spaced.")
@click.option("--allow-missing", is_flag=True, help="Leave out pairs whose files are missing, and say so.")
@click.option("--features", type=_DIR, metavar="DIR", help="Where features are kept.  [default: DIR/features]")
@click.option("--memory", type=click.IntRange(1), default=2048, show_default=True, metavar="MB", help="For features.")
@click.option("--estimate-only", is_flag=True, help="Say what it will take, and stop.")
@runtime_options
def reproduce(
    output: Path,
    spair: Path | None,
    pf_pascal: Path | None,
    pf_willow: Path | None,
    synthetic: Path | None,
    model: str | None,
    prompts: Path | None,
    size: int | None,
    limit: int | None,
    per_class: int | None,
    allow_missing: bool,
    features: Path | None,
    memory: int,
    estimate_only: bool,
    **options: Any,
) -> None:
    """Fill the poster's table with this machine's own figures; stop and go on at will.

    Says what it will take before it starts. Rows with learned prompts are those whose prompts are there ('difftap
    tune'), under their recipes' names.

    \b
    difftap bench reproduce -o out/poster --spair SPair-71k --model sd21/ --batch 8
    """
    from difftap.bench.estimate import Estimator, format_estimates
    from difftap.bench.reproduce import reproduce as run
    from difftap.bench.rows import LEARNED, learned_rows, poster_rows, stand_in_rows
    from difftap.bench.session import Selection, load_pairs, make_folder
    from difftap.pipeline import Pipeline as Opened

    roots = {"spair": spair, "pf-pascal": pf_pascal, "pf-willow": pf_willow, "synthetic": synthetic}
    if not any(roots.values()):
        raise InputError("no data set was given; allowed: --spair, --pf-pascal, --pf-willow, --synthetic")
    if model is not None and size is not None:
        raise InputError("--size is the stand-in's; the poster's rows have their own")
    if prompts is not None and model is None:
        raise InputError("--prompts goes with --model; the stand-in's rows have none")
    rows = stand_in_rows(size) if model is None else poster_rows(model)
    if model is not None:
        tuned = learned_rows(model, prompts or Path("prompts"))
        if prompts is not None and not tuned:
            raise InputError(f"no learned prompts in '{prompts}'; allowed: a folder that holds {', '.join(LEARNED)}")
        rows += tuned
    runtime = take_runtime(options)
    folder = make_folder(output)
    sets = [
        load_pairs(Selection(name, root, {}, allow_missing, limit, per_class), folder / name / "targets")
        for name, root in roots.items()
        if root is not None
    ]

    def opener(filled: Recipe) -> Pipeline:
        return Opened.open(filled, runtime)

    click.echo("timing a pair of each row ...", err=True)
    estimate = Estimator(opener, runtime.batch)
    estimates = [estimate(row, pairs, folder / str(pairs.about["name"]) / row.name) for pairs in sets for row in rows]
    for line in format_estimates(estimates):
        click.echo(line, err=not estimate_only)
    if estimate_only:
        return
    refused = {(one.row, one.dataset) for one in estimates if one.refusal}
    if len(refused) == len(estimates):
        raise InputError(f"no row can run here: {estimates[0].refusal}")
    results = run(
        rows,
        sets,
        folder,
        opener,
        memory=memory << 20,
        batch=runtime.batch,
        features=features,
        refused=refused,
        say=lambda text: click.echo(text, err=True),
    )
    for name in results:
        click.echo((folder / name / "table.md").read_text(encoding="utf-8"), nl=False)
    failed = sum(one["counts"]["pairs_failed"] for rows_ in results.values() for one in rows_.values())
    if failed or sum(len(rows_) for rows_ in results.values()) < len(rows) * len(sets):
        sys.exit(1)
