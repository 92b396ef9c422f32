"""``difftap bench``: measurements, one subcommand each."""

from __future__ import annotations

import json
from pathlib import Path

import click

from difftap.commands.bench.compare import compare
from difftap.commands.bench.dense_speed import dense_speed
from difftap.commands.bench.distances import distances
from difftap.commands.bench.gpu_check import gpu_check
from difftap.commands.bench.index import index as index_bench
from difftap.commands.bench.pck import pck
from difftap.commands.bench.reproduce import reproduce
from difftap.commands.bench.semantics import semantics
from difftap.commands.bench.table import table
from difftap.commands.bench.throughput import throughput
from difftap.commands.lazy import LazyGroup


@click.group(cls=LazyGroup)
def bench() -> None:
    """Measure speed, memory and quality."""


for _command in (pck, compare, table, dense_speed, reproduce, throughput, semantics, gpu_check, distances, index_bench):
    bench.add_command(_command)


@bench.command()
@click.option("--channels", type=click.IntRange(1), default=1280, show_default=True, help="Channels of both maps.")
@click.option(
    "--grid", type=click.IntRange(1), default=48, show_default=True, help="Side of the square maps, in cells."
)
@click.option(
    "--image",
    type=click.IntRange(1),
    nargs=2,
    default=(500, 375),
    show_default=True,
    metavar="W H",
    help="Size of both images.",
)
@click.option("--keypoints", type=click.IntRange(1), default=10, show_default=True, help="Points to find.")
@click.option("--interpolation", type=click.Choice(["bilinear", "bicubic"]), default="bilinear", show_default=True)
@click.option("--threads", type=click.IntRange(1), default=2, show_default=True, help="For BLAS and torch alike.")
@click.option("--repeats", type=click.IntRange(1), default=3, show_default=True, help="Rounds; each runs every way.")
@click.option(
    "--memory/--no-memory", default=True, show_default=True, help="Also measure peak memory, in child processes."
)
@click.option(
    "--json", "json_file", type=click.Path(path_type=Path), metavar="FILE", help="Write the result as JSON too."
)
def matching(
    channels: int,
    grid: int,
    image: tuple[int, int],
    keypoints: int,
    interpolation: str,
    threads: int,
    repeats: int,
    memory: bool,
    json_file: Path | None,
) -> None:
    """Dense matching against the slow way of DIFT's evaluation, side by side in one run."""
    from difftap.artifacts.files import write_atomic
    from difftap.bench.matching import format_table, run, to_json

    result = run(channels, grid, image, keypoints, threads, repeats, interpolation=interpolation, memory=memory)
    for line in format_table(result):
        click.echo(line)
    if json_file is not None:
        write_atomic(json_file, json.dumps(to_json(result), indent=1) + "\n")


@bench.command("extract")
@click.option(
    "--engine", "engines", type=click.FloatRange(min=0.1), multiple=True, default=(1.0, 50.0), show_default=True,
    metavar="MS", help="Milliseconds that an engine takes for an image (repeatable).",
)  # fmt: skip
@click.option("--seconds", type=click.FloatRange(min=0.5), default=10.0, show_default=True, help="Of each measurement.")
@click.option("--repeats", type=click.IntRange(1), default=3, show_default=True, help="Rounds; each runs every engine.")
@click.option(
    "--map", "shape", type=click.IntRange(1), nargs=3, default=(16, 8, 8), show_default=True, metavar="C H W",
    help="Size of each map; 1280 48 48 is what a recipe for dense matching makes.",
)  # fmt: skip
@click.option(
    "--images", type=click.IntRange(100), metavar="N",
    help="Instead: one long run of N images with the first engine, and how memory goes.",
)  # fmt: skip
@click.option(
    "--json", "json_file", type=click.Path(path_type=Path), metavar="FILE", help="Write the result as JSON too."
)
def extract(
    engines: tuple[float, ...],
    seconds: float,
    repeats: int,
    shape: tuple[int, int, int],
    images: int | None,
    json_file: Path | None,
) -> None:
    """What 'difftap extract' itself costs, beside engines that do nothing but take a set time; and its memory."""
    import tempfile

    from difftap.artifacts.files import write_atomic
    from difftap.bench.extraction import format_course, format_paces, measure, run, to_json
    from difftap.commands.progress import progress_bar

    if images is None:
        with progress_bar(repeats + 1, "rounds") as advance:
            rounds = run(tuple(one / 1000 for one in engines), seconds, repeats, advance, shape=shape)
        lines = format_paces(rounds)
    else:
        with tempfile.TemporaryDirectory(prefix="difftap-") as folder, progress_bar(images, "images", rate=True) as bar:
            pace = measure(engines[0] / 1000, images, Path(folder), shape=shape, progress=bar)
        rounds, lines = [[pace]], format_course(pace)
    for line in lines:
        click.echo(line)
    if json_file is not None:
        write_atomic(json_file, json.dumps(to_json(rounds), indent=1) + "\n")
