"""One page of what `make bench` measured: throughput and PCK, as Markdown and as HTML.

    python benchmarks/page.py out/bench

reads ``throughput/throughput.json`` and ``pck/results.json`` there and writes ``bench.md`` and ``bench.html``.
"""

from __future__ import annotations

import argparse
import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from difftap.artifacts.files import write_atomic
from difftap.artifacts.table import Table, TableColumn
from difftap.bench.report import conditions_line, headline_of


def pck_table(results: Mapping[str, Any]) -> Table:
    """Make a table of every protocol's own mean at each of its thresholds, with its interval."""
    columns = (
        TableColumn("protocol", left=True),
        TableColumn("alpha"),
        TableColumn("PCK", "%", ".2f"),
        TableColumn("low", "%", ".1f"),
        TableColumn("high", "%", ".1f"),
        TableColumn("over", left=True),
    )
    rows = []
    for name, one in results["protocols"].items():
        by = one["conditions"]["headline"]
        for alpha, figures in one["pck"].items():
            if alpha in ("pairs", "points"):  # counts stand beside the thresholds
                continue
            mean = figures[by]
            rows.append((name, alpha, mean["value"], mean["low"], mean["high"], by))
    note = "Of 95 % intervals, low and high; over which each protocol's authors take the mean stands last."
    return Table(columns, tuple(rows), "PCK", note)


def throughput_table(measured: Mapping[str, Any]) -> Table:
    """Make a table of every way's images a second, the best in bold; one that failed has no figures."""
    columns = (
        TableColumn("way", left=True),
        TableColumn("images/s", form=".2f"),
        TableColumn("image", "ms", ".1f"),
        TableColumn("lowest", "ms", ".1f"),
        TableColumn("highest", "ms", ".1f"),
        TableColumn("peak memory", "MB", ".0f"),
    )
    rows = []
    for row in measured["rows"]:
        timing = row["timing"] or dict.fromkeys(("median", "low", "high"))
        rows.append((row["label"], row["rate"], timing["median"], timing["low"], timing["high"], row["peak"]))
    return Table(columns, tuple(rows), "Throughput").with_best([1])


def main(arguments: Sequence[str] | None = None) -> None:
    """Read both results, write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args(arguments).folder
    measured = json.loads((folder / "throughput" / "throughput.json").read_text(encoding="utf-8"))
    results = json.loads((folder / "pck" / "results.json").read_text(encoding="utf-8"))
    speed, points = throughput_table(measured), pck_table(results)
    about = measured["conditions"]
    told = f"{about['cpu']}, {about['threads']} threads, difftap {about['difftap']}; rivals are DIFT's way in torch."
    failed = [f"{row['label']} could not be measured: {row['failed']}" for row in measured["rows"] if row["failed"]]
    notes = [told, *failed]
    title, head = "difftap: speed and quality here", f"{headline_of(results)}. {conditions_line(results)}"
    page = [f"# {title}", "", speed.markdown(), *notes, "", points.markdown(), head, ""]
    write_atomic(folder / "bench.md", "\n".join(page))
    body = "".join(f"<p>{html.escape(note)}</p>" for note in notes)
    write_atomic(
        folder / "bench.html",
        f'<!doctype html><meta charset="utf-8"><title>{title}</title>'
        "<style>body{font:15px sans-serif;margin:2em}td,th{padding:.2em .8em;text-align:right}</style>"
        f"<h1>{title}</h1>{speed.html()}{body}{points.html()}<p>{html.escape(head)}</p>\n",
    )
    print(f"wrote {folder / 'bench.md'} and {folder / 'bench.html'}")


if __name__ == "__main__":
    main()
