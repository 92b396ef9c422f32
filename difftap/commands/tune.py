"""``difftap tune``: learn a recipe's prompts from annotated pairs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from difftap.commands.options import (
    Decorator,
    build_recipe,
    cache_option,
    gives,
    model_options,
    recipe_option,
    size_option,
    stack,
)
from difftap.commands.progress import progress_bar

if TYPE_CHECKING:
    from difftap.recipe import Recipe
    from difftap.tuning.learn import TuneResult
    from difftap.tuning.loop import Progress
    from difftap.tuning.settings import TuneSettings

_DIR = click.Path(path_type=Path)

_SETTINGS = (
    *(
        "epochs",
        "batch",
        "rate",
        "tokens",
        "initial",
        "joint",
        "timesteps",
        "reading",
        "loss",
        "draws",
        "steps",
        "seed",
        "passes",
    ),
    *("checkpointing", "precision", "shared", "linear_rate", "image_tokens", "image_tap"),
)
"""Options that are fields of `TuneSettings`."""


@dataclass(frozen=True)
class _Job:
    """What is learned, from which pairs, where."""

    settings: TuneSettings
    recipe: Recipe
    data: tuple[str, str]
    output: Path
    layout: str | None
    allow_missing: bool
    limit: int | None
    val_limit: int | None
    device: str
    threads: int | None
    cache: Path | None
    overwrite: bool


def _settings(kind: str, joint: bool, **given: Any) -> TuneSettings:
    from difftap.tuning.settings import TuneSettings

    said = {name: value for name, value in given.items() if value is not None}
    return TuneSettings(kind, joint="joint" if joint else "separate", **said)


def _recipe(
    recipe_name: str | None,
    model: str | None,
    revision: str | None,
    random_weights: int | None,
    size: tuple[int, int] | None,
) -> Recipe:
    return build_recipe(
        recipe_name=recipe_name, model=model, revision=revision, random_weights=random_weights, size=size
    )


def _options(kind: str) -> Decorator:
    return stack(
        [
            *_OPTIONS,
            gives("settings", partial(_settings, kind), *_SETTINGS),
            gives("recipe", _recipe),
            gives("job", _Job),
        ]
    )


_OPTIONS = (
        click.option("--data", nargs=2, required=True, metavar="NAME ROOT", help="Data set and its folder."),
        click.option("-o", "--output", type=_DIR, required=True, metavar="DIR", help="Folder for the prompts."),
        recipe_option("--recipe", "recipe_name", metavar="R", help="Recipe that will use them.  [default: pocket]"),
        model_options,
        size_option,
        click.option("--epochs", type=int, metavar="N", help="Passes over the training pairs.  [default: 5]"),
        click.option("--batch", type=int, metavar="N", help="Pairs a step.  [default: 9]"),
        click.option("--rate", type=float, metavar="R", help="Adam's rate, of embeddings.  [default: 0.01]"),
        click.option("--tokens", type=int, metavar="N", help="Learned tokens.  [default: 75 for CLIP, else 24]"),
        click.option(
            "--initial", metavar="KIND", help="Tokens begin as published, at the empty prompt's (empty), or random."
        ),
        click.option("--joint/--separate", default=True, help="Branches on the fused score, or each on its own."),
        click.option(
            "--timestep", "timesteps", type=int, multiple=True, metavar="T", help="Of learning; one a branch, in order."
        ),
        click.option("--reading", metavar="KIND", help="Pixels to cells: corners (SD4Match's rule), or centres."),
        click.option("--loss", metavar="RULE", help="published (SD4Match's code), or normalised (difftap 0.1's)."),
        click.option("--draws", metavar="HOW", help="Noise of training images: fresh in each step, or fixed."),
        click.option("--layout", metavar="KIND", help="SPair-71k's list of pairs: large or small."),
        click.option("--allow-missing", is_flag=True, help="Leave out pairs whose files are missing or broken."),
        click.option("--limit", type=click.IntRange(1), metavar="N", help="N training pairs, evenly spaced."),
        click.option("--val-limit", type=click.IntRange(1), metavar="N", help="N validation pairs, evenly spaced."),
        click.option("--steps", type=int, metavar="N", help="Stop after N steps, if that comes first."),
        click.option("--seed", type=int, metavar="N", help="Of first values and the order of pairs.  [default: 0]"),
        click.option("--together", "passes", type=int, metavar="N", help="Pairs held at once.  [default: what fits]"),
        click.option("--checkpointing", is_flag=True, help="Recompute layers to save memory; slower."),
        click.option("--precision", metavar="P", help="fp32 or bf16 (autocast).  [default: fp32]"),
        click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda."),
        click.option("--threads", type=click.IntRange(min=1), metavar="N", help="CPU threads.  [default: all cores]"),
        click.option("--overwrite", is_flag=True, help="Start afresh whatever the folder holds."),
        cache_option,
)  # fmt: skip


@click.group()
def tune() -> None:
    """Learn prompts for matching, by gradients through the frozen UNet.

    A run that was stopped goes on where it was when the same command is given again; one that is done is extended by a
    larger --epochs. Several processes: accelerate launch -m difftap.cli tune ...

    \b
    difftap tune single --data pf-willow PF-WILLOW -o prompts/mine
    difftap bench pck pf-willow PF-WILLOW --part test --prompts prompts/mine -o out/mine
    """


@tune.command()
@_options("single")
def single(job: _Job) -> None:
    """One prompt for everything."""
    _tune(job)


@tune.command("class")
@_options("class")
def class_(job: _Job) -> None:
    """One prompt for each class of the training pairs."""
    _tune(job)


@tune.command()
@click.option("--shared", type=int, metavar="N", help="Of the tokens, those all pairs share.  [default: a third]")
@click.option("--linear-rate", type=float, metavar="R", help="Adam's rate, of linear layers.  [default: 0.001]")
@click.option("--image-tokens", metavar="FROM", help="own, or a DINOv2 folder or hub id.  [default: own]")
@click.option("--image-tap", metavar="TAP", help="Where own tokens are read.  [default: up1]")
@_options("cpm")
def cpm(job: _Job) -> None:
    """Learn a small network that makes a prompt from each pair's images."""
    _tune(job)


