"""Options that several commands share, as decorators."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

from difftap.errors import InputError

if TYPE_CHECKING:
    from difftap.pipeline.pipeline import Runtime
    from difftap.recipe import Learned, Recipe

__all__ = [
    "Grouped",
    "build_recipe",
    "cache_option",
    "category_option",
    "feature_options",
    "json_option",
    "model_options",
    "parse_numbers",
    "parse_size",
    "recipe_options",
    "runtime_options",
    "size_option",
    "stack",
    "store_option",
    "take_runtime",
    "with_category",
]

_SECTIONS = {
    "Recipe": (
        *("recipe_name", "model", "revision", "random_weights", "size", "ensemble", "taps", "timestep", "prompt"),
        *("prompts", "prompt_mode"),
        *("category", "matcher", "interpolation", "seed", "noise", "combine", "reading"),
    ),
    "Runtime": ("backend", "device", "precision", "calibrate", "threads", "batch", "cache", "memory"),
}
"""Options by name, under the heads that `Grouped` shows them."""

_F = TypeVar("_F", bound=Callable[..., Any])


class Grouped(click.Command):
    """A command of many options, whose help has a section for its own, the recipe's and the runtime's."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the sections."""
        owner = {name: head for head, names in _SECTIONS.items() for name in names}
        sections: dict[str, list[tuple[str, str]]] = {"Options": [], **{head: [] for head in _SECTIONS}}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and isinstance(parameter, click.Option):
                sections[owner.get(parameter.name or "", "Options")].append(record)
        for head, records in sections.items():
            if records:
                with formatter.section(head):
                    formatter.write_dl(records)


def stack(options: list[Callable[[Any], Any]]) -> Callable[[_F], _F]:
    """Several options as one decorator."""

    def decorate(function: _F) -> _F:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


def _size(_ctx: click.Context, _param: click.Parameter, value: str | None) -> tuple[int, int] | None:
    return None if value is None else parse_size(value)


def parse_size(value: str) -> tuple[int, int]:
    """A network input, ``512`` or ``640x480``, as ``(W, H)``."""
    parts = value.lower().split("x")
    if len(parts) not in (1, 2) or not all(part.strip().isdecimal() for part in parts):
        raise click.BadParameter(f"{value!r} is not a size; allowed: N or WxH in pixels, such as 512 or 640x480")
    numbers = [int(part) for part in parts]
    return (numbers[0], numbers[-1])


def parse_numbers(least: int) -> Callable[[click.Context, click.Parameter, str], tuple[int, ...]]:
    """A callback that reads a list such as ``1,4,8``: whole numbers from ``least``, each once, in their order."""

    def parse(_ctx: click.Context, _param: click.Parameter, value: str) -> tuple[int, ...]:
        parts = [part.strip() for part in value.split(",")]
        if not all(part.isdecimal() and int(part) >= least for part in parts):
            raise click.BadParameter(
                f"{value!r} is no list; allowed: whole numbers with commas between, from {least}, such as 1,4,8"
            )
        return tuple(dict.fromkeys(int(part) for part in parts))

    return parse


