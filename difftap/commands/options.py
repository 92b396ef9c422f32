"""What commands are made of: options, groups of options that give back an object, rules between options.

A command's function takes objects, not strings: `recipe_options` hands it ``recipe: Recipe``, and `runtime_options`
``runtime: Runtime``. A rule such as "--ray-workers goes with --ray" stands beside its option and is checked before
anything is made. Nothing heavy is imported for a help text.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

import click
from click.core import ParameterSource

from difftap.commands.lazy import RENAMED
from difftap.errors import InputError

if TYPE_CHECKING:
    from difftap.recipe import Learned, ModelReference, Recipe

__all__ = [
    "RECIPE_NAMES",
    "Command",
    "Decorator",
    "Rule",
    "build_recipe",
    "cache_option",
    "category_option",
    "checkpoint_options",
    "excludes",
    "feature_options",
    "gives",
    "json_option",
    "model_options",
    "needs",
    "one_of",
    "option",
    "parse_numbers",
    "parse_size",
    "recipe_option",
    "recipe_options",
    "reference_to",
    "runtime_option",
    "runtime_options",
    "size_option",
    "stack",
    "store_option",
    "was_given",
    "with_category",
]

HEADS = ("Options", "Recipe", "Runtime")
"""Sections of a command's help."""

_F = TypeVar("_F", bound=Callable[..., object])


class Decorator(Protocol):
    """Adds an option to a command's function, or makes an object of several for it."""

    def __call__(self, function: _F, /) -> _F:
        """Give the function with that."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """What options that were given ask of others: made by `needs`, `excludes` and `one_of`.

    Attributes:
        holds: whether the rule holds in a context in which the option of that name was given.
        text: what to say where it does not; ``{}`` stands for the option that offends, with its dashes.
        of: the options that the rule is about; none for the option beside which it stands.
    """

    holds: Callable[[click.Context, str], str | None]
    text: str
    of: tuple[str, ...] = ()


def needs(other: str, text: str, *, value: object = None, of: tuple[str, ...] = ()) -> Rule:
    """Ask that ``other`` is given too or, with ``value``, that it has that value."""

    def offends(ctx: click.Context, name: str) -> str | None:
        fine = ctx.params[other] == value if value is not None else _is_given(ctx, other)
        return None if fine else name

    return Rule(offends, text, of)


def excludes(text: str, *others: str) -> Rule:
    """Ask that none of ``others`` is given beside."""
    return Rule(lambda ctx, _name: next((other for other in others if _is_given(ctx, other)), None), text)


def one_of(text: str, *names: str) -> Rule:
    """Ask that at most one of ``names`` is given; ``{}`` in the text stands for all that were."""

    def offends(ctx: click.Context, _name: str) -> str | None:
        told = [name for name in names if _is_given(ctx, name)]
        return " and ".join(told) if len(told) > 1 else None

    return Rule(offends, text, names)


def _is_given(ctx: click.Context, name: str) -> bool:
    return ctx.get_parameter_source(name) not in (None, ParameterSource.DEFAULT, ParameterSource.DEFAULT_MAP)


def was_given(*names: str) -> bool:
    """Whether one of the running command's parameters was said, and is not merely its default."""
    context = click.get_current_context()
    return any(_is_given(context, name) for name in names)


def _flag(command: click.Command, name: str) -> str:
    known = {one.name: max(one.opts, key=len) for one in command.params if isinstance(one, click.Option)}
    return known.get(name, name)


class Option(click.Option):
    """An option that knows its section of the help, and what it asks of other options."""

    def __init__(self, *names: Any, head: str = "Options", rules: tuple[Rule, ...] = (), **settings: Any) -> None:
        super().__init__(*names, **settings)
        self.head, self.rules = head, rules


