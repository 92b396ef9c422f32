"""The poster's table on this machine: every row a run of `difftap.bench.session`, then one table a protocol.

A run that was stopped goes on where it was. Features are kept, so that a branch that several rows share is extracted
once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from difftap.artifacts.files import write_atomic
from difftap.artifacts.run import ProgressBar, no_bar
from difftap.bench.poster import PosterRow
from difftap.bench.protocols import get_protocols
from difftap.bench.report import result_table
from difftap.bench.scoring import Resampling
from difftap.bench.session import Pairs, match_pairs, write_results
from difftap.errors import DifftapError, InputError
from difftap.pipeline.pipeline import Provider
from difftap.recipe import Recipe

__all__ = ["reproduce"]


def reproduce(
    rows: Sequence[PosterRow],
    sets: Sequence[Pairs],
    folder: Path,
    opener: Callable[[Recipe], Provider],
    *,
    settings: Resampling | None = None,
    memory: int = 2 << 30,
    features: Path | None = None,
    overwrite: bool = False,
    say: Callable[[str], None] = lambda text: None,
    bar: ProgressBar = no_bar,
) -> dict[str, dict[str, Mapping[str, Any]]]:
    """Run every row on every data set; after each, write the data set's table, ours below the published rows.

    A row that cannot run here (its graphs are missing, say) is left out, and said. Features are kept under
    ``folder`` unless another place is given, so that a branch that several rows share is extracted once; not those
    of rows whose prompts are made for each pair.

    Returns:
        results by data set and row.

    Raises:
        InputError: there is nothing to run, or no row can run here.
    """
    if not sets or not rows:
        raise InputError("nothing to reproduce; give the root of at least one data set")
    made: dict[str, dict[str, Mapping[str, Any]]] = {}
    refusals: list[str] = []
    kept = features or folder / "features"
    with bar(len(rows) * sum(len(pairs.samples) for pairs in sets)) as advance:
        for pairs in sets:
            name = str(pairs.about["name"])
            made[name] = {}
            for row in rows:
                place = folder / name / row.name
                say(f"{name}: {row.name}")
                options: dict[str, Any] = {"memory": memory, "overwrite": overwrite, "progress": advance}
                try:
                    options["features"] = kept if row.keepable else None
                    with opener(row.recipe) as pipeline:
                        run = match_pairs(pipeline, pairs, row.recipe, place, rule=row.rule, **options)
                except DifftapError as error:
                    reason = " ".join(str(error).split())
                    refusals.append(reason)
                    say(f"{name}: {row.name} left out: {reason}")
                    continue
                say(f"{name}: {row.name}: {run.written} pairs in {run.seconds:.0f} s, {run.skipped} already there")
                made[name][row.name] = write_results(place, get_protocols(), settings)
                _write_tables(folder / name, made[name])  # a run that is stopped leaves the rows that are done
    if not any(made.values()):
        raise InputError(f"no row can run here: {refusals[0]}")
    return made


def _write_tables(folder: Path, results: Mapping[str, Mapping[str, Any]]) -> None:
    """One table a protocol, at alpha 0.05, for all rows that have it."""
    text, tex = [], []
    for protocol in get_protocols():
        runs = [(name, one) for name, one in results.items() if protocol.name in one["protocols"]]
        if runs:
            by = "point" if protocol.headline == "point" else "image"
            table = result_table(runs, protocol.name, 0.05, by, show_published=True)
            text.append(f"## {protocol.name}\n\n{table.markdown()}")
            tex.append(table.latex())
    write_atomic(folder / "table.md", "\n".join(text))
    write_atomic(folder / "table.tex", "\n".join(tex))
