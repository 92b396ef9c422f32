"""``difftap match``: corresponding points in two images, or in many pairs."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from difftap.commands.options import (
    Command,
    category_option,
    excludes,
    gives,
    needs,
    one_of,
    option,
    recipe_options,
    runtime_option,
    runtime_options,
    store_option,
    with_category,
)
from difftap.commands.progress import progress_bar
from difftap.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from difftap.features.pairs import PairMatching
    from difftap.matching.matches import Threshold
    from difftap.pipeline.environment import Runtime
    from difftap.pipeline.pipeline import Provider
    from difftap.recipe import Recipe

_FILE = click.Path(path_type=Path)


@click.command(
    cls=Command,
    epilog="Exit codes: 0 done; 1 done, but some pairs of the list failed; 2 bad input, nothing done.",
    rules=(
        one_of("{} exclude each other; give one way to choose points", "point_texts", "points_file", "grid", "mutual"),
    ),
)
@click.argument("source", type=_FILE, required=False)
@click.argument("target", type=_FILE, required=False)
@click.option(
    "--point", "point_texts", multiple=True, metavar="X,Y", help="Point of the source image, in pixels (repeatable)."
)
@click.option("--points", "points_file", type=_FILE, metavar="FILE", help="Points from a CSV (x,y) or JSON file.")
@click.option(
    "--grid", type=int, metavar="N", help="N x N points over the source image.  [default: 5, if no points are given]"
)
@click.option("--mutual", is_flag=True, help="Find the points too: cells that are each other's nearest.")
@option(
    "--pairs",
    "pairs_file",
    type=_FILE,
    metavar="FILE",
    help="Match many pairs: a CSV of source,target[,points].",
    rules=(
        excludes(
            "--pairs takes images and points from its list; leave SOURCE, TARGET, --point, --points and --heat out",
            *("source", "target", "point_texts", "points_file", "heat"),
        ),
        needs("output", "--pairs needs -o FILE, the JSON lines to write"),
    ),
)
@click.option(
    "-o", "--output", type=_FILE, metavar="FILE", help="Picture (.png, .jpg, .webp); with --pairs, the JSON lines."
)
@option(
    "--heat",
    type=int,
    metavar="K",
    help="Show point K's heat map in the picture (1 is the first).",
    rules=(needs("output", "--heat draws into the picture; give -o FILE too"),),
)
@click.option("--min-score", type=float, metavar="S", help="Leave out matches with a lower cosine.")
@click.option(
    "--min-margin", type=float, metavar="M", help="Leave out matches whose lead over the best other place is smaller."
)
@click.option(
    "--max-cycle-error",
    type=float,
    metavar="PX",
    help="Leave out matches that lead back farther than this from their point.",
)
@option(
    "--overwrite",
    is_flag=True,
    help="With --pairs: start afresh instead of resuming FILE.",
    rules=(needs("pairs_file", "--overwrite goes with --pairs; a picture is always replaced"),),
)
@runtime_option(
    "--memory",
    type=click.IntRange(min=1),
    default=2048,
    show_default=True,
    metavar="MB",
    help="With --pairs: features kept in memory.",
    rules=(needs("pairs_file", "--memory goes with --pairs; two images take what they take"),),
)
@gives("threshold", "difftap.matching.matches:Threshold", "min_score", "min_margin", "max_cycle_error")
@store_option
@recipe_options
@category_option
@runtime_options
def match(
    source: Path | None,
    target: Path | None,
    point_texts: tuple[str, ...],
    points_file: Path | None,
    grid: int | None,
    mutual: bool,
    pairs_file: Path | None,
    output: Path | None,
    heat: int | None,
    threshold: Threshold,
    overwrite: bool,
    memory: int,
    features: str | None,
    category: str | None,
    recipe: Recipe,
    runtime: Runtime,
) -> None:
    """Find the points of TARGET that correspond to points of SOURCE.

    Prints JSON: each point's place in the target, its cosine score, its margin (lead over the best other place) and its
    cycle error (distance from the point to where its match leads back, in source pixels).

    \b
    difftap match cat1.jpg cat2.jpg --point 120,80 -o out.png
    difftap match cat1.jpg cat2.jpg --mutual --min-margin 0.05
    difftap match --pairs pairs.csv -o matches.jsonl
    """
    from difftap.features.pairs import PairMatching

    note = _empty_prompt(recipe) if category is None else ""
    recipe = with_category(recipe, category)
    matching = PairMatching(
        threshold, mutual, 5 if grid is None else grid, category if recipe.learned is not None else None
    )
    matching.rule(recipe)  # what is wrong with the request is said before anything slow starts

    def opened() -> Provider:
        from difftap.features.provider import open_features

        return open_features(recipe, features, runtime)

    if pairs_file is not None and output is not None:  # --pairs asks for -o
        _match_list(opened, note, matching, pairs_file, output, overwrite, memory << 20)
        return
    if source is None or target is None:
        raise InputError("two images are needed: difftap match SOURCE TARGET; or --pairs FILE for many")
    _match_two(opened, note, matching, (source, target), _read_points(point_texts, points_file), output, heat)


def _empty_prompt(recipe: Recipe) -> str:
    """Say what to say of a prompt that asks for a category when none is given."""
    from difftap.prompts import wants_category

    asked = [] if recipe.learned else [b.prompt for b in recipe.branches if wants_category([b])]
    return f"the recipe's prompt is '{asked[0]}': it stays empty without --category WORD" if asked else ""


def _read_points(texts: tuple[str, ...], file: Path | None) -> NDArray[np.float64] | None:
    import numpy as np

    from difftap.points import load_points, parse_point

    if file is not None:
        return load_points(file)
    return np.array([parse_point(text) for text in texts]) if texts else None


def _match_two(
    opened: Callable[[], Provider],
    note: str,
    matching: PairMatching,
    paths: tuple[Path, Path],
    given: NDArray[np.float64] | None,
    output: Path | None,
    heat: int | None,
) -> None:
    """Match two images: JSON to stdout, and a picture."""
    from difftap.features.pairs import match_images
    from difftap.images import load_image
    from difftap.matching.matches import SCHEMA, image_record, match_records
    from difftap.pages.draw import check_output, draw_matches, save_picture

    # What is wrong with the input is said before anything slow starts.
    if output is not None:
        check_output(output, paths)
    source, target = (load_image(path) for path in paths)
    points = matching.points(source.size, given)
    if heat is not None and (heat < 1 or (points is not None and heat > len(points))):
        raise InputError(f"--heat is {heat}; allowed: 1 to {'the number of' if points is None else len(points)} points")
    with opened() as pipeline:
        matching.check(pipeline)
        _remark(note)
        pair = match_images(pipeline, source, target, matching, given)
    if output is not None:
        shown = None if heat is None else pair.heat(heat)
        save_picture(draw_matches(source, target, pair.kept, shown), output)
    record = {
        "type": "match",
        "schema": SCHEMA,
        **pipeline.conditions,
        "settings": matching.to_dict(),
        "source": image_record(source),
        "target": image_record(target),
        "matches": match_records(pair.kept),
    }
    click.echo(json.dumps(record, indent=1, allow_nan=False))


def _remark(note: str) -> None:
    if note:
        click.echo(note, err=True)


def _match_list(
    opened: Callable[[], Provider],
    note: str,
    matching: PairMatching,
    pairs_file: Path,
    output: Path,
    overwrite: bool,
    memory: int,
) -> None:
    """Match a list of pairs into JSON lines."""
    from difftap.features.pairs import load_pairs, run_pairs

    pairs = load_pairs(pairs_file)
    with opened() as pipeline:
        matching.check(pipeline)
        _remark(note)
        with progress_bar(len(pairs)) as advance:
            run = run_pairs(pipeline, pairs, output, matching, overwrite=overwrite, memory=memory, progress=advance)
    earlier = f", {run.skipped} already there" if run.skipped else ""
    click.echo(f"{run.written} pairs written to {output}{earlier}; {run.failed} failed in all", err=True)
    for line in run.reasons:
        click.echo(f"  {line}", err=True)
    if run.failed > len(run.reasons):
        click.echo("  (every failure is in its pair's place in the file; --overwrite tries them again)", err=True)
    if run.failed:
        sys.exit(1)
