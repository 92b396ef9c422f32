"""``difftap index``: retrieval of objects and patches."""

from __future__ import annotations

import contextlib
import functools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from difftap.commands.options import (
    RECIPE_NAMES,
    Command,
    Rule,
    excludes,
    feature_options,
    gives,
    needs,
    option,
    recipe_option,
    reference_to,
    runtime_options,
    stack,
    store_option,
)
from difftap.commands.progress import progress_bar

if TYPE_CHECKING:
    from difftap.pipeline.environment import Runtime
    from difftap.recipe import Recipe
    from difftap.retrieval.builder import IndexOptions
    from difftap.retrieval.quality import Quality
    from difftap.retrieval.queries import Weights
    from difftap.retrieval.vectors import Patches

__all__ = ["index"]

_FILE = click.Path(path_type=Path)
_WHERE = click.option(
    "--index",
    "where",
    required=True,
    metavar="PLACE",
    help="A folder (FAISS), a milvus-lite file (.db), or http://HOST:19530 (Milvus).",
)
_NAME = click.option("--name", default="difftap", show_default=True, help="Of the index, in Milvus.")
_GPU = click.option("--gpu", is_flag=True, help="Let FAISS use the GPU (needs faiss-gpu).")
_LABELS = click.option(
    "--labels",
    type=click.Choice(["folder", "none"]),
    default="none",
    show_default=True,
    help="Images: class of an image's patches: its folder's name, or none.",
)
_PER_IMAGE = click.option(
    "--per-image", type=click.IntRange(1), metavar="N", help="Images: N cells of each, drawn at random.  [default: all]"
)


def _weights(revision: str | None, random_weights: int | None) -> Weights:
    """Say how the index's model is to be had, where it was not a plain folder or preset."""
    return functools.partial(reference_to, None, revision, random_weights)


_weights_options = stack(
    [
        recipe_option("--revision", metavar="REV", help="Branch, tag or commit of a hub id."),
        recipe_option(
            "--random-weights", type=int, metavar="SEED", help="The model was built with seeded random weights."
        ),
        gives("weights", _weights),
    ]
)
_SOURCES = click.argument("sources", metavar="SOURCE...", type=_FILE, nargs=-1, required=True)


def _options(
    kind: str,
    metric: str,
    lists: int | None,
    codes: int | None,
    refine: bool,
    recall: float,
    seed: int | None,
    gpu: bool,
) -> IndexOptions:
    from difftap.retrieval.builder import IndexOptions

    return IndexOptions(kind, metric, lists, codes, refine, recall, seed or 0, gpu)


def _patches(per_image: int | None, labels: str, seed: int | None = None) -> Patches:
    from difftap.retrieval.vectors import Patches

    return Patches(per_image, labels, seed or 0)


def _for_images(text: str, *names: str) -> Rule:
    """Refuse options that would change nothing where SOURCEs are tables, which bring their own features."""

    def offends(ctx: click.Context, name: str) -> str | None:
        from difftap.retrieval.vectors import are_tables

        return name if are_tables(ctx.params["sources"]) else None

    return Rule(offends, text, names)


_BUILT_OF_IMAGES = _for_images(
    "{} is for images; a table of prototypes brings its own recipe, so leave it out",
    *(name for name in RECIPE_NAMES if name != "seed"),  # the seed is the index's too
    *("revision", "random_weights", "features", "per_image", "labels"),
)
_OF_IMAGES = _for_images(
    "--per-image, --labels and --features are for images; leave them out", "per_image", "labels", "features"
)


@click.group()
def index() -> None:
    """Build, extend, search and judge an index of prototypes or of patch features.

    \b
    difftap prototypes build voc VOCdevkit -o voc.parquet
    difftap index build voc.parquet --index voc.index
    difftap index search photo.jpg --mask dog.png --index voc.index --sheet hits.png
    """


