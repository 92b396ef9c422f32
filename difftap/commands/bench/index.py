"""``difftap bench index``: recall, speed and size of indexes, beside FAISS itself."""

from __future__ import annotations

import json
from pathlib import Path

import click

from difftap.commands.options import json_option

__all__ = ["index"]

_FILE = click.Path(path_type=Path)


@click.command()
@click.option("--vectors", type=click.IntRange(1000), default=200_000, show_default=True, help="Vectors to index.")
@click.option("--width", type=click.IntRange(1), default=1280, show_default=True, help="Numbers of a vector.")
@click.option("--queries", type=click.IntRange(1), default=1000, show_default=True, help="Queries, not in the index.")
@click.option(
    "--kind",
    "kinds",
    type=click.Choice(["flat", "ivf", "ivf-pq", "hnsw"]),
    multiple=True,
    default=("ivf-pq",),
    show_default=True,
    help="Kind of index (repeatable).",
)
@click.option("--metric", default="correlation", show_default=True, help="correlation, cosine, euclidean, manhattan.")
@click.option("--recall", type=float, default=0.95, show_default=True, metavar="R", help="Recall@10 to search for.")
@click.option("--lists", type=click.IntRange(1), metavar="N", help="ivf, ivf-pq: lists.  [default: about sqrt(rows)]")
@click.option("--codes", type=click.IntRange(1), metavar="B", help="ivf-pq: bytes of a code.  [default: width / 8]")
@click.option(
    "--refine/--no-refine", default=True, show_default=True, help="ivf-pq: keep 8-bit vectors, rank the best by them."
)
@click.option("--direct/--no-direct", default=True, show_default=True, help="Also FAISS used directly.")
@click.option("--half/--single", default=True, show_default=True, help="float16 or float32 in the file.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the vectors.")
@click.option("--repeats", type=click.IntRange(1), default=3, show_default=True, help="Rounds of searching.")
@click.option("--gpu", is_flag=True, help="Train and fill ours on the GPU (needs faiss-gpu); the search is the CPU's.")
@click.option("--file", type=_FILE, metavar="FILE", help="Keep the vectors there, and use them again.")
@json_option
def index(
    vectors: int,
    width: int,
    queries: int,
    kinds: tuple[str, ...],
    metric: str,
    recall: float,
    lists: int | None,
    codes: int | None,
    refine: bool,
    direct: bool,
    half: bool,
    seed: int,
    repeats: int,
    gpu: bool,
    file: Path | None,
    json_file: Path | None,
) -> None:
    """Indexes of generated vectors: recall against exact, queries/s, build time and bytes, beside FAISS itself.

    A million vectors of 1280 take 2.6 GB of disk (5 GB with --single), about 2 GB of memory and some minutes.
    """
    import tempfile

    from difftap.artifacts.files import write_atomic
    from difftap.bench.indexing import IndexCase, format_table, run, to_json
    from difftap.retrieval.builder import IndexOptions

    case = IndexCase(vectors, width, queries, half, seed)
    some = "ivf-pq" if "ivf-pq" in kinds else "ivf" if lists else "flat"
    options = IndexOptions(some, metric, lists, codes, refine and some == "ivf-pq", recall, 0, gpu)
    with tempfile.TemporaryDirectory(prefix="difftap-") as scratch:
        result = run(
            case,
            kinds,
            file or Path(scratch) / "vectors",
            options,
            direct=direct,
            repeats=repeats,
            say=lambda text: click.echo(text, err=True),
        )
    for line in format_table(result):
        click.echo(line)
    if json_file is not None:
        write_atomic(json_file, json.dumps(to_json(result), indent=1) + "\n")