def _tune(job: _Job) -> None:
    from difftap.errors import require
    from difftap.pipeline.environment import open_cache, open_checkpoint
    from difftap.tuning.training_pairs import load_training_pairs

    settings, recipe = job.settings, job.recipe
    settings.check(recipe)
    name, root = job.data
    folder = job.output
    require("torch", "tune", "learning a prompt")
    pairs = load_training_pairs(
        name,
        Path(root),
        folder / "training" / "made",
        options={"layout": job.layout} if job.layout else {},
        allow_missing=job.allow_missing,
        limit=job.limit,
        val_limit=job.val_limit,
    )
    cache = open_cache(job.cache)
    model = open_checkpoint(recipe.model, cache)
    click.echo(f"{len(pairs.train)} pairs to learn from, {len(pairs.val)} to choose by", err=True)
    from difftap.tuning.learn import tune as run
    from difftap.tuning.loop import ProgressCallbacks

    steps = -(-len(pairs.train) // settings.batch) * settings.epochs
    steps = min(steps, settings.steps) if settings.steps else steps
    trainings = 1 if settings.joint == "joint" else len(recipe.branches)
    with progress_bar(steps * trainings, "steps") as advance:
        tuned = run(
            model,
            recipe,
            pairs,
            settings,
            folder,
            cache=cache,
            device=job.device,
            threads=job.threads,
            overwrite=job.overwrite,
            watcher=ProgressCallbacks(_stepper(advance), _say_epoch(settings.epochs)),
        )
    _say_result(tuned)


def _stepper(advance: Callable[[int], None]) -> Callable[[int, int, float], None]:
    """Move the bar to where the training is, also when it starts in the middle."""
    shown = 0

    def step(done: int, _of: int, _left: float) -> None:
        nonlocal shown
        if done < shown:  # the next branch's training
            shown = 0
        advance(done - shown)
        shown = done

    return step


def _say_epoch(epochs: int) -> Callable[[Progress, dict[str, float]], None]:
    def epoch(progress: Progress, row: dict[str, float]) -> None:
        best = progress.history[progress.best - 1]
        left = progress.seconds / len(progress.history) * (epochs - len(progress.history))
        click.echo(
            f"epoch {row['epoch']:.0f} of {epochs}: loss {row['loss']:.3f}, validation PCK@0.10 {100 * row['0.1']:.1f} "
            f"(empty prompt {100 * progress.empty['0.1']:.1f}, best {100 * best['0.1']:.1f}), "
            f"{_duration(left)} left",
            err=True,
        )

    return epoch


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _say_result(tuned: TuneResult) -> None:
    for group in tuned.scores:
        where = f"branch {group['branches'][0]}: " if len(tuned.scores) > 1 else ""
        for alpha, empty in group["empty"].items():
            learned = group["best"].get(alpha)
            if learned is not None:
                click.echo(
                    f"{where}validation PCK@{float(alpha):.2f}: empty prompt {100 * empty:.1f}, learned "
                    f"{100 * learned:.1f} (epoch {group['epoch']} of {group['epochs']})"
                )
        if group["best"] and group["best"]["0.1"] <= group["empty"]["0.1"]:
            click.echo(f"{where}no epoch beat the empty prompt on the validation pairs", err=True)
    click.echo(f"wrote {tuned.prompts.path}", err=True)
