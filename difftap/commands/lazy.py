"""Groups whose commands are imported on use, and what was renamed: all that ``difftap --help`` needs."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import click

from difftap.errors import InputError

__all__ = ["RENAMED", "LazyGroup"]

_CURVE = "the curve over ensemble sizes is measured no more; docs/recipes.md has what it showed"

RENAMED = {
    "bench dense-speed": "'bench dense-speed' is gone: benchmarks/matching.py in the repository times dense matching",
    "bench distances": "'bench distances' is gone: benchmarks/distances.py in the repository measures it",
    "bench extract": "'bench extract' is gone: 'difftap extract' says at its end how fast it was",
    "bench matching": "'bench matching' is gone: benchmarks/matching.py in the repository measures it",
    "bench reproduce --estimate-only": "--estimate-only is gone: a run can be stopped and goes on where it was",
    **{
        f"bench throughput --{name}": f"--{name} is gone: {_CURVE}"
        for name in ("ensemble-curve", "curve-timesteps", "curve-passes", "curve-limit")
    },
}
"""What to say to a command (``bench old``) or an option (``bench pck --old``) that was renamed or removed."""


class LazyGroup(click.Group):
    """A group whose commands are imported when they are asked for."""

    def __init__(self, *names: Any, homes: Mapping[str, tuple[str, str]] | None = None, **settings: Any) -> None:
        """Take the place, ``module:name``, and the line of help of each command."""
        super().__init__(*names, **settings)
        self.homes = homes or {}

    def list_commands(self, ctx: click.Context) -> list[str]:
        """List the names in order."""
        return sorted({*self.homes, *self.commands})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command; one that was renamed or removed answers with what takes its place."""
        if cmd_name not in self.homes:
            known = super().get_command(ctx, cmd_name)
            if known is not None:
                return known
            answer = RENAMED.get(" ".join((*ctx.command_path.split()[1:], cmd_name)))
            if answer is not None:
                raise InputError(answer)
            return None
        module, name = self.homes[cmd_name][0].split(":")
        command: click.Command = getattr(importlib.import_module(module), name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands without importing them."""
        if self.commands:
            super().format_commands(ctx, formatter)
            return
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in sorted(self.homes.items())])
