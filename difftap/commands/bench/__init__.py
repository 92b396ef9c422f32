"""``difftap bench``: measurements, one subcommand each."""

from __future__ import annotations

import click

from difftap.commands.bench.compare import compare
from difftap.commands.bench.gpu_check import gpu_check
from difftap.commands.bench.index import index as index_bench
from difftap.commands.bench.pck import pck
from difftap.commands.bench.reproduce import reproduce
from difftap.commands.bench.semantics import semantics
from difftap.commands.bench.table import table
from difftap.commands.bench.throughput import throughput
from difftap.commands.lazy import LazyGroup


@click.group(cls=LazyGroup)
def bench() -> None:
    """Measure speed, memory and quality."""


for _command in (pck, compare, table, reproduce, throughput, semantics, gpu_check, index_bench):
    bench.add_command(_command)