class Command(click.Command):
    """A command whose help has sections, and whose rules are checked before anything is made."""

    def __init__(self, *names: Any, rules: tuple[Rule, ...] = (), **settings: Any) -> None:
        super().__init__(*names, **settings)
        self.rules = rules

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the sections."""
        sections: dict[str, list[tuple[str, str]]] = {head: [] for head in HEADS}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and isinstance(parameter, click.Option):
                sections[getattr(parameter, "head", HEADS[0])].append(record)
        for head, records in sections.items():
            if records:
                with formatter.section(head):
                    formatter.write_dl(records)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Answer an option that was renamed or removed with what takes its place, before click calls it unknown."""
        path = " ".join(ctx.command_path.split()[1:])
        for word in args:
            answer = RENAMED.get(f"{path} {word.partition('=')[0]}")
            if answer is not None:
                raise InputError(answer)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> object:
        """Check every rule, then run."""
        own = [(one.name or "", rule) for one in self.params if isinstance(one, Option) for rule in one.rules]
        for name, rule in [*own, *((name, one) for one in self.rules for name in one.of)]:
            offender = rule.holds(ctx, name) if _is_given(ctx, name) else None
            if offender is not None:
                said = " and ".join(_flag(self, part) for part in offender.split(" and "))
                raise InputError(rule.text.replace("{}", said))
        return super().invoke(ctx)


def option(*names: str, head: str = "Options", rules: tuple[Rule, ...] = (), **settings: Any) -> Decorator:
    """Make an option of a `Command`, in a section of its help and under rules."""
    return click.option(*names, cls=Option, head=head, rules=rules, **settings)


recipe_option = functools.partial(option, head="Recipe")
runtime_option = functools.partial(option, head="Runtime")


def gives(name: str, make: str | Callable[..., object], *names: str) -> Decorator:
    """Make one object of several options, and hand it to the command as ``name`` in their place.

    Args:
        name: the command's parameter that takes the object.
        make: a class, as ``module:Class`` so that it is imported on use, or a function.
        names: the options, which are fields of the class; none for the parameters of a function.
    """
    taken = names or tuple(inspect.signature(make).parameters if callable(make) else ())

    def decorate(function: _F) -> _F:
        # A value that the command, or another group, asks for too is handed on beside the object made of it.
        wanted = getattr(function, "wanted", None) or set(inspect.signature(function).parameters)

        @functools.wraps(function)
        def call(**values: object) -> object:
            maker = _load(make) if isinstance(make, str) else make
            made = maker(**{one: values[one] for one in taken if one in values})
            return function(**{key: value for key, value in values.items() if key in wanted}, **{name: made})

        call.__dict__.update(wanted=wanted - {name} | set(taken), gives=(name, make, taken))
        return cast(_F, call)

    return decorate


def _load(place: str) -> Callable[..., object]:
    module, name = place.split(":")
    made: Callable[..., object] = getattr(importlib.import_module(module), name)
    return made


def stack(options: Sequence[Decorator]) -> Decorator:
    """Several options as one decorator."""

    def decorate(function: _F) -> _F:
        for one in reversed(options):
            function = one(function)
        return function

    return decorate


def _size(_ctx: click.Context, _param: click.Parameter, value: str | None) -> tuple[int, int] | None:
    return None if value is None else parse_size(value)


def parse_size(value: str) -> tuple[int, int]:
    """Parse a network input, ``512`` or ``640x480``, as ``(W, H)``."""
    parts = value.lower().split("x")
    if len(parts) not in (1, 2) or not all(part.strip().isdecimal() for part in parts):
        raise click.BadParameter(f"{value!r} is not a size; allowed: N or WxH in pixels, such as 512 or 640x480")
    numbers = [int(part) for part in parts]
    return (numbers[0], numbers[-1])


def parse_numbers(
    least: int, most: int = sys.maxsize
) -> Callable[[click.Context, click.Parameter, str | None], tuple[int, ...] | None]:
    """Make a callback that reads a list such as ``1,4,8``: whole numbers in a range, each once, in their order."""

    def parse(_ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int, ...] | None:
        if value is None:
            return None
        parts = [part.strip() for part in value.split(",")]
        if not all(part.isdecimal() and least <= int(part) <= most for part in parts):
            span = f"from {least}" if most == sys.maxsize else f"from {least} to {most}"
            raise InputError(
                f"{param.opts[0]} is {value!r}; allowed: whole numbers {span}, with commas between, such as 1,4,8"
            )
        return tuple(dict.fromkeys(int(part) for part in parts))

    return parse


