"""``difftap bench pck``: point-matching benchmarks scored as their authors defined them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from difftap.commands.options import (
    RECIPE_NAMES,
    Command,
    excludes,
    gives,
    option,
    recipe_option,
    recipe_options,
    runtime_option,
    runtime_options,
    was_given,
)
from difftap.commands.progress import progress_bar

if TYPE_CHECKING:
    from difftap.bench.scoring import Resampling
    from difftap.bench.session import Selection
    from difftap.pipeline.environment import Runtime
    from difftap.recipe import Recipe

__all__ = ["pck"]

_FILE = click.Path(path_type=Path)


def _selection(
    dataset: str,
    root: Path,
    split: str | None,
    layout: str | None,
    listing: str | None,
    flip: str | None,
    allow_missing: bool,
    limit: int | None,
    per_class: int | None,
    part: str | None,
) -> Selection:
    from difftap.bench.session import Selection

    own = {"split": split, "layout": layout, "pairs": listing, "flip": flip}
    given = {name: value for name, value in own.items() if value is not None}
    return Selection(dataset, root, given, allow_missing, limit, per_class, part)


def _settings(draws: int, alphas: tuple[float, ...]) -> Resampling:
    from difftap.bench.scoring import Resampling
    from difftap.errors import InputError

    for alpha in alphas:
        if not 0 < alpha <= 10:
            raise InputError(f"--alpha is {alpha}; allowed: a share above 0, up to 10, such as 0.1")
    return Resampling(draws=draws, alphas=alphas)


@click.command(
    cls=Command,
    epilog="Exit codes: 0 done; 1 done, but some pairs failed or are not done yet and take no part; 2 bad input, "
    "nothing done.",
)
@click.argument("dataset", metavar="NAME")
@click.argument("root", type=_FILE)
@click.option("-o", "--output", type=_FILE, required=True, metavar="DIR", help="Folder for all that is written.")
@click.option("--split", metavar="SPLIT", help="trn, val or test, where the data set has them.  [default: test]")
@click.option("--layout", metavar="KIND", help="SPair-71k's list of pairs: large or small.")
@click.option("--pairs", "listing", metavar="LIST", help="PF-PASCAL: a list's file; PF-WILLOW: csv or mat.")
@click.option("--flip", metavar="KIND", help="PF-PASCAL's column flip: both (default), target or ignore.")
@click.option("--allow-missing", is_flag=True, help="Leave out pairs whose files are missing or broken, and say so.")
@click.option("--limit", type=click.IntRange(1), metavar="N", help="The first N pairs only.")
@click.option("--per-class", type=click.IntRange(1), metavar="N", help="N pairs of each class, evenly spaced.")
@click.option("--part", metavar="P", help="Pairs of one part of the images (train, val, test): see docs/tuning.md.")
@click.option("--protocol", "protocols", multiple=True, metavar="P", help="Score under P (repeatable).  [default: all]")
@click.option("--alpha", "alphas", multiple=True, type=float, metavar="A", help="Score at A too (repeatable).")
@click.option("--draws", type=click.IntRange(1), default=1000, show_default=True, help="Bootstrap resamplings.")
@recipe_option(
    "--combine",
    metavar="KIND",
    help="Of several branches: concat, score-sum or score-product.  [default: the recipe's]",
)
@recipe_option(
    "--reading", default="centres", show_default=True, help="Pixels to cells: centres, or corners (SD4Match's rule)."
)
@click.option(
    "--confidence/--no-confidence", default=True, show_default=True, help="Also margin and cycle error; matching x 2."
)
@runtime_option(
    "--memory",
    type=click.IntRange(1),
    default=2048,
    show_default=True,
    metavar="MB",
    help="For features and their norms.",
)
@click.option(
    "--features",
    type=_FILE,
    metavar="DIR",
    help="Keep features there, with provenance, and use them; or use a store of 'difftap extract'.",
)
@click.option("--overwrite", is_flag=True, help="Start afresh instead of resuming.")
@option(
    "--score-only",
    is_flag=True,
    help="Score the predictions that are there, if they are the ones asked for; no model is opened.",
    rules=(
        excludes(
            "{} has no say with --score-only; leave one of the two out",
            *("features", "overwrite", "random_weights", "revision"),
        ),
    ),
)
@click.option("--plots", is_flag=True, help="Draw PCK over alpha, per class and by flag.")
@click.option(
    "--gallery", type=click.IntRange(0), default=0, metavar="N", help="Draw the N best, median and worst pairs."
)
@click.option("--published/--no-published", default=True, show_default=True, help="Show published figures beside ours.")
@gives("selection", _selection)
@gives("settings", _settings)
@recipe_options
@runtime_options
def pck(
    selection: Selection,
    output: Path,
    protocols: tuple[str, ...],
    settings: Resampling,
    recipe: Recipe,
    runtime: Runtime,
    combine: str | None,
    reading: str,
    confidence: bool,
    memory: int,
    features: Path | None,
    overwrite: bool,
    score_only: bool,
    plots: bool,
    gallery: int,
    published: bool,
) -> None:
    """Match a data set's annotated keypoints and score them under every protocol that applies.

    NAME is spair, pf-pascal, pf-willow or synthetic; ROOT is its folder. The folder of -o gets predictions.jsonl, which
    a later run continues, results.json, table.md and table.tex, and the pictures asked for.

    \b
    difftap bench pck pf-willow PF-WILLOW -o out/willow
    difftap bench pck spair SPair-71k --recipe dift --model sd21/ -o out/dift
    """
    from difftap.bench.protocols import get_protocols
    from difftap.bench.report import format_results
    from difftap.bench.session import check_run, make_folder, match_selection, write_results
    from difftap.matching import MatchRule

    chosen = get_protocols(protocols)  # a wrong name is said before anything slow starts
    folder = make_folder(output)
    if score_only:
        matching = {"combine": combine, "reading": reading, "confidence": confidence}
        told: dict[str, Any] = {name: value for name, value in matching.items() if was_given(name)}
        for line in check_run(selection, folder, recipe if was_given(*RECIPE_NAMES) else None, told):
            click.echo(line, err=True)
    else:
        match_selection(
            selection,
            recipe,
            folder,
            runtime,
            rule=MatchRule.of(recipe, combine, reading),
            confidence=confidence,
            overwrite=overwrite,
            memory=memory << 20,
            features=features,
            say=lambda text: click.echo(text, err=True),
            bar=progress_bar,
        )
    results = write_results(folder, chosen, settings, show_published=published, plots=plots, gallery=gallery)
    for line in format_results(results, show_published=published):
        click.echo(line)
    click.echo(f"wrote {folder}", err=True)
    if results["counts"]["pairs_failed"] or results["counts"]["pairs_pending"]:
        sys.exit(1)
