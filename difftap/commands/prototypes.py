"""``difftap prototypes``: object prototypes, built and looked at."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from difftap.commands.options import (
    Command,
    build_recipe,
    excludes,
    feature_options,
    gives,
    option,
    runtime_options,
    stack,
    store_option,
)
from difftap.commands.progress import progress_bar
from difftap.errors import InputError

if TYPE_CHECKING:
    from difftap.pipeline.environment import Runtime
    from difftap.prototypes import PrototypeTable, SceneSource
    from difftap.recipe import Recipe

__all__ = ["STUDY_DEFAULT", "object_options", "prototypes", "semantic_recipe"]

_FILE = click.Path(path_type=Path)
STUDY_DEFAULT = "pocket-semantics; semantics with --model"


object_options = stack(
    [
        option(
            "--list",
            "listing",
            type=_FILE,
            metavar="FILE",
            help="Only the images or clips it names.",
            rules=(excludes("--list and --split both say which images; give one of them", "split"),),
        ),
        click.option("--classes", metavar="A,B", help="Only these classes, or voc: VOC's 20.  [default: all]"),
        click.option(
            "--min-area", type=float, default=0.01, show_default=True, metavar="F", help="Fraction of the image."
        ),
        click.option(
            "--crowds", default="exclude", show_default=True, metavar="HOW", help="COCO's: exclude or include."
        ),
        click.option("--allow-missing", is_flag=True, help="Leave out listed images that are missing, and say so."),
        click.option("--rule", default="area", show_default=True, help="Mask to cells: area or nearest."),
    ]
)
"""Which objects are wanted."""


def _open(
    dataset: str,
    root: Path,
    split: str | None,
    listing: Path | None,
    classes: str | None,
    min_area: float,
    crowds: str,
    allow_missing: bool,
) -> SceneSource:
    from difftap.datasets.chosen_objects import open_objects

    return open_objects(dataset, root, split, listing, classes, min_area, crowds, allow_missing)


def semantic_recipe(**options: Any) -> Recipe:
    """Build the recipe with the study's as default: ``semantics`` with a model, else ``pocket-semantics``."""
    default = "pocket-semantics" if options["model"] in (None, "pocket") else "semantics"
    return build_recipe(**{**options, "recipe_name": options["recipe_name"] or default})


@click.group()
def prototypes() -> None:
    """Build and look at object prototypes: a vector an object, the mean of a tap's map over its mask."""


@prototypes.command(
    cls=Command, epilog="Exit codes: 0 done; 1 done, but some images failed; 2 bad input, nothing written."
)
@click.argument("dataset", metavar="NAME")
@click.argument("root", type=_FILE)
@click.option("-o", "--output", type=_FILE, required=True, metavar="FILE", help="The Parquet file.")
@click.option("--split", metavar="SPLIT", help="The data set's own name of it.  [default: the first that is there]")
@object_options
@click.option("--overwrite", is_flag=True, help="Start afresh instead of resuming.")
@store_option
@gives("source", _open)
@feature_options(STUDY_DEFAULT, make=semantic_recipe)
@runtime_options
def build(
    source: SceneSource,
    output: Path,
    recipe: Recipe,
    runtime: Runtime,
    rule: str,
    overwrite: bool,
    features: str | None,
) -> None:
    """Build the prototypes of a data set's objects.

    NAME is voc, coco, davis or folder (images/ and masks/ of your own); ROOT is its folder. The prototype is the mean
    of the recipe's taps over the cells of the object's mask; several taps are interpolated to the largest grid and
    concatenated. A run that was stopped goes on where it was.

    \b
    difftap prototypes build voc VOCdevkit -o voc.parquet
    difftap prototypes build folder mine --recipe semantics --tap up1 --timestep 50 -o mine.parquet
    """
    from difftap.features.provider import open_features
    from difftap.prototypes import RULES, is_built, recipe_column
    from difftap.prototypes import build as run

    if rule not in RULES:
        raise InputError(f"--rule is {rule!r}; allowed: {', '.join(RULES)}")
    column = recipe_column(output, recipe)
    with open_features(column.recipe, features, runtime) as pipeline:
        if not overwrite and is_built(source, column, rule, pipeline.conditions):
            click.echo(f"'{output}' is there already, built under these conditions", err=True)
            return
        with progress_bar(len(source), "images") as advance:
            built = run(source, pipeline, [column], rule=rule, progress=advance, overwrite=overwrite)
        if pipeline.not_in_store:
            click.echo(f"  {pipeline.not_in_store} images were not in {features} and were extracted", err=True)
    earlier = f" ({built.resumed} images by an earlier run)" if built.resumed else ""
    click.echo(f"{built.rows} prototypes of {built.images} images written to {output}{earlier}", err=True)
    if built.small[0]:
        click.echo(f"  {built.small[0]} objects are too small for the rule and kept by their largest cell", err=True)
    for line in source.unused:
        click.echo(f"  not used: {line}", err=True)
    if built.empty:
        click.echo(f"  {built.empty} images have no object that is wanted", err=True)
    for reason, count in built.left_out.items():
        click.echo(f"  {count} objects left out: {reason}", err=True)
    for key, why in built.failures[:10]:
        click.echo(f"  {key} failed: {why}", err=True)
    if len(built.failures) > 10:
        click.echo(f"  ... and {len(built.failures) - 10} more failed; the file's provenance names them", err=True)
    if built.failures:
        sys.exit(1)


