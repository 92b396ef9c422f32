"""``difftap index``: retrieval of objects and patches."""

from __future__ import annotations

import contextlib
import functools
import json
import sys
from collections.abc import Callable, Iterable, Iterator
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
from difftap.errors import InputError

if TYPE_CHECKING:
    from difftap.pipeline.environment import Runtime
    from difftap.pipeline.pipeline import Provider
    from difftap.recipe import Recipe
    from difftap.retrieval.builder import IndexOptions
    from difftap.retrieval.index import VectorBatch, VectorOrigin
    from difftap.retrieval.queries import Query, Weights
    from difftap.retrieval.vectors import AlreadyIndexed, Patches

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


def _are_tables(sources: Iterable[Path]) -> bool:
    kinds = {source.suffix.lower() == ".parquet" for source in sources}
    if len(kinds) > 1:
        raise InputError(
            "tables and images cannot be indexed together; give tables of prototypes (.parquet), or images"
        )
    return kinds.pop()


def _for_images(text: str, *names: str) -> Rule:
    """Refuse options that would change nothing where SOURCEs are tables, which bring their own features."""
    return Rule(lambda ctx, name: name if _are_tables(ctx.params["sources"]) else None, text, names)


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
    from difftap.retrieval.retrieve import build_index, check_place, describe
    from difftap.retrieval.vectors import list_images, open_tables, patch_batches

    check_place(where, overwrite)
    failures: list[tuple[str, str]] = []
    if _are_tables(sources):
        origin, batches = open_tables(sources)
        with build_index(where, origin, batches, wanted, overwrite=overwrite, name=name) as made:
            record = describe(made)
    else:
        from difftap.features.provider import open_features
        from difftap.retrieval.index import VectorOrigin

        paths = list_images(sources)
        with (
            open_features(recipe, features, runtime) as pipeline,
            progress_bar(len(paths), "images") as advance,
        ):
            origin = VectorOrigin.of_patches(pipeline.recipe, pipeline.conditions)
            batches = patch_batches(pipeline, paths, which, advance, failures)
            with build_index(where, origin, batches, wanted, overwrite=overwrite, name=name) as made:
                record = describe(made)
            _say_extracted(pipeline, features)
    click.echo(f"{record['rows']} vectors of {record['width']} in {where}: {_kind_line(record)}", err=True)
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
    from difftap.retrieval.retrieve import open_index
    from difftap.retrieval.vectors import AlreadyIndexed

    failures: list[tuple[str, str]] = []
    with open_index(where, name=name) as opened:
        trained = int(opened.about.report.get("recall", {}).get("rows", opened.about.count))
        known = AlreadyIndexed(opened.rows())
        with _vectors(sources, opened.about.origin, which, runtime, weights, features, failures, known) as (
            batches,
            _,
        ):
            added = opened.add(batches)
        count, kind = opened.about.count, opened.about.kind
    click.echo(f"{added} vectors added to {where}: {count} in all", err=True)
    if known.left_out:
        click.echo(f"  {known.left_out} {known.what} were in already and are left out", err=True)
    if kind not in ("flat", "hnsw") and count > 2 * trained:
        click.echo(f"  its lists were made for {trained}: build it again to keep its recall", err=True)
    _end(failures)


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
    from difftap.retrieval.queries import embed, open_pipeline
    from difftap.retrieval.retrieve import SCHEMA, describe, open_index, search_record
    from difftap.retrieval.sheet import draw_sheet

    if sheet is not None:
        check_output(sheet, [one for one in (image, mask) if one is not None])
    make = _query(image, mask, mask_value, point, row)
    with open_index(where, name=name, gpu=gpu) as opened:
        query = make(opened.about.origin)
        if query.vector is None:
            with open_pipeline(
                opened.about.origin,
                runtime,
                features=features,
                weights=weights,
            ) as pipeline:
                vector, conditions = embed(query, opened.about.origin, pipeline), pipeline.conditions
        else:
            vector, conditions = query.vector, {}
        found = search_record(opened, vector, k, key=query.key, other_images=other_images)
        record = {
            "type": "search",
            "schema": SCHEMA,
            **conditions,
            "index": describe(opened),
            "query": dict(query.about),
            **found,
        }
        if sheet is not None:
            picture, missing = draw_sheet(query, found["hits"], found["score"], roots)
            save_picture(picture, sheet)
            if missing:
                click.echo(f"{missing} images of the sheet were not found; name their folder with --images", err=True)
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
    from difftap.retrieval import retrieve

    failures: list[tuple[str, str]] = []
    with (
        retrieve.open_index(where, name=name, gpu=gpu) as opened,
        _vectors(sources, opened.about.origin, which, runtime, weights, features, failures) as (
            batches,
            conditions,
        ),
    ):
        found, looked = retrieve.evaluate(opened, batches, ks=ks or (1, 5, 10), neighbours=neighbours, depth=depth)
        about = retrieve.describe(opened)
    for line in _quality_lines(found, neighbours, looked, about):
        click.echo(line)
    if json_file is not None:
        record = {
            "type": "retrieval",
            "schema": retrieve.SCHEMA,
            **conditions,
            "index": about,
            "settings": {"neighbours": neighbours, "depth": looked, "left_out": "the query's own image"},
            **found.to_dict(),
        }
        write_atomic(json_file, json.dumps(record, indent=1, allow_nan=False) + "\n")
    _end(failures)