@index.command(
    cls=Command,
    rules=(_BUILT_OF_IMAGES,),
    epilog="Exit codes: 0 done; 1 done, but some images failed; 2 bad input, nothing written.",
)
@_SOURCES
@_WHERE
@_NAME
@click.option(
    "--kind",
    type=click.Choice(["auto", "flat", "ivf", "ivf-pq", "hnsw"]),
    default="auto",
    show_default=True,
    help="auto: exact up to 256 MB of vectors, ivf up to 2 GB, ivf-pq beyond.",
)
@click.option(
    "--metric",
    default="correlation",
    show_default=True,
    help="correlation, cosine, euclidean or manhattan (flat alone).",
)
@click.option(
    "--recall",
    type=float,
    default=0.95,
    show_default=True,
    metavar="R",
    help="Search as far as this recall@10 takes, where it can be reached.",
)
@click.option("--lists", type=click.IntRange(1), metavar="N", help="ivf, ivf-pq: lists.  [default: about sqrt(rows)]")
@click.option("--codes", type=click.IntRange(1), metavar="B", help="ivf-pq: bytes of a code.  [default: width / 8]")
@click.option("--refine", is_flag=True, help="ivf-pq: keep 8-bit vectors too, and rank the best by them (auto does).")
@_PER_IMAGE
@_LABELS
@_GPU
@click.option("--overwrite", is_flag=True, help="Replace an index that stands there, once the new one is whole.")
@gives("wanted", _options)
@gives("which", _patches)
@store_option
@feature_options("pocket; dift with --model")
@runtime_options
def build(
    sources: tuple[Path, ...],
    where: str,
    name: str,
    wanted: IndexOptions,
    which: Patches,
    recipe: Recipe,
    runtime: Runtime,
    overwrite: bool,
    features: str | None,
) -> None:
    """Index SOURCEs: tables of prototypes (.parquet), or images and folders of images for their patch features.

    A table brings its own recipe; for images the recipe options say how features are made. Both are stored with the
    index: queries are made the same way, and vectors of another recipe or model are refused.
    """
    from difftap.retrieval.retrieve import index_sources

    record, failures = index_sources(
        where,
        sources,
        wanted,
        which,
        recipe,
        runtime,
        features=features,
        overwrite=overwrite,
        name=name,
        bar=_bar,
        say=_say,
    )
    _say(f"{record['rows']} vectors of {record['width']} in {where}: {_kind_line(record)}")
    _end(failures)


@index.command(
    cls=Command,
    rules=(_OF_IMAGES,),
    epilog="Exit codes: 0 done; 1 done, but some images failed; 2 bad input, nothing changed.",
)
@_SOURCES
@_WHERE
@_NAME
@_PER_IMAGE
@_LABELS
@gives("which", _patches)
@store_option
@_weights_options
@runtime_options
def add(
    sources: tuple[Path, ...],
    where: str,
    name: str,
    which: Patches,
    features: str | None,
    weights: Weights,
    runtime: Runtime,
) -> None:
    """Add SOURCEs to an index: all of them or, if it is interrupted, none.

    What is in already is left out and counted, so the same command may be given again.
    """
    from difftap.retrieval.retrieve import add_sources

    _end(add_sources(where, sources, which, runtime, weights=weights, features=features, name=name, bar=_bar, say=_say))


@index.command(cls=Command)
@click.argument("image", type=_FILE, required=False)
@_WHERE
@_NAME
@click.option("--mask", type=_FILE, metavar="FILE", help="The object: a mask PNG as large as the image.")
@option(
    "--mask-value",
    type=click.IntRange(0),
    metavar="V",
    help="The mask's value that means the object.",
    rules=(needs("mask", "--mask-value goes with --mask"),),
)
@option(
    "--point",
    metavar="X,Y",
    help="The place, in pixels of the image.",
    rules=(excludes("--mask and --point exclude each other; give one", "mask"),),
)
@option(
    "--row",
    metavar="TABLE:N",
    help="Row N, from 0, of a table of prototypes, in place of an image.",
    rules=(
        excludes("--row takes the place of an image; leave IMAGE, --mask and --point out", "image", "mask", "point"),
        excludes("--features is for images; a table's row brings its own vector, so leave it out", "features"),
    ),
)
@click.option("-k", "k", type=click.IntRange(1), default=10, show_default=True, help="Hits.")
@click.option("--other-images", is_flag=True, help="Leave out hits in the query's own image.")
@click.option("--sheet", type=_FILE, metavar="FILE", help="Contact sheet of the hits (.png, .jpg, .webp).")
@option(
    "--images",
    "roots",
    type=_FILE,
    multiple=True,
    metavar="DIR",
    help="Where the sheet finds images (repeatable).",
    rules=(needs("sheet", "--images is for the contact sheet; give --sheet too"),),
)
@_GPU
@store_option
@_weights_options
@runtime_options
def search(
    image: Path | None,
    where: str,
    name: str,
    mask: Path | None,
    mask_value: int | None,
    point: str | None,
    row: str | None,
    k: int,
    other_images: bool,
    sheet: Path | None,
    roots: tuple[Path, ...],
    gpu: bool,
    features: str | None,
    weights: Weights,
    runtime: Runtime,
) -> None:
    """Find what is nearest to IMAGE, to the object under --mask, to the place at --point, or to a table's row.

    Prints JSON: the hits with class, image, position and score, and what the score means. The query's vector is made
    with the index's own recipe.

    \b
    difftap index search photo.jpg --mask dog.png --index voc.index --sheet hits.png --images VOC2012/JPEGImages
    difftap index search photo.jpg --point 120,80 --index patches.index
    difftap index search --row voc.parquet:12 --other-images --index voc.index
    """
    from difftap.pages.draw import check_output, save_picture
    from difftap.retrieval.queries import read_query
    from difftap.retrieval.retrieve import search_index
    from difftap.retrieval.sheet import draw_sheet

    if sheet is not None:
        check_output(sheet, [one for one in (image, mask) if one is not None])
    make = read_query(image, mask=mask, mask_value=mask_value, point=point, row=row)
    query, record = search_index(
        where,
        make,
        k,
        runtime,
        weights=weights,
        features=features,
        other_images=other_images,
        name=name,
        gpu=gpu,
    )
    if sheet is not None:
        picture, missing = draw_sheet(query, record["hits"], record["score"], roots)
        save_picture(picture, sheet)
        if missing:
            _say(f"{missing} images of the sheet were not found; name their folder with --images")
    click.echo(json.dumps(record, indent=1, allow_nan=False))