def build_recipe(
    *,
    recipe_name: str | None = None,
    model: str | None = None,
    revision: str | None = None,
    random_weights: int | None = None,
    size: tuple[int, int] | None = None,
    ensemble: int | None = None,
    taps: tuple[str, ...] = (),
    timestep: int | None = None,
    prompt: str | None = None,
    seed: int | None = None,
    noise: str | None = None,
    prompts: str | None = None,
    prompt_mode: str | None = None,
    matcher: str | None = None,
    interpolation: str | None = None,
) -> Recipe:
    """Build the recipe that the options ask for: the named one, with what was given put in its place."""
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
    reference = reference_to(model, revision, random_weights, recipe.model)
    changes: dict[str, Any] = {"model": reference, "size": size, "ensemble": ensemble, "seed": seed, "noise": noise}
    changes["learned"] = _learned(recipe, prompt, prompts, prompt_mode)
    if noise is None and recipe.noise == "antithetic" and ensemble is not None and ensemble % 2:
        changes["noise"] = "independent"  # no pairs can be made of an odd number
    changes = {name: value for name, value in changes.items() if value is not None}
    return dataclasses.replace(recipe, branches=branches, matcher=new_matcher, **changes)


def reference_to(
    model: str | None, revision: str | None, random_weights: int | None, otherwise: ModelReference
) -> ModelReference:
    """Put together which checkpoint is meant: what was given, and the rest as it is otherwise."""
    return dataclasses.replace(
        otherwise,
        name=model or otherwise.name,
        revision=otherwise.revision if revision is None else revision,
        random_weights=otherwise.random_weights if random_weights is None else random_weights,
    )


def _checkpoint(model: str | None, revision: str | None, random_weights: int | None) -> ModelReference:
    from difftap.recipe import ModelReference

    return reference_to(model, revision, random_weights, ModelReference("pocket"))


def with_category(recipe: Recipe, category: str | None) -> Recipe:
    """Put the category into the recipe's prompts, so that its key and record name what was really asked.

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
    """Say which learned prompts take the place of the recipe's; None to leave those as they are."""
    from difftap.recipe import Learned

    if prompt is not None and (path is not None or recipe.learned is not None):
        raise InputError("--prompt gives a text, and this recipe has learned prompts in its place; leave one out")
    if path is None and mode is None:
        return None
    known = recipe.learned or (Learned(path) if path is not None else None)
    if known is None:
        raise InputError("--prompt-mode goes with learned prompts; give them by --prompts DIR")
    return dataclasses.replace(known, path=path or known.path, mode=mode or known.mode)


RECIPE_NAMES = tuple(inspect.signature(build_recipe).parameters)
"""Options that decide the recipe."""


