"""``difftap extract``: a data set's features into a store."""

from __future__ import annotations

import dataclasses
import sys
from typing import TYPE_CHECKING

import click

from difftap.commands.options import (
    Command,
    category_option,
    feature_options,
    gives,
    needs,
    option,
    runtime_options,
    with_category,
)
from difftap.commands.progress import progress_bar
from difftap.errors import InputError, require

if TYPE_CHECKING:
    from difftap.features.extract.extraction import ExtractionSummary, ExtractSettings
    from difftap.features.store import Encoding
    from difftap.pipeline.environment import Runtime
    from difftap.recipe import Recipe


def _settings(
    encoding: Encoding,
    decoders: int | None,
    commit_every: float,
    pca_sample: int,
    strict: bool,
    retry_failed: bool,
    overwrite: bool,
) -> ExtractSettings:
    from difftap.features.extract import ExtractSettings, default_workers

    return ExtractSettings(
        encoding, decoders or default_workers(), commit_every, pca_sample, strict, retry_failed, overwrite
    )


@click.command(
    cls=Command,
    epilog="Exit codes: 0 done; 1 done, but some images could not be used; 2 bad input or a failure: what was "
    "finished before it is safe, and the same command goes on.",
)
@click.argument("source")
@click.option("-o", "--output", required=True, metavar="STORE", help="The store: a folder, or an fsspec address.")
@click.option("--column", metavar="NAME", help="Column with the images, of a table.  [default: the first that fits]")
@click.option("--limit", type=click.IntRange(1), metavar="N", help="The first N images only.")
@click.option("--fit", metavar="KIND", help="stretch, or letterbox (aspect kept).  [default: the recipe's]")
@click.option("--dtype", default="float16", show_default=True, help="float16, float32 or int8.")
@option(
    "--scale",
    default="channel",
    show_default=True,
    help="Of int8: one a channel, or one a map.",
    rules=(needs("dtype", "--scale is of int8 alone; add --dtype int8, or leave it out", value="int8"),),
)
@click.option("--pca", type=click.IntRange(1), metavar="K", help="Keep K principal components of each tap.")
@option(
    "--pca-sample",
    type=click.IntRange(1),
    default=16,
    show_default=True,
    metavar="N",
    help="Images to fit them on.",
    rules=(needs("pca", "--pca-sample is of a PCA alone; add --pca K, or leave it out"),),
)
@click.option("--strict", is_flag=True, help="Stop at the first image that cannot be used.")
@click.option("--retry-failed", is_flag=True, help="Try images again that failed in an earlier run.")
@click.option("--overwrite", is_flag=True, help="Delete the store that is there and start afresh.")
@click.option(
    "--commit-every", type=click.FloatRange(0), default=30.0, show_default=True, metavar="S",
    help="Most seconds of work that a crash can cost.",
)  # fmt: skip
@click.option("--decoders", type=click.IntRange(1), metavar="N", help="Threads that decode.  [default: half the cores]")
@click.option(
    "--ray", "ray_address", is_flag=False, flag_value="local", metavar="[ADDRESS]",
    help="Extract with Ray: on the cluster at ADDRESS, or on a local one.",
)  # fmt: skip
@option(
    "--ray-workers",
    type=click.IntRange(1),
    metavar="N",
    help="Workers.  [default: one a GPU, or two a machine]",
    rules=(needs("ray_address", "--ray-workers goes with --ray"),),
)
@option(
    "--stall",
    type=click.FloatRange(1),
    default=600.0,
    show_default=True,
    metavar="S",
    help="With --ray: give up when no image is finished for so long.",
    rules=(needs("ray_address", "--stall goes with --ray"),),
)
@gives("encoding", "difftap.features.store:Encoding", "dtype", "scale", "pca")
@gives("settings", _settings)
@feature_options("pocket; dift with --model")
@category_option
@runtime_options
def extract(
    source: str,
    output: str,
    column: str | None,
    limit: int | None,
    fit: str | None,
    ray_address: str | None,
    ray_workers: int | None,
    stall: float,
    category: str | None,
    settings: ExtractSettings,
    recipe: Recipe,
    runtime: Runtime,
) -> None:
    """Extract the features of a whole data set into a store that every other command can read.

    SOURCE is a folder of images, a glob in quotes, a list of paths (.txt), tar files, or a table with a column of
    images (.parquet, or a folder that Hugging Face's save_to_disk wrote). The same command goes on where a run was
    stopped, by whatever means.

    \b
    difftap extract photos/ -o photos.zarr
    difftap extract 'shards/*.tar' -o s3://bucket/features.zarr --recipe dift --model sd21/
    difftap extract photos/ -o small.zarr --dtype int8 --pca 64
    """
    from difftap.features.sources import open_source
    from difftap.features.store import check_writable
    from difftap.prompts.learned import pinned

    if category is not None:  # without one the prompt stays as it is, and empty when it is run
        if recipe.learned is not None:
            raise InputError("--category fills a text, and learned prompts stand in its place; leave one of them out")
        recipe = with_category(recipe, category)
    if fit is not None:
        recipe = dataclasses.replace(recipe, fit=fit)
    require("zarr", "store", "a feature store")  # this and the next are said before anything slow starts
    recipe = pinned(recipe)  # a store knows learned prompts by their content
    check_writable(output, recipe.feature_fields(), settings.encoding, overwrite=settings.overwrite)
    listed = open_source(source, column)
    if limit is not None:
        listed = dataclasses.replace(listed, items=listed.items[:limit])
    if listed.repeated:
        click.echo(f"{listed.repeated} entries repeat an earlier one and are left out", err=True)
    if listed.left_out:
        click.echo(f"left out: {listed.left_out}", err=True)
    click.echo(f"{len(listed):,} images in {source}: {listed.kind}", err=True)
    if ray_address is None:
        from difftap.features.extract import extract_to_store
        from difftap.pipeline.pipeline import Pipeline

        with (
            Pipeline.open(recipe, runtime) as pipeline,
            progress_bar(len(listed), "images", rate=True) as advance,
        ):
            run = extract_to_store(pipeline, listed, output, settings, progress=advance)
    else:
        from difftap.features.extract.cluster import Cluster, extract_on_cluster

        cluster = Cluster(None if ray_address == "local" else ray_address, ray_workers, stall)
        with progress_bar(len(listed), "images", rate=True) as advance:
            run = extract_on_cluster(recipe, runtime, listed, output, settings, cluster, progress=advance)
    _report(run, output)


def _report(run: ExtractionSummary, output: str) -> None:
    earlier = f", {run.skipped:,} already there" if run.skipped else ""
    pace = f" in {run.seconds:.1f} s ({run.written / run.seconds:.2f} images/s)" if run.written and run.seconds else ""
    click.echo(f"{run.written:,} images written to {output}{pace}{earlier}; {run.failed:,} failed in all", err=True)
    for line in run.reasons:
        click.echo(f"  {line}", err=True)
    if run.failed > len(run.reasons):
        click.echo("  (difftap store info --failures lists them all; --retry-failed tries them again)", err=True)
    if run.failed:
        sys.exit(1)
