"""``difftap bench throughput``: images a second against the way people do it today."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from difftap.commands.options import build_recipe, cache_option, recipe_options

__all__ = ["throughput"]

_PATH = click.Path(path_type=Path)


@click.command(epilog="Exit codes: 0 done; 1 done, but some way could not be measured; 2 bad input, nothing done.")
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
@click.option(
    "--batch", type=click.IntRange(1), default=1, show_default=True, help="Images per run on a GPU; a CPU takes one."
)
@click.option("--image", "images", type=_PATH, multiple=True, metavar="FILE", help="Image to extract (repeatable).")
@click.option("--matching/--no-matching", default=True, show_default=True, help="Also time matching 10 keypoints.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda.")
@click.option("--threads", type=click.IntRange(min=1), metavar="N", help="CPU threads.  [default: all cores]")
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
    revision: str | None,
    random_weights: int | None,
    **options: Any,
) -> None:
    """Measure every backend in every precision against DIFT's way in torch, side by side in one run.

    Each way runs in a process of its own, in interleaved rounds, on the same images and noise; features are compared
    in the same run. docs/throughput.md says how to read the table.

    \b
    difftap bench throughput -o out/throughput
    difftap bench throughput --model sd15 --random-weights 0 --size 512 --rounds 1 -o out/throughput
    """
    from difftap.bench.contenders import parse_backends, parse_rivals
    from difftap.bench.throughput import ThroughputCase, run
    from difftap.bench.throughput_report import format_throughput, save_throughput
    from difftap.errors import require

    ours, absent = ([], {}) if backends == "none" else parse_backends(backends, device)
    where = "cuda" if any(one.device == "cuda" for one in ours) or device == "cuda" else "cpu"
    others = parse_rivals(rivals, where)
    for module in ("threadpoolctl", *(("matplotlib",) if output else ())):
        require(module, "bench", "measuring throughput")
    case = ThroughputCase(
        build_recipe(**options),
        (*others, *ours),
        rounds=rounds,
        seconds=seconds,
        batch=batch,
        threads=threads,
        images=images,
        matching=matching,
        revision=revision,
        random_weights=random_weights,
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
