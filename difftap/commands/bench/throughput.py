"""``difftap bench throughput``: images a second against the way people do it today."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from difftap.commands.options import (
    Command,
    cache_option,
    needs,
    option,
    parse_numbers,
    recipe_options,
    runtime_option,
)
from difftap.errors import InputError

if TYPE_CHECKING:
    from difftap.bench.contenders import Contender
    from difftap.bench.ensembles import CurveCase
    from difftap.pipeline.environment import Runtime
    from difftap.recipe import Recipe

__all__ = ["throughput"]

_PATH = click.Path(path_type=Path)


@click.command(
    cls=Command, epilog="Exit codes: 0 done; 1 done, but some way could not be measured; 2 bad input, nothing done."
)
@click.option("-o", "--output", type=_PATH, metavar="DIR", help="Folder for throughput.json, .txt and .png.")
@click.option(
    "--backends",
    default="all",
    show_default=True,
    metavar="LIST",
    help="all, none, or backends with commas between: ort, openvino:int8, ... (without a precision: all it has).",
)
@click.option(
    "--rivals",
    default="dift,dift-tuned",
    show_default=True,
    metavar="LIST",
    help="dift, dift-tuned, either with :fp16 or :bf16; none.",
)
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True, help="Turns of each, interleaved.")
@click.option(
    "--seconds",
    type=click.FloatRange(0),
    default=2.0,
    show_default=True,
    help="Least length of a turn, which is at least one call.",
)
@runtime_option(
    "--batch", type=click.IntRange(1), default=1, show_default=True, help="Images per run on a GPU; a CPU takes one."
)
@click.option(
    "--image",
    "images",
    type=_PATH,
    multiple=True,
    metavar="PATH",
    help="Image to extract, or a folder, of which up to 8 are taken (repeatable).  [default: generated ones]",
)
@click.option("--matching/--no-matching", default=True, show_default=True, help="Also time matching 10 keypoints.")
@click.option(
    "--ensemble-curve",
    is_flag=True,
    help="Instead of speed: fidelity against passes, for independent and antithetic noise, on the first backend.",
)
@option(
    "--curve-timesteps",
    default="1,50,100,261",
    show_default=True,
    callback=parse_numbers(0),
    metavar="LIST",
    help="Timesteps of the curve.",
    rules=(needs("ensemble_curve", "--curve-timesteps is of the curve alone; add --ensemble-curve, or leave it out"),),
)
@option(
    "--curve-passes",
    default="1,2,4,8,16",
    show_default=True,
    callback=parse_numbers(1),
    metavar="LIST",
    help="Ensemble sizes of the curve.",
    rules=(needs("ensemble_curve", "--curve-passes is of the curve alone; add --ensemble-curve, or leave it out"),),
)
@option(
    "--curve-limit",
    type=click.IntRange(2),
    default=64,
    show_default=True,
    metavar="N",
    help="Members of the mean that the curve is held against.",
    rules=(needs("ensemble_curve", "--curve-limit is of the curve alone; add --ensemble-curve, or leave it out"),),
)
@runtime_option("--device", default="auto", show_default=True, help="auto, cpu or cuda.")
@runtime_option("--threads", type=click.IntRange(min=1), metavar="N", help="CPU threads.  [default: all cores]")
@cache_option
@recipe_options
def throughput(
    output: Path | None,
    backends: str,
    rivals: str,
    rounds: int,
    seconds: float,
    batch: int,
    images: tuple[Path, ...],
    matching: bool,
    ensemble_curve: bool,
    curve_timesteps: tuple[int, ...],
    curve_passes: tuple[int, ...],
    curve_limit: int,
    device: str,
    threads: int | None,
    cache: Path | None,
    recipe: Recipe,
) -> None:
    """Measure every backend in every precision against DIFT's way in torch, side by side in one run.

    Each way runs in a process of its own, in interleaved rounds, on the same images and noise; features are compared
    in the same run. docs/throughput.md says how to read the table.

    \b
    difftap bench throughput -o out/throughput
    difftap bench throughput --model sd15 --random-weights 0 --size 512 --rounds 1 -o out/throughput
    difftap bench throughput --ensemble-curve --image photos/ -o out/curve
    """
    from difftap.artifacts.files import output_errors
    from difftap.bench.contenders import parse_backends, parse_rivals
    from difftap.bench.pictures import choose_pictures
    from difftap.bench.throughput import ThroughputCase, run
    from difftap.bench.throughput_report import format_throughput, save_throughput
    from difftap.errors import require

    ours, absent = ([], {}) if backends == "none" else parse_backends(backends, device)
    where = "cuda" if any(one.device == "cuda" for one in ours) or device == "cuda" else "cpu"
    others = parse_rivals(rivals, where)
    for module in ("threadpoolctl", *(("matplotlib",) if output else ())):
        require(module, "bench", "measuring throughput")
    if output:  # now, not when all is measured
        with output_errors(output):
            output.mkdir(parents=True, exist_ok=True)
    files = choose_pictures(images)
    if ensemble_curve:
        runtime = _first(ours, device, threads, cache)
        from difftap.bench.ensembles import CurveCase as Made

        curve = Made(recipe, curve_timesteps, curve_passes, curve_limit)
        _curve(curve, files, runtime, output)
        return
    case = ThroughputCase(
        recipe,
        (*others, *ours),
        rounds=rounds,
        seconds=seconds,
        batch=batch,
        threads=threads,
        images=files,
        matching=matching,
        cache=cache,
    )
    result = run(case, lambda text: click.echo(text, err=True))
    for line in format_throughput(result):
        click.echo(line)
    for reason in absent.values():
        click.echo(f"not here: {reason}")
    if output is not None:
        for path in save_throughput(result, output):
            click.echo(f"wrote {path}", err=True)
    if any(row.failed is not None for row in result.rows):
        sys.exit(1)


def _first(ours: list[Contender], device: str, threads: int | None, cache: Path | None) -> Runtime:
    """Where the curve is measured: on the first backend that was named."""
    from difftap.pipeline.environment import Runtime as Made

    if not ours:
        raise InputError("the curve needs a backend; allowed: --backends with one that runs here")
    return Made(ours[0].name, device, threads, cache=cache, precision=ours[0].precision)


def _curve(case: CurveCase, files: tuple[Path, ...], runtime: Runtime, output: Path | None) -> None:
    """Measure, print and write the curve."""
    import tempfile

    from difftap.bench.ensembles import run_curve
    from difftap.bench.ensembles_report import format_curve, save_curve
    from difftap.bench.pictures import write_pictures
    from difftap.images import load_image

    with tempfile.TemporaryDirectory(prefix="difftap-curve-") as folder:
        images = [load_image(path) for path in files or write_pictures(Path(folder))]
    curve = run_curve(case, images, runtime, say=lambda text: click.echo(text, err=True))
    for line in format_curve(curve):
        click.echo(line)
    if output is not None:
        for path in save_curve(curve, output):
            click.echo(f"wrote {path}", err=True)
