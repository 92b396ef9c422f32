"""``difftap bench pck``: point-matching benchmarks scored as their authors defined them."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from difftap.commands.options import Grouped, build_recipe, recipe_options, runtime_options, take_runtime
from difftap.commands.progress import progress_bar

if TYPE_CHECKING:
    from difftap.bench.session import Selection
    from difftap.features.provider import FeatureSource
    from difftap.pipeline.pipeline import Pipeline
    from difftap.recipe import Recipe

__all__ = ["pck"]

_FILE = click.Path(path_type=Path)


@click.command(
    cls=Grouped,
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
@click.option(
    "--combine",
    metavar="KIND",
    help="Of several branches: concat, score-sum or score-product.  [default: the recipe's]",
)
@click.option(
    "--reading", default="centres", show_default=True, help="Pixels to cells: centres, or corners (SD4Match's rule)."
)
@click.option(
    "--confidence/--no-confidence", default=True, show_default=True, help="Also margin and cycle error; matching x 2."
)
@click.option(
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
@click.option(
    "--score-only",
    is_flag=True,
    help="Score the predictions that are there, if they are the ones asked for; no model is opened.",
)
@click.option("--plots", is_flag=True, help="Draw PCK over alpha, per class and by flag.")
@click.option(
    "--gallery", type=click.IntRange(0), default=0, metavar="N", help="Draw the N best, median and worst pairs."
)
@click.option("--published/--no-published", default=True, show_default=True, help="Show published figures beside ours.")
@recipe_options
@runtime_options
def pck(
    dataset: str,
    root: Path,
    output: Path,
    split: str | None,
    layout: str | None,
    listing: str | None,
    flip: str | None,
    allow_missing: bool,
    limit: int | None,
    per_class: int | None,
    part: str | None,
    protocols: tuple[str, ...],
    alphas: tuple[float, ...],
    draws: int,
    overwrite: bool,
    score_only: bool,
    plots: bool,
    gallery: int,
    published: bool,
    **options: Any,
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
    from difftap.bench.scoring import Resampling
    from difftap.bench.session import Selection, make_folder, write_results

    chosen = get_protocols(protocols)  # a wrong name is said before anything slow starts
    settings = Resampling(draws=draws, alphas=_checked(alphas))
    folder = make_folder(output)
    given = {"split": split, "layout": layout, "pairs": listing, "flip": flip}
    extra = {name: value for name, value in given.items() if value is not None}
    selection = Selection(dataset, root, extra, allow_missing, limit, per_class, part)
    if score_only:
        _verify(selection, folder, overwrite, options)
    else:
        _predict(selection, folder, overwrite, options)
    results = write_results(folder, chosen, settings, show_published=published, plots=plots, gallery=gallery)
    for line in format_results(results, show_published=published):
        click.echo(line)
    click.echo(f"wrote {folder}", err=True)
    if results["counts"]["pairs_failed"] or results["counts"]["pairs_pending"]:
        sys.exit(1)


def _verify(chosen: Selection, folder: Path, overwrite: bool, options: dict[str, Any]) -> None:
    """Make sure that the predictions there are the ones asked for."""
    from difftap.bench.session import check_run
    from difftap.errors import InputError

    typed = click.core.ParameterSource.COMMANDLINE
    context = click.get_current_context()
    told = {name for name in options if context.get_parameter_source(name) == typed}
    useless = told & {"features", "revision", "random_weights"} | ({"overwrite"} if overwrite else set())
    if useless:
        raise InputError(f"--{min(useless).replace('_', '-')} has no say with --score-only; leave one of the two out")
    matching: dict[str, Any] = {name: options[name] for name in ("combine", "reading", "confidence") if name in told}
    fields = {name: options[name] for name in inspect.signature(build_recipe).parameters}
    recipe = build_recipe(**fields) if told & set(fields) else None
    for line in check_run(chosen, folder, recipe, matching):
        click.echo(line, err=True)


def _checked(alphas: tuple[float, ...]) -> tuple[float, ...]:
    from difftap.errors import InputError

    for alpha in alphas:
        if not 0 < alpha <= 10:
            raise InputError(f"--alpha is {alpha}; allowed: a share above 0, up to 10, such as 0.1")
    return alphas


def _predict(chosen: Selection, folder: Path, overwrite: bool, options: dict[str, Any]) -> None:
    """Fill the file of predictions."""
    from difftap.bench.session import clear_pictures, load_pairs, match_pairs
    from difftap.errors import InputError
    from difftap.matching import Joining
    from difftap.pipeline.pipeline import Pipeline as Opened
    from difftap.prompts import wants_category

    runtime = take_runtime(options)
    opening = {name: options.pop(name) for name in ("revision", "random_weights")}
    combining, reading, confidence, memory, features = (
        options.pop(name) for name in ("combine", "reading", "confidence", "memory", "features")
    )
    recipe = build_recipe(**options)
    joining = Joining.of(recipe, combining, reading)
    if overwrite:
        clear_pictures(folder)
    stored = features is not None and (features / "zarr.json").is_file()  # a store that 'difftap extract' wrote
    if stored and wants_category(recipe.branches):
        raise InputError(
            f"the recipe prompts by category, and the store '{features}' holds one map an image, which is of none: it "
            "would never be used; extract with --prompt '' and give the same here, or name a folder to keep features in"
        )
    pairs = load_pairs(chosen, folder / "targets")
    sources: list[FeatureSource] = []

    def opener(filled: Recipe) -> Pipeline:
        if stored:
            from difftap.features.provider import FeatureSource

            sources.append(FeatureSource.open(filled, features, runtime, **opening))
            return sources[-1]
        return Opened.open(filled, runtime, **opening)

    passes = pairs.passes(recipe)
    click.echo(
        f"{len(pairs.samples)} pairs, {passes} passes of an image through a branch, less what is there", err=True
    )
    with progress_bar(len(pairs.samples)) as advance:
        run = match_pairs(
            pairs,
            recipe,
            folder,
            opener,
            joining=joining,
            confidence=confidence,
            overwrite=overwrite,
            memory=memory << 20,
            batch=runtime.batch,
            features=None if stored else features,
            progress=advance,
        )
    earlier = f", {run.skipped} already there" if run.skipped else ""
    click.echo(f"{run.written} pairs in {run.seconds:.1f} s{earlier}, {run.failed} failed", err=True)
    for source in sources:
        click.echo(
            f"features of {source.served} images from '{features}', of {source.extracted} extracted, not being in it",
            err=True,
        )
