"""Make the poster's table on this machine: each row is a run of `difftap.bench.session`; each protocol gets a table.

A run that was stopped continues. Features are kept, so that a branch that several rows share is extracted only once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from difftap.artifacts.files import JsonObject, write_atomic
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
) -> dict[str, dict[str, JsonObject]]:
    """Run every row on every data set; after each row, write the data set's tables, ours below the published rows.

    A row that cannot run here (because its graphs are missing, for example) is left out, with a message.

    Args:
        rows: the methods.
        sets: the data sets' pairs.
        folder: the folder of all output.
        opener: opens a pipeline for a recipe.
        settings: how results are resampled.
        memory: bytes of maps kept in memory.
        features: folder of kept features; by default ``features`` below ``folder``. Features of rows whose prompts
            are made for each pair are not kept.
        overwrite: start again instead of continuing.
        say: called with what is being done.
        bar: shows progress over pairs.

    Returns:
        data set -> row -> results.

    Raises:
        InputError: there is nothing to run, or no row can run here.
    """
    if not sets or not rows:
        raise InputError("nothing to reproduce; give the root of at least one data set")
    made: dict[str, dict[str, JsonObject]] = {}
    refusals: list[str] = []
    kept = features or folder / "features"
    with bar(len(rows) * sum(len(pairs.samples) for pairs in sets)) as advance:
        for pairs in sets:
            name = str(pairs.about["name"])
            made[name] = {}
            for row in rows:
                place = folder / name / row.name
                say(f"{name}: {row.name}")
                try:
                    maps = kept if row.keepable else None  # reads the prompt file, so it may fail
                    with opener(row.recipe) as pipeline:
                        run = match_pairs(
                            pipeline,
                            pairs,
                            row.recipe,
                            place,
                            rule=row.rule,
                            features=maps,
                            memory=memory,
                            overwrite=overwrite,
                            progress=advance,
                        )
                except DifftapError as error:
                    reason = " ".join(str(error).split())
                    refusals.append(reason)
                    say(f"{name}: {row.name} left out: {reason}")
                    continue
                say(f"{name}: {row.name}: {run.written} pairs in {run.seconds:.0f} s, {run.skipped} already there")
                made[name][row.name] = write_results(place, get_protocols(), settings)
                _write_tables(folder / name, made[name])  # after each row, so that a stopped run leaves a table
    if not any(made.values()):
        raise InputError(f"no row can run here: {refusals[0]}")
    return made


def _write_tables(folder: Path, results: Mapping[str, JsonObject]) -> None:
    """Write one table per protocol, at alpha 0.05, of all rows that it applies to."""
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