cache_option = click.option(
    "--cache",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Cache folder.  [default: $DIFFTAP_CACHE or the user's]",
)

model_options = stack(
    [
        click.option(
            "--model",
            metavar="M",
            help="Model: pocket, sd15, sd21, sdxl, a diffusers-format folder, or a hub id; and +FILE.safetensors for "
            "another UNet's weights in it (CleanDIFT).",
        ),
        click.option("--revision", metavar="REV", help="Branch, tag or commit of a hub id."),
        click.option(
            "--random-weights",
            type=int,
            metavar="SEED",
            help="Build sd15, sd21 or sdxl at full size with seeded random weights.",
        ),
    ]
)


def was_given(name: str) -> bool:
    """Whether a parameter of the running command was said, and is not merely its default."""
    return click.get_current_context().get_parameter_source(name) is ParameterSource.COMMANDLINE


size_option = click.option("--size", callback=_size, metavar="N|WxH", help="Network input in pixels.")


def _feature_list(default: str, *, sized: bool = True) -> list[Callable[[Any], Any]]:
    return [
        click.option(
            "--recipe",
            "recipe_name",
            metavar="R",
            help=f"Recipe: a preset ('difftap recipes') or a TOML file.  [default: {default}]",
        ),
        model_options,
        *([size_option] if sized else []),
        click.option("--ensemble", type=int, metavar="E", help="Noise samples averaged per image."),
        click.option(
            "--tap", "taps", multiple=True, metavar="TAP", help="Tap to read, for a recipe of one branch (repeatable)."
        ),
        click.option("--timestep", type=int, metavar="T", help="Timestep, for a recipe of one branch."),
        click.option("--prompt", metavar="TEXT", help="Text that conditions every branch.  [default: the recipe's]"),
        click.option("--prompts", metavar="DIR", help="Learned prompts ('difftap tune') in the text's place."),
        click.option(
            "--prompt-mode", metavar="MODE", help="Of conditional ones: pair (exact), class or image.  [default: pair]"
        ),
        click.option("--seed", type=int, metavar="N", help="Seed of the noise."),
        click.option(
            "--noise",
            metavar="KIND",
            help="independent, antithetic (pairs of opposite sign), or none with ensemble 1.  [default: the recipe's; "
            "independent where --ensemble is odd]",
        ),
    ]


def feature_options(default: str, *, sized: bool = True) -> Callable[[_F], _F]:
    """The recipe's options but for the matcher's, for commands that match nothing; ``default`` names their recipe.

    Without ``sized`` there is no --size, for commands that go through several.
    """
    return stack(_feature_list(default, sized=sized))


recipe_options = stack(
    [
        *_feature_list("pocket; dift with --model"),
        click.option(
            "--matcher",
            metavar="NAME",
            help="dense, nn, bilinear, softargmax, kernel-softargmax, window-softargmax or mutual.",
        ),
        click.option(
            "--interpolation", metavar="KIND", help="How the dense matcher reads between cells: bilinear or bicubic."
        ),
    ]
)

json_option = click.option(
    "--json", "json_file", type=click.Path(path_type=Path), metavar="FILE", help="Write the result as JSON too."
)

store_option = click.option(
    "--features", metavar="STORE", help="Take features from a store where it has them ('difftap extract')."
)

category_option = click.option(
    "--category",
    metavar="WORD",
    help="What the images show: fills {category} in the recipe's prompt.  [default: such a prompt stays empty]",
)

runtime_options = stack(
    [
        click.option(
            "--backend",
            default="ort",
            show_default=True,
            metavar="B",
            help="ort, openvino, tensorrt-rtx, tensorrt, torch, torch-compile, or auto: the fastest here, by "
            "measurement.",
        ),
        click.option(
            "--device",
            default="auto",
            show_default=True,
            metavar="D",
            help="auto, cpu, cuda, intel-gpu, or what else 'difftap doctor' lists.",
        ),
        click.option(
            "--precision",
            default="fp32",
            show_default=True,
            metavar="P",
            help="fp32, bf16x3, fp16, bf16 or int8, as far as the backend has it ('difftap doctor').",
        ),
        click.option(
            "--calibrate",
            type=click.Path(path_type=Path),
            multiple=True,
            metavar="FILE|DIR",
            help="Pictures to calibrate int8 engines on (repeatable).  [default: a bundled few]",
        ),
        click.option("--threads", type=click.IntRange(min=1), metavar="N", help="CPU threads.  [default: all cores]"),
        click.option(
            "--batch",
            type=click.IntRange(min=1),
            default=1,
            show_default=True,
            metavar="N",
            help="Images per engine run on a GPU; a CPU takes one at a time.",
        ),
        cache_option,
    ]
)


def build_recipe(
    *,
    recipe_name: str | None,
    model: str | None,
    size: tuple[int, int] | None,
    ensemble: int | None,
    taps: tuple[str, ...],
    timestep: int | None,
    prompt: str | None,
    seed: int | None,
    noise: str | None,
    prompts: str | None = None,
    prompt_mode: str | None = None,
    matcher: str | None = None,
    interpolation: str | None = None,
) -> Recipe:
    """The recipe that the options ask for: the named one, with what was given put in its place."""
    from difftap.recipe import load_recipe

    recipe = load_recipe(recipe_name or ("dift" if model not in (None, "pocket") else "pocket"))
    if (taps or timestep is not None) and len(recipe.branches) > 1:
        raise InputError(
            f"--tap and --timestep change one branch; recipe '{recipe_name}' has {len(recipe.branches)}; "
            "write a TOML file"
        )
    branch_changes: dict[str, Any] = {"taps": taps or None, "timestep": timestep, "prompt": prompt}
    given = {name: value for name, value in branch_changes.items() if value is not None}
    branches = tuple(dataclasses.replace(branch, **given) for branch in recipe.branches)
    matcher_changes: dict[str, Any] = {"name": matcher, "interpolation": interpolation}
    new_matcher = dataclasses.replace(recipe.matcher, **{k: v for k, v in matcher_changes.items() if v is not None})
    changes: dict[str, Any] = {"model": model, "size": size, "ensemble": ensemble, "seed": seed, "noise": noise}
    changes["learned"] = _learned(recipe, prompt, prompts, prompt_mode)
    if noise is None and recipe.noise == "antithetic" and ensemble is not None and ensemble % 2:
        changes["noise"] = "independent"  # no pairs can be made of an odd number
    changes = {name: value for name, value in changes.items() if value is not None}
    return dataclasses.replace(recipe, branches=branches, matcher=new_matcher, **changes)


def with_category(recipe: Recipe, category: str | None) -> Recipe:
    """The recipe with the category in its prompts, so that its key and record name what was really asked.

    Raises:
        InputError: no prompt asks for one.
    """
    from difftap.prompts import Subject, fill, wants_category

    if recipe.learned is not None:  # a file of its own says whether it wants one
        return recipe
    if category is not None and not wants_category(recipe.branches):
        raise InputError(
            "--category fills {category} in a prompt, and this recipe's has none; leave it out, or give a --prompt "
            "such as 'a photo of a {category}'"
        )
    return fill(recipe, Subject(category))


def _learned(recipe: Recipe, prompt: str | None, path: str | None, mode: str | None) -> Learned | None:
    """The recipe's learned prompts with what was given put in their place; None to leave them as they are."""
    from difftap.recipe import Learned

    if prompt is not None and (path is not None or recipe.learned is not None):
        raise InputError("--prompt gives a text, and this recipe has learned prompts in its place; leave one out")
    if path is None and mode is None:
        return None
    known = recipe.learned or (Learned(path) if path is not None else None)
    if known is None:
        raise InputError("--prompt-mode goes with learned prompts; give them by --prompts DIR")
    return dataclasses.replace(known, path=path or known.path, mode=mode or known.mode)


def take_runtime(options: dict[str, Any]) -> Runtime:
    """The runtime that a command's options ask for; takes what `runtime_options` added out of them."""
    from difftap.pipeline.pipeline import Runtime

    names = ("backend", "device", "threads", "batch", "cache", "precision", "calibrate")
    return Runtime(**{name: options.pop(name) for name in names})
