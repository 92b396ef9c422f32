"""The command line: ``difftap COMMAND``.

Commands load when they are asked for, so that ``difftap --help`` imports nothing heavy. Their bodies parse, call one
library function and print. stdout is data, stderr is log; bad input ends with one line and exit code 2.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys

import click

from difftap.commands.lazy import LazyGroup
from difftap.errors import DifftapError
from difftap.version import __version__

__all__ = ["cli", "main"]

_COMMANDS = {
    "bench": ("difftap.commands.bench:bench", "Measure speed, memory and quality."),
    "data": ("difftap.commands.data:data", "Look at the benchmarks' data sets."),
    "doctor": ("difftap.commands.doctor:doctor", "Say what is installed, what is missing and how to get it."),
    "engines": ("difftap.commands.engines:engines", "Build, list, verify and remove engines."),
    "export": ("difftap.commands.export:export", "Export a model's networks to ONNX and hold them against torch."),
    "extract": ("difftap.commands.extract:extract", "Extract a data set's features into a store."),
    "index": ("difftap.commands.index:index", "Index prototypes or patch features, search them, judge the hits."),
    "match": ("difftap.commands.match:match", "Find corresponding points in two images, or in many pairs."),
    "prompts": ("difftap.commands.prompts:prompts", "List learned prompts, and show where one comes from."),
    "prototypes": ("difftap.commands.prototypes:prototypes", "Build object prototypes, and look at them."),
    "recipes": ("difftap.commands.recipes:recipes", "List the named recipes, or show one as TOML."),
    "store": ("difftap.commands.store:store", "Look at a feature store, verify it, make it compact."),
    "taps": ("difftap.commands.taps:taps", "List a model's taps."),
    "tune": ("difftap.commands.tune:tune", "Learn prompts for matching."),
}


@click.group(
    cls=LazyGroup, homes=_COMMANDS, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}
)
@click.version_option(__version__, prog_name="difftap")
@click.option("-v", "--verbose", is_flag=True, help="Say more of what is being done, on stderr.")
def cli(verbose: bool) -> None:
    """Fast intermediate features of Stable Diffusion's UNet: matching, retrieval, benchmarks."""
    # Other packages' chatter stays out: they log by the hundred while a network is exported.
    logging.basicConfig(level=logging.ERROR, format="%(levelname)s: %(message)s", stream=sys.stderr, force=True)
    logging.getLogger("difftap").setLevel(logging.DEBUG if verbose else logging.INFO)


def main() -> None:
    """Entry point: turn our errors into one line and exit code 2."""
    try:
        code = cli.main(standalone_mode=False)
    except click.exceptions.Abort:
        click.echo("interrupted", err=True)
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except DifftapError as error:
        click.echo(f"error: {' '.join(str(error).removesuffix(error.detail).split())}", err=True)
        if error.detail:
            click.echo(error.detail, err=True)
        sys.exit(2)
    except OSError as error:  # a file's is a DifftapError by now: what is left is stdout on a full disk
        _drop_stdout()
        click.echo(f"error: cannot write the result ({error.strerror or error})", err=True)
        sys.exit(2)
    except MemoryError:
        click.echo("error: out of memory; use a smaller --size, --ensemble or --batch", err=True)
        sys.exit(2)
    if isinstance(code, int) and code:  # of click's own Exit, which it gives back where it is not in charge
        sys.exit(code)


def _drop_stdout() -> None:
    """Let what is still buffered go nowhere, or Python would complain of it while it shuts down."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
