"""``difftap engines``: build, list, verify and remove engines."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from difftap.commands.options import (
    Command,
    cache_option,
    excludes,
    feature_options,
    option,
    parse_size,
    runtime_options,
)

if TYPE_CHECKING:
    from difftap.pipeline.environment import Runtime
    from difftap.recipe import Recipe


def _sizes(_ctx: click.Context, _param: click.Parameter, value: str | None) -> list[tuple[int, int]]:
    return [parse_size(part) for part in value.split(",")] if value else []


@click.group()
def engines() -> None:
    """Build, list, verify and remove engines."""


@engines.command(cls=Command, epilog="Exit codes: 0 all built; 1 some could not be built; 2 bad input, nothing built.")
@feature_options("pocket; dift with --model")
@runtime_options
@option(
    "--sizes",
    callback=_sizes,
    metavar="N|WxH,...",
    help="Network inputs to build for, in place of the recipe's size.",
    rules=(excludes("--size and --sizes are both given; leave one of them out", "size"),),
)
def build(recipe: Recipe, runtime: Runtime, sizes: list[tuple[int, int]]) -> None:
    """Make a recipe's engines, and hold each against the float32 reference: torch, or onnxruntime without it.

    --backend and --precision take several, separated by commas, or 'all': every backend that can be used here, every
    precision that a backend has. What cannot be built does not keep the rest from being built.

    \b
    difftap engines build
    difftap engines build --model path/to/checkpoint --sizes 512,768 --backend all --precision all
    difftap engines build --backend openvino --precision int8 --calibrate photos/
    """
    from difftap.errors import DifftapError
    from difftap.pipeline.engines import build_engines, plan_builds

    jobs = plan_builds(recipe, runtime, _names(runtime.backend), _names(runtime.precision), sizes)
    rows, failed = [], []
    for job in jobs:
        try:
            for record, seconds in build_engines(job.recipe, job.runtime):
                rows.append((job, record, seconds))
                click.echo(f"{record.path}", err=len(jobs) > 1)
        except DifftapError as error:
            if len(jobs) == 1:
                raise
            failed.append(f"{job.label}: {error}")
            click.echo(f"error: {failed[-1]}", err=True)
    click.echo(_table(rows))
    for label in failed:
        click.echo(f"not built: {label}")
    if failed:
        sys.exit(1)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()] or [text]


def _table(rows: list[tuple[Any, Any, float]]) -> str:
    """Print a line per engine and output: what it is, its files' size, how long it took, how exact it is."""
    from difftap.artifacts.table import Table

    heads = ("size", "backend", "precision", "engine", "MB", "s", "output", "relative", "cosine mean", "min", "")
    lines: list[tuple[str, ...]] = []
    for job, record, seconds in rows:
        made_from = record.manifest.made_from
        own = sum(one.size for name, one in record.manifest.files.items() if record.stem in name) / 1e6
        name = made_from["component"] + ("" if not made_from["taps"] else " " + "+".join(made_from["taps"]))
        width, height = job.recipe.size
        first = (
            f"{width}x{height}",
            made_from["backend"],
            made_from["precision"],
            name,
            f"{own:.1f}",
            f"{seconds:.1f}",
        )
        unmeasured = "built earlier, never measured" if record.manifest.report.get("build") else "the reference: it ran"
        note = record.not_run or unmeasured
        for output, one in record.parity.items():
            figures = (f"{one.relative:.1e}", f"{one.cosine_mean:.6f}", f"{one.cosine_min:.6f}")
            lines.append((*first, output, *figures, ""))
            first = ("",) * 6
        if not record.parity:
            lines.append((*first, "", "", "", "", note))
    return "\n".join(Table.of(heads, lines, left=(0, 1, 2, 3, 6, 10)).text())


def _open(cache: Path | None) -> Any:
    from difftap.pipeline.environment import open_cache

    return open_cache(cache)


@engines.command("list")
@cache_option
def list_(cache: Path | None) -> None:
    """List the graphs and engines in the cache, with the size of the files they use (weights may be shared)."""
    from difftap.artifacts.table import Table
    from difftap.pipeline.engines import Artifact, list_artifacts

    store = _open(cache)
    found = list_artifacts(store)
    click.echo(f"{len(found)} graphs and engines in {store.folder}")
    whole = [one for one in found if isinstance(one, Artifact)]
    rows = [(one.manifest.kind, f"{one.size / 1e6:.1f} MB", f"{one.path.parent.name}/{one.path.name}") for one in whole]
    for line in Table.of(("", "", ""), rows, left=(0, 2)).text(heads=False):
        click.echo(line)
    for one in found:
        if not isinstance(one, Artifact):
            click.echo(f"BROKEN  {one}")


@engines.command(epilog="Exit codes: 0 all whole; 1 something is broken.")
@click.option("--quick", is_flag=True, help="Files and versions alone: do not run the engines again.")
@cache_option
def verify(cache: Path | None, quick: bool) -> None:
    """Read every file again in full, compare it with its manifest, and measure every engine again."""
    from difftap.errors import DifftapError
    from difftap.pipeline.engines import Artifact, list_artifacts, verify_artifact

    store = _open(cache)
    broken = 0
    for one in list_artifacts(store):
        try:
            if not isinstance(one, Artifact):
                raise one
            note = verify_artifact(one, cache=store, quick=quick)
            click.echo(f"whole   {one.path.name}{f'  ({note})' if note else ''}")
        except DifftapError as error:
            broken += 1
            click.echo(f"BROKEN  {error}")
    if broken:
        sys.exit(1)


@engines.command()
@click.option("--checkpoints", is_flag=True, help="Also remove checkpoints built with random weights.")
@cache_option
def clean(cache: Path | None, checkpoints: bool) -> None:
    """Remove every graph and engine from the cache; your own checkpoints and the embedded model stay."""
    from difftap.pipeline.engines import clean as remove

    store = _open(cache)
    freed, kept = remove(store, checkpoints)
    click.echo(f"freed {freed / 1e6:.1f} MB in {store.folder}")
    if kept:
        click.echo(f"kept {kept / 1e6:.1f} MB of checkpoints with random weights (--checkpoints removes them)")