@contextlib.contextmanager
def _vectors(
    sources: tuple[Path, ...],
    origin: VectorOrigin,
    which: Patches,
    runtime: Runtime,
    weights: Weights,
    features: str | None,
    failures: list[tuple[str, str]],
    known: AlreadyIndexed | None = None,
) -> Iterator[tuple[Iterable[VectorBatch], dict[str, Any]]]:
    """Open the vectors of some sources, less those that are known, made as an index's were, and the conditions."""
    from difftap.retrieval.queries import open_pipeline
    from difftap.retrieval.vectors import list_images, open_tables, patch_batches

    if _are_tables(sources):
        theirs, batches = open_tables(sources)
        names = ", ".join(f"'{source}'" for source in sources)
        origin.check(theirs, names)
        yield batches if known is None else known.objects(batches), {}
        return
    if origin.source != "patches":
        raise InputError("this index holds prototypes of objects; add a table of prototypes (.parquet), not images")
    paths = list_images(sources)
    if known is not None:
        paths = known.images(paths)
    with (
        open_pipeline(origin, runtime, features=features, weights=weights) as pipeline,
        progress_bar(len(paths), "images") as advance,
    ):
        yield patch_batches(pipeline, paths, which, advance, failures), pipeline.conditions
        _say_extracted(pipeline, features)


def _say_extracted(pipeline: Provider, store: str | None) -> None:
    if pipeline.extracted:
        click.echo(f"  {pipeline.extracted} images were not in {store} and were extracted", err=True)


def _query(
    image: Path | None, mask: Path | None, mask_value: int | None, point: str | None, row: str | None
) -> Callable[[VectorOrigin], Query]:
    """Read what is searched for, read and checked as far as it can be before the index is open."""
    from difftap.images import load_image, read_mask
    from difftap.points import parse_point
    from difftap.retrieval.queries import image_query, mask_query, point_query, row_query

    if row is not None:
        table, _, number = row.rpartition(":")
        if not table or not number.isdecimal():
            raise InputError(f"--row is {row!r}; allowed: TABLE:N, such as voc.parquet:12")
        return lambda origin: row_query(Path(table), int(number), origin)
    if image is None:
        raise InputError("nothing to search for; give an image (with --mask or --point, if a part is meant) or --row")
    loaded = load_image(image)
    if mask is not None:
        made = mask_query(loaded, read_mask(mask, mask_value), mask)
    elif point is not None:
        made = point_query(loaded, *parse_point(point))
    else:
        made = image_query(loaded)
    return lambda origin: made


def _kind_line(record: dict[str, Any]) -> str:
    recall = record["recall"]
    if record["effort"] is None:
        return f"{record['kind']}, {record['metric']}, exact"
    return (
        f"{record['kind']}, {record['metric']}, recall@{recall['at']} {recall['value']:.3f} against exact "
        f"({recall['queries']} held-out queries, effort {record['effort']})"
    )


def _quality_lines(found: Any, neighbours: int, depth: int, about: dict[str, Any]) -> Iterator[str]:
    yield f"{about['rows']} rows, {_kind_line(about)}"
    yield (
        f"{found.queries} queries, their own image left out ({found.skipped} more have nothing of their class in "
        f"another image); {depth} hits looked at"
    )
    heads = [f"R@{k}" for k in found.recall] + ["mAP", f"{neighbours}NN"]
    width = max([len(name) for name in found.by_class] + [len("mean of classes")])
    yield f"{'':<{width}}  {'queries':>7}" + "".join(f"  {head:>6}" for head in heads)

    def line(name: str, count: int | None, one: dict[str, Any]) -> str:
        values = [*one["recall"].values(), one["mean_average_precision"], one["accuracy"]]
        return f"{name:<{width}}  {'' if count is None else count:>7}" + "".join(f"  {100 * v:6.2f}" for v in values)

    overall = {name: getattr(found, name) for name in ("recall", "mean_average_precision", "accuracy")}
    for name, one in found.by_class.items():
        yield line(name, one["queries"], one)
    yield line("mean of queries", found.queries, overall)
    yield line("mean of classes", None, found.class_means)


def _end(failures: list[tuple[str, str]]) -> None:
    for path, why in failures[:10]:
        click.echo(f"  {path} failed: {why}", err=True)
    if failures:
        click.echo(f"{len(failures)} images failed", err=True)
        sys.exit(1)
