"""``difftap bench gpu-check``: everything a GPU machine can do, in one run."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from difftap.commands.options import (
    Command,
    build_recipe,
    cache_option,
    feature_options,
    parse_numbers,
    runtime_option,
    was_given,
)

if TYPE_CHECKING:
    from difftap.recipe import Recipe

__all__ = ["gpu_check"]


def _full_size(**options: Any) -> Recipe:
    """Take Stable Diffusion 2.1 where nothing is named."""
    named = options["model"] is not None or options["recipe_name"] is not None
    return build_recipe(**options if named else {**options, "model": "sd21"})


@click.command(
    "gpu-check",
    cls=Command,
    epilog="Exit codes: 0 all is well; 1 some cell was not run or is not sound; 2 bad input.",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default=Path("out/gpu-check"),
    show_default=True,
    metavar="DIR",
    help="Folder for finished cells and the report; a run that was stopped goes on from there.",
)
@click.option(
    "--backends",
    default="all",
    show_default=True,
    metavar="LIST",
    help="all, or backends with commas between: tensorrt:fp16,torch:fp16,ort (without a precision: all).",
)
@click.option(
    "--rivals", default="none", show_default=True, metavar="LIST", help="dift, dift-tuned, with :fp16 or :bf16; none."
)
@click.option(
    "--sizes",
    default="512,768",
    show_default=True,
    callback=parse_numbers(1),
    metavar="LIST",
    help="Square inputs in pixels.",
)
@click.option(
    "--batches",
    default="1,4,8",
    show_default=True,
    callback=parse_numbers(1),
    metavar="LIST",
    help="Images in one engine run.",
)
@click.option(
    "--limit",
    type=click.FloatRange(min=0, min_open=True),
    default=900,
    show_default=True,
    help="Seconds a cell may take, building included.",
)
@click.option(
    "--seconds", type=click.FloatRange(0), default=3.0, show_default=True, help="Least length of a cell's timed part."
)
@runtime_option(
    "--device",
    type=click.Choice(["cuda", "cpu"]),
    default="cuda",
    show_default=True,
    help="cpu is a dry run of this check, on the CPU's backends.",
)
@runtime_option("--threads", type=click.IntRange(min=1), metavar="N", help="CPU threads.  [default: all cores]")
@click.option("--overwrite", is_flag=True, help="Start afresh, whatever the folder holds.")
@cache_option
@feature_options("dift; sd21 with random weights", sized=False, make=_full_size)
def gpu_check(
    output: Path,
    backends: str,
    rivals: str,
    sizes: tuple[int, ...],
    batches: tuple[int, ...],
    limit: float,
    seconds: float,
    device: str,
    threads: int | None,
    overwrite: bool,
    cache: Path | None,
    recipe: Recipe,
) -> None:
    """Build, run, time and check every GPU backend that is installed, each cell in a process of its own.

    Without --model or --recipe it takes Stable Diffusion 2.1 at full size with random weights, so that nothing has to
    be downloaded. What cannot run is a line that says why. docs/gpu.md says how to bring what a bare machine lacks.

    \b
    difftap bench gpu-check
    difftap bench gpu-check --backends tensorrt:fp16,torch:fp16 --sizes 768 --batches 8
    difftap bench gpu-check --device cpu --model pocket --sizes 128 --backends ort,torch:fp32
    """
    from difftap.artifacts.files import write_atomic
    from difftap.bench.contenders import parse_rivals
    from difftap.bench.gpucheck import GpuCheckCase, check_faiss, format_gpu_check, present, run, to_json
    from difftap.errors import InputError, require
    from difftap.machine import gpu

    if device == "cuda" and gpu() is None:
        raise InputError(
            "no NVIDIA GPU here (nvidia-smi names none): run this on a machine with one, or for a dry run give "
            "--device cpu --model pocket"
        )
    require("threadpoolctl", "bench", "measuring throughput")
    if not was_given("model", "recipe_name", "random_weights"):
        recipe = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, random_weights=0))
    ours, absent = present(backends, device)
    others = parse_rivals(rivals, device)
    if not ours and not others:
        raise InputError(f"no backend can run on {device} here: {'; '.join(absent.values())}")
    case = GpuCheckCase(
        recipe,
        (*ours, *others),
        device,
        tuple((side, side) for side in sizes),
        batches,
        limit,
        seconds,
        threads,
        cache,
    )
    result = run(case, output, absent, lambda text: click.echo(text, err=True), overwrite)
    faiss = check_faiss(device, limit)
    for line in [*format_gpu_check(result), faiss.line]:
        click.echo(line)
    write_atomic(output / "gpu-check.json", json.dumps({**to_json(result), "faiss": faiss.to_dict()}, indent=1) + "\n")
    click.echo(f"wrote {output / 'gpu-check.json'}", err=True)
    if any(one.failed is not None or one.sound is False for _, one in result.cells) or faiss.sound is False:
        sys.exit(1)
