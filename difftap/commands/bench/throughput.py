"""``difftap bench throughput``: images a second against the way people do it today."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from difftap.commands.options import Command, cache_option, recipe_options, runtime_option

if TYPE_CHECKING:
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
    """
    from difftap.artifacts.files import output_errors
    from difftap.bench.contenders import parse_backends, parse_rivals
    from difftap.bench.pictures import choose_pictures
    from difftap.bench.throughput import ThroughputCase, format_throughput, run, save_throughput
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