@index.command(name="eval", cls=Command, rules=(_OF_IMAGES,))
@_SOURCES
@_WHERE
@_NAME
@click.option("-k", "ks", type=click.IntRange(1), multiple=True, help="Of recall@k (repeatable).  [default: 1, 5, 10]")
@click.option("--neighbours", type=click.IntRange(1), default=5, show_default=True, help="Hits that vote for a class.")
@click.option("--depth", type=click.IntRange(1), metavar="N", help="Hits looked at.  [default: all, at most 10,000]")
@_PER_IMAGE
@_LABELS
@click.option("--json", "json_file", type=_FILE, metavar="FILE", help="Write the figures as JSON too.")
@_GPU
@gives("which", _patches)
@store_option
@_weights_options
@runtime_options
def evaluate(
    sources: tuple[Path, ...],
    where: str,
    name: str,
    ks: tuple[int, ...],
    neighbours: int,
    depth: int | None,
    which: Patches,
    json_file: Path | None,
    gpu: bool,
    features: str | None,
    weights: Weights,
    runtime: Runtime,
) -> None:
    """Search for every vector of SOURCEs, their own images left out: recall@k, mAP and kNN accuracy, by class.

    \b
    difftap index eval voc.parquet --index voc.index
    """
    from difftap.artifacts.files import write_atomic
    from difftap.retrieval.retrieve import judge_sources

    found, record, failures = judge_sources(
        where,
        sources,
        which,
        runtime,
        weights=weights,
        features=features,
        ks=ks or (1, 5, 10),
        neighbours=neighbours,
        depth=depth,
        name=name,
        gpu=gpu,
        bar=_bar,
        say=_say,
    )
    for line in _quality_lines(found, record):
        click.echo(line)
    if json_file is not None:
        write_atomic(json_file, json.dumps(record, indent=1, allow_nan=False) + "\n")
    _end(failures)


def _bar(count: int) -> contextlib.AbstractContextManager[Callable[[int], None]]:
    return progress_bar(count, "images")


def _say(text: str) -> None:
    click.echo(text, err=True)


def _kind_line(record: dict[str, Any]) -> str:
    recall = record["recall"]
    if record["effort"] is None:
        return f"{record['kind']}, {record['metric']}, exact"
    return (
        f"{record['kind']}, {record['metric']}, recall@{recall['at']} {recall['value']:.3f} against exact "
        f"({recall['queries']} held-out queries, effort {record['effort']})"
    )


def _quality_lines(found: Quality, record: dict[str, Any]) -> Iterator[str]:
    from difftap.artifacts.table import Table, TableColumn

    about, settings = record["index"], record["settings"]
    yield f"{about['rows']} rows, {_kind_line(about)}"
    yield (
        f"{found.queries} queries, their own image left out ({found.skipped} more have nothing of their class in "
        f"another image); {settings['depth']} hits looked at"
    )
    heads = [f"R@{k}" for k in found.recall] + ["mAP", f"{settings['neighbours']}NN"]
    columns = [TableColumn("", left=True), TableColumn("queries")]
    columns += [TableColumn(head, "%", ".2f", unit_shown=False) for head in heads]

    def row(name: str, count: int | None, one: dict[str, Any]) -> tuple[str | float | None, ...]:
        return (
            name,
            "" if count is None else count,
            *one["recall"].values(),
            one["mean_average_precision"],
            one["accuracy"],
        )

    overall = {name: getattr(found, name) for name in ("recall", "mean_average_precision", "accuracy")}
    rows = [row(name, one["queries"], one) for name, one in found.by_class.items()]
    rows += [row("mean of queries", found.queries, overall), row("mean of classes", None, found.class_means)]
    yield from Table(tuple(columns), tuple(rows)).text()


def _end(failures: list[tuple[str, str]]) -> None:
    for path, why in failures[:10]:
        _say(f"  {path} failed: {why}")
    if failures:
        _say(f"{len(failures)} images failed")
        sys.exit(1)
