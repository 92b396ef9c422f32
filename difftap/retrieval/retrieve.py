"""Indexes used: built, opened, searched and judged, wherever they lie."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from difftap.errors import InputError
from difftap.images import is_picture
from difftap.retrieval.builder import IndexOptions, build_folder
from difftap.retrieval.faiss_folder import FolderIndex, check_new
from difftap.retrieval.index import Index, Rows, VectorBatch, VectorOrigin, is_milvus
from difftap.retrieval.quality import Quality, judge, summarise, vote

__all__ = ["SCHEMA", "build_index", "check_place", "describe", "evaluate", "open_index", "same_image", "search_record"]

SCHEMA = 1
"""Version of the JSON that searches and evaluations are written in; docs/index.md describes it."""

MOST_HITS = 10_000
"""Hits that an evaluation looks at, unless told otherwise, where an index has more rows."""


def open_index(where: str, *, name: str = "difftap", gpu: bool = False) -> Index:
    """Open an index in a folder, or in Milvus.

    Raises:
        InputError: there is none.
        ArtefactError, BackendError, MissingExtraError: it cannot be opened.
    """
    if is_milvus(where):
        from difftap.retrieval.milvus import MilvusIndex

        if gpu:
            raise InputError("--gpu is for an index in a folder; a Milvus server has its own")
        return MilvusIndex.open(where, name)
    return FolderIndex.open(Path(where), gpu=gpu)


def check_place(where: str, overwrite: bool) -> None:
    """Make sure, before anything slow, that an index can be made there, as far as that can be told.

    Raises:
        OutputError: something else stands there.
    """
    if not is_milvus(where):
        check_new(Path(where), overwrite)


def build_index(
    where: str,
    origin: VectorOrigin,
    batches: Iterable[VectorBatch],
    options: IndexOptions,
    *,
    overwrite: bool = False,
    name: str = "difftap",
) -> Index:
    """Build an index and open it; see `build_folder` and `difftap.retrieval.milvus.build_milvus`."""
    if is_milvus(where):
        from difftap.retrieval.milvus import build_milvus

        return build_milvus(where, origin, batches, options, overwrite=overwrite, name=name)
    return build_folder(Path(where), origin, batches, options, overwrite=overwrite)


def describe(index: Index) -> dict[str, Any]:
    """Say in an answer what is known of the index it comes from."""
    about = index.about
    return {
        "where": index.where,
        "source": about.origin.source,
        "kind": about.kind,
        "metric": about.metric,
        "width": about.width,
        "rows": about.count,
        "taps": about.origin.taps,
        "timestep": about.origin.timestep,
        "feature_key": about.origin.feature_key,
        "model_key": about.origin.model_key,
        "precision": about.origin.precision,
        "stored": about.origin.stored or None,
        **about.report,
    }


def same_image(key: str, images: NDArray[np.str_]) -> NDArray[np.bool_]:
    """Which of some images are the one of a key: equal, or one a path that ends in the other, its ending aside."""
    names: NDArray[np.bool_] = images == key
    if not key:
        return names
    stem = _stem(key)
    alike = [
        (one := _stem(name)) == stem or one.endswith(f"/{stem}") or stem.endswith(f"/{one}") for name in images.tolist()
    ]
    return np.asarray(names | np.array(alike, bool))


def _stem(key: str) -> str:
    path = Path(key)
    return (path.with_suffix("") if is_picture(path) else path).as_posix()


def search_record(
    index: Index, vector: NDArray[np.float32], k: int, *, key: str = "", other_images: bool = False
) -> dict[str, Any]:
    """Find what is nearest to a vector ``(D,)``, as plain data: what a score means, the hits, the class they vote for.

    Args:
        index: searched.
        vector: not prepared.
        k: hits.
        key: the query's image.
        other_images: leave out hits in the query's own image.
    """
    wanted = k
    while True:
        scores, rows = index.search(vector[None], wanted)
        found = rows[0] >= 0
        facts = index.facts(rows[0][found])
        keep = np.ones(len(facts), bool)
        if other_images:
            keep = ~same_image(key, facts.images)
        if keep.sum() >= k or wanted >= index.about.count or not found.all():
            break
        wanted = min(index.about.count, 2 * wanted + 64)
    chosen = np.flatnonzero(keep)[:k]
    hits = [
        {
            "rank": n,
            "row": int(rows[0][found][i]),
            "score": round(float(scores[0][found][i]), 6),
            **facts.record(int(i)),
        }
        for n, i in enumerate(chosen, 1)
    ]
    known = facts.classes[chosen]
    return {"score": index.about.space.meaning, "class": vote(known[known != ""]), "hits": hits}


def evaluate(
    index: Index,
    batches: Iterable[VectorBatch],
    *,
    ks: Sequence[int] = (1, 5, 10),
    neighbours: int = 5,
    depth: int | None = None,
    progress: Callable[[int], None] = lambda count: None,
) -> tuple[Quality, int]:
    """Search for every vector of some batches, leaving out its own image, and judge the hits by class.

    Args:
        index: searched.
        batches: queries with their classes and images.
        ks: of recall@k.
        neighbours: hits that vote for a class.
        depth: hits looked at; all rows by default, at most `MOST_HITS`.
        progress: told how many queries are done.

    Returns:
        the figures, and the depth.

    Raises:
        InputError: no row of the index has a class, or there is no query.
    """
    rows = index.rows()
    if not (rows.classes != "").any():
        raise InputError(f"the rows of index '{index.where}' have no class; build it with --labels folder, or a table")
    looked = min(depth or min(len(rows), MOST_HITS), len(rows))
    ks = sorted({min(k, looked) for k in ks})
    # Own images are left out afterwards, so as many more hits are asked for as the fullest image has rows.
    _, per_image = np.unique(rows.images, return_counts=True)
    reach = min(len(rows), looked + int(per_image.max()))
    parts = []
    for batch in batches:
        for start in range(0, len(batch.rows), 256):
            some = slice(start, start + 256)
            _, hits = index.search(batch.vectors[some], reach)
            queries = batch.rows.take(some)
            parts.append(_judged(hits, queries, rows, ks, min(neighbours, looked), looked))
            progress(len(queries))
    if not parts:
        raise InputError("there is no query: no vector was given")
    return summarise(parts, ks), looked


def _judged(hits: NDArray[np.int64], queries: Rows, rows: Rows, ks: Sequence[int], neighbours: int, depth: int) -> Any:
    return judge(
        hits, queries.classes, queries.images, rows.classes, rows.images, ks=ks, neighbours=neighbours, depth=depth
    )
