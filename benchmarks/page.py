"""One page of what `make bench` measured: throughput and PCK, as Markdown and as HTML.

    python benchmarks/page.py out/bench

reads ``throughput/throughput.json`` and ``pck/results.json`` there and writes ``bench.md`` and ``bench.html``.
"""

from __future__ import annotations

import html
import json
import sys
from pathlib import Path

from difftap.artifacts.files import write_atomic
from difftap.artifacts.table import Table, TableColumn
from difftap.bench.report import format_results


def main() -> None:
    """Read both results, write the page."""
    folder = Path(sys.argv[1])
    measured = json.loads((folder / "throughput" / "throughput.json").read_text(encoding="utf-8"))
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
    speed = Table(columns, tuple(rows), "Throughput").with_best([1])
    about = measured["conditions"]
    told = f"{about['cpu']}, {about['threads']} threads, difftap {about['difftap']}; rivals are DIFT's way in torch."
    failed = [f"{row['label']} could not be measured: {row['failed']}" for row in measured["rows"] if row["failed"]]
    text = "\n".join(format_results(json.loads((folder / "pck" / "results.json").read_text(encoding="utf-8"))))
    notes = [told, *failed]
    write_atomic(
        folder / "bench.md",
        "\n".join(
            [
                "# difftap: speed and quality here",
                "",
                speed.markdown(),
                *notes,
                "",
                "### PCK",
                "",
                "```",
                text,
                "```",
                "",
            ]
        ),
    )
    body = "".join(f"<p>{html.escape(note)}</p>" for note in notes)
    write_atomic(
        folder / "bench.html",
        '<!doctype html><meta charset="utf-8"><title>difftap: speed and quality here</title>'
        "<style>body{font:15px sans-serif;margin:2em}td,th{padding:.2em .8em;text-align:right}</style>"
        f"<h1>difftap: speed and quality here</h1>{speed.html()}{body}<h2>PCK</h2><pre>{html.escape(text)}</pre>\n",
    )
    print(f"wrote {folder / 'bench.md'} and {folder / 'bench.html'}")


if __name__ == "__main__":
    main()
