"""How tests run difftap's commands: in this process, or as a user does in one of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import click
from click.testing import CliRunner, Result

ROOT = Path(__file__).parents[1]
DIFFTAP = (sys.executable, "-m", "difftap.cli")


def invoke(arguments: Sequence[object], command: click.Command | None = None, **settings) -> Result:
    """Run a command in this process, as its texts say: exit code, stdout, stderr, and the exception if there was one.

    Args:
        arguments: paths and numbers may stand as they are.
        command: one of ours; the whole of difftap by default.
        settings: ``env`` and ``catch_exceptions``, as click takes them.
    """
    from difftap.cli import cli

    return CliRunner().invoke(command or cli, [str(one) for one in arguments], **settings)


def child_environment(**more: str) -> dict[str, str]:
    """Give an environment in which a child process imports the difftap that is under test."""
    return {**os.environ, "PYTHONPATH": str(ROOT), **more}


def run_child(arguments: Sequence[object], **settings) -> subprocess.CompletedProcess:
    """Run difftap in a process of its own and wait for it; ``settings`` as `subprocess.run` takes them."""
    given = {"capture_output": True, "text": True, "timeout": 300, "env": child_environment(), **settings}
    return subprocess.run([*DIFFTAP, *map(str, arguments)], check=False, **given)