@prototypes.command()
@click.argument("file", type=_FILE)
@click.option("--json", "as_json", is_flag=True, help="Print counts and provenance as JSON.")
def info(file: Path, as_json: bool) -> None:
    """Say what a table of prototypes holds and how it was made."""
    from difftap.prototypes import PrototypeTable

    table = PrototypeTable.load(file)
    if as_json:
        click.echo(json.dumps({**_counts(table), "provenance": dict(table.provenance)}, indent=1))
        return
    for line in _describe(table):
        click.echo(line)


def _counts(table: PrototypeTable) -> dict[str, Any]:
    return {
        "prototypes": len(table),
        "width": table.width,
        "images": len(set(table.images.tolist())),
        "instances": len(set(table.instances.tolist())),
        "taps": sorted(set(table.taps.tolist())),
        "timesteps": sorted(set(table.timesteps.tolist())),
        "kept_by_largest_cell": int(table.small.sum()),
        "classes": dict(sorted(Counter(table.classes.tolist()).items())),
    }


def _describe(table: PrototypeTable) -> list[str]:
    from difftap.artifacts.table import Table

    counts, made = _counts(table), table.provenance
    conditions = made.get("conditions", {})
    recipe, data = conditions.get("recipe", {}), made.get("data", {})
    lines = [
        f"{counts['prototypes']} prototypes of {counts['width']} channels; {counts['images']} images, "
        f"{counts['instances']} instances",
        f"tap {', '.join(counts['taps'])} at t = {', '.join(map(str, counts['timesteps']))}; rule {made.get('rule')}; "
        f"{counts['kept_by_largest_cell']} objects kept by their largest cell alone",
    ]
    if len(table):
        lines.append(
            f"area {100 * float(table.areas.min()):.2g} to {100 * float(table.areas.max()):.2g} % of the image; mean "
            f"coverage of the kept cells {100 * float(table.coverages.mean()):.0f} %; {int(table.cells.min())} to "
            f"{int(table.cells.max())} cells an object"
        )
    size = "x".join(map(str, recipe.get("size", ())))
    lines.append(
        f"data {data.get('name')} {data.get('split')}; model {conditions.get('model', {}).get('name')} "
        f"({made.get('model_key')}), {size}, ensemble {recipe.get('ensemble')}, seed {recipe.get('seed')}; "
        f"backend {conditions.get('backend', {}).get('name')}; difftap {made.get('difftap')}"
    )
    lines.append(f"recipe key {made.get('recipe_key')}, feature key {made.get('feature_key')}")
    for reason, count in made.get("counts", {}).get("left_out", {}).items():
        lines.append(f"left out: {count} objects, {reason}")
    classes = [(name, f"{count:,}") for name, count in counts["classes"].items()]
    return lines + [f"  {line}" for line in Table.of(("", ""), classes).text(heads=False)]