cache_option = runtime_option(
    "--cache",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Cache folder.  [default: $DIFFTAP_CACHE or the user's]",
)


model_options = stack(
    [
        recipe_option(
            "--model",
            metavar="M",
            help="Model: pocket, sd15, sd21, sdxl, a diffusers-format folder, or a hub id; and +FILE.safetensors for "
            "another UNet's weights in it (CleanDIFT).",
        ),
        recipe_option("--revision", metavar="REV", help="Branch, tag or commit of a hub id."),
        recipe_option(
            "--random-weights",
            type=int,
            metavar="SEED",
            help="Build sd15, sd21 or sdxl at full size with seeded random weights.",
        ),
    ]
)


checkpoint_options = stack([model_options, gives("reference", _checkpoint)])
"""Which checkpoint, for commands that need no recipe: gives ``reference``."""


size_option = recipe_option("--size", callback=_size, metavar="N|WxH", help="Network input in pixels.")


def _feature_list(default: str, *, sized: bool = True) -> list[Decorator]:
    return [
        recipe_option(
            "--recipe",
            "recipe_name",
            metavar="R",
            help=f"Recipe: a preset ('difftap recipes') or a TOML file.  [default: {default}]",
        ),
        model_options,
        *([size_option] if sized else []),
        recipe_option("--ensemble", type=int, metavar="E", help="Noise samples averaged per image."),
        recipe_option(
            "--tap", "taps", multiple=True, metavar="TAP", help="Tap to read, for a recipe of one branch (repeatable)."
        ),
        recipe_option("--timestep", type=int, metavar="T", help="Timestep, for a recipe of one branch."),
        recipe_option("--prompt", metavar="TEXT", help="Text that conditions every branch.  [default: the recipe's]"),
        recipe_option("--prompts", metavar="DIR", help="Learned prompts ('difftap tune') in the text's place."),
        recipe_option(
            "--prompt-mode", metavar="MODE", help="Of conditional ones: pair (exact), class or image.  [default: pair]"
        ),
        recipe_option("--seed", type=int, metavar="N", help="Seed of the noise."),
        recipe_option(
            "--noise",
            metavar="KIND",
            help="independent, antithetic (pairs of opposite sign), or none with ensemble 1.  [default: the recipe's; "
            "independent where --ensemble is odd]",
        ),
    ]


def feature_options(default: str, *, sized: bool = True, make: Callable[..., Recipe | None] | None = None) -> Decorator:
    """Make the recipe's options but for the matcher's, for commands that match nothing; ``default`` names their recipe.

    Without ``sized`` there is no --size, for commands that go through several; ``make`` stands in for `build_recipe`
    where a command has a default of its own.
    """
    return stack([*_feature_list(default, sized=sized), gives("recipe", make or build_recipe, *RECIPE_NAMES)])


recipe_options = stack(
    [
        *_feature_list("pocket; dift with --model"),
        recipe_option(
            "--matcher",
            metavar="NAME",
            help="dense, nn, bilinear, softargmax, kernel-softargmax, window-softargmax or mutual.",
        ),
        recipe_option(
            "--interpolation", metavar="KIND", help="How the dense matcher reads between cells: bilinear or bicubic."
        ),
        gives("recipe", build_recipe),
    ]
)

json_option = click.option(
    "--json", "json_file", type=click.Path(path_type=Path), metavar="FILE", help="Write the result as JSON too."
)

store_option = option(
    "--features", metavar="STORE", help="Take features from a store where it has them ('difftap extract')."
)

category_option = recipe_option(
    "--category",
    metavar="WORD",
    help="What the images show: fills {category} in the recipe's prompt.  [default: such a prompt stays empty]",
)

runtime_options = stack(
    [
        runtime_option(
            "--backend",
            default="ort",
            show_default=True,
            metavar="B",
            help="ort, openvino, tensorrt-rtx, tensorrt, torch, or auto: the fastest here, by measurement.",
        ),
        runtime_option(
            "--device",
            default="auto",
            show_default=True,
            metavar="D",
            help="auto, cpu, cuda, intel-gpu, or what else 'difftap doctor' lists.",
        ),
        runtime_option(
            "--precision",
            default="fp32",
            show_default=True,
            metavar="P",
            help="fp32, bf16x3, fp16, bf16 or int8, as far as the backend has it ('difftap doctor').",
        ),
        runtime_option(
            "--calibrate",
            type=click.Path(path_type=Path),
            multiple=True,
            metavar="FILE|DIR",
            help="Pictures to calibrate int8 engines on (repeatable).  [default: a bundled few]",
        ),
        runtime_option("--threads", type=click.IntRange(min=1), metavar="N", help="CPU threads.  [default: all cores]"),
        runtime_option(
            "--batch",
            type=click.IntRange(min=1),
            default=1,
            show_default=True,
            metavar="N",
            help="Images per engine run on a GPU; a CPU takes one at a time.",
        ),
        cache_option,
        gives(
            "runtime",
            "difftap.pipeline.environment:Runtime",
            *("backend", "device", "threads", "batch", "cache", "precision", "calibrate"),
        ),
    ]
)
