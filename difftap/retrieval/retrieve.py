"""Build, open, search and evaluate indexes, in a folder or in Milvus."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from difftap.artifacts.files import JsonObject
from difftap.artifacts.run import ProgressBar, no_bar
from difftap.errors import InputError
from difftap.features.provider import open_features
from difftap.images import is_picture
from difftap.pipeline.environment import Runtime
from difftap.pipeline.pipeline import Provider
from difftap.recipe import Recipe
from difftap.retrieval.builder import IndexOptions, build_folder
from difftap.retrieval.faiss_folder import FolderIndex, check_new
from difftap.retrieval.index import Index, Rows, VectorBatch, VectorOrigin, is_milvus
from difftap.retrieval.quality import Quality, QueryFigures, judge, summarise, vote
from difftap.retrieval.queries import Query, Weights, embed, open_pipeline
from difftap.retrieval.vectors import AlreadyIndexed, Patches, are_tables, list_images, open_tables, patch_batches

__all__ = [
    "SCHEMA",
    "add_sources",
    "build_index",
    "check_place",
    "describe",
    "evaluate",
    "index_sources",
    "judge_sources",
    "open_index",
    "same_image",
    "search_index",
    "search_record",
]

SCHEMA = 1
"""Version of the JSON of searches and evaluations; docs/index.md describes it."""

MOST_HITS = 10_000
"""An evaluation judges at most so many hits per query, unless a depth is given."""


def open_index(where: str, *, name: str = "difftap", gpu: bool = False) -> Index:
    """Open an index in a folder, or in Milvus.

    Raises:
        InputError: there is none.
        ArtifactError, BackendError, MissingExtraError: it cannot be opened.
    """
    if is_milvus(where):
        from difftap.retrieval.milvus import MilvusIndex

        if gpu:
            raise InputError("--gpu is for an index in a folder; a Milvus server has its own")
        return MilvusIndex.open(where, name)
    return FolderIndex.open(Path(where), gpu=gpu)


def check_place(where: str, overwrite: bool) -> None:
    """Check that an index can be made in a folder, before any slow work. Milvus is checked later, by its builder.

    Raises:
        OutputError: the folder holds something else.
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


def describe(index: Index) -> JsonObject:
    """Describe an index as plain data, for answers that come from it."""
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
    """Tell which of some images are the same as that of a key.

    They are the same if they are equal, or if one is a path that ends with the other; the file's ending does not count.

    Args:
        key: the name of an image; empty for none.
        images: ``(N,)`` names of images.

    Returns:
        bool ``(N,)``.
    """
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
) -> JsonObject:
    """Find the rows nearest to a vector.

    Args:
        index: the index.
        vector: float32 ``(D,)``, not prepared.
        k: number of hits.
        key: the name of the query's image.
        other_images: leave out hits in the query's own image.

    Returns:
        plain data: the meaning of a score, the class that the hits vote for, and the hits.
    """
    wanted = k
    while True:  # ask for more until k hits are left without those of the own image
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


@contextlib.contextmanager
def _vectors(
    origin: VectorOrigin,
    sources: Sequence[Path],
    which: Patches,
    runtime: Runtime,
    *,
    weights: Weights,
    features: str | None,
    failures: list[tuple[str, str]],
    bar: ProgressBar,
    say: Callable[[str], None],
    known: AlreadyIndexed | None = None,
) -> Iterator[tuple[Iterable[VectorBatch], JsonObject]]:
    """Yield the vectors of some sources, made like those of an index and without those it has, and their conditions."""
    if are_tables(sources):
        theirs, batches = open_tables(sources)
        origin.check(theirs, ", ".join(f"'{source}'" for source in sources))
        yield batches if known is None else known.objects(batches), {}
        return
    if origin.source != "patches":
        raise InputError("this index holds prototypes of objects; add a table of prototypes (.parquet), not images")
    paths = list_images(sources, say)
    if known is not None:
        paths = known.images(paths)
    with (
        open_pipeline(origin, runtime, features=features, weights=weights) as pipeline,
        bar(len(paths)) as advance,
    ):
        yield patch_batches(pipeline, paths, which, advance, failures), pipeline.conditions
        _say_extracted(pipeline, features, say)


def _say_extracted(pipeline: Provider, store: str | None, say: Callable[[str], None]) -> None:
    if pipeline.not_in_store:
        say(f"  {pipeline.not_in_store} images were not in {store} and were extracted")


def index_sources(
    where: str,
    sources: Sequence[Path],
    options: IndexOptions,
    which: Patches,
    recipe: Recipe,
    runtime: Runtime,
    *,
    features: str | None = None,
    overwrite: bool = False,
    name: str = "difftap",
    bar: ProgressBar = no_bar,
    say: Callable[[str], None] = lambda text: None,
) -> tuple[JsonObject, list[tuple[str, str]]]:
    """Build an index of tables of prototypes, or of images' patch features.

    Args:
        where: a folder, or an address of Milvus.
        sources: tables (.parquet), or images and folders of images.
        options: the index's options.
        which: the cells of images to index, and their classes.
        recipe: makes the features of images; not used for tables.
        runtime: where the recipe runs.
        features: a feature store; images that it holds are read from it.
        overwrite: replace an existing index, once the new one is whole.
        name: the index's name in Milvus.
        bar: shows progress over images.
        say: called with remarks for the user.

    Returns:
        the index's description (`describe`), and path and reason of each image that failed.

    Raises:
        InputError: the sources cannot be used.
        OutputError: the folder holds something else, or an index and ``overwrite`` is not set.
    """
    check_place(where, overwrite)
    failures: list[tuple[str, str]] = []
    if are_tables(sources):
        origin, batches = open_tables(sources)
        with build_index(where, origin, batches, options, overwrite=overwrite, name=name) as made:
            return describe(made), failures
    paths = list_images(sources, say)
    with open_features(recipe, features, runtime) as pipeline, bar(len(paths)) as advance:
        origin = VectorOrigin.of_patches(pipeline.recipe, pipeline.conditions)
        batches = patch_batches(pipeline, paths, which, advance, failures)
        with build_index(where, origin, batches, options, overwrite=overwrite, name=name) as made:
            record = describe(made)
        _say_extracted(pipeline, features, say)
    return record, failures


def add_sources(
    where: str,
    sources: Sequence[Path],
    which: Patches,
    runtime: Runtime,
    *,
    weights: Weights,
    features: str | None = None,
    name: str = "difftap",
    bar: ProgressBar = no_bar,
    say: Callable[[str], None] = lambda text: None,
) -> list[tuple[str, str]]:
    """Add tables or images to an index; if it is interrupted, nothing is added. What the index has is left out.

    Args:
        where: the index.
        sources: as for `index_sources`, of the same kind as the index.
        which: the cells of images to add, and their classes.
        runtime: where the index's recipe runs.
        weights: completes the reference to the index's model.
        features: a feature store; images that it holds are read from it.
        name: the index's name in Milvus.
        bar: shows progress over images.
        say: called with what was added, and with remarks for the user.

    Returns:
        path and reason of each image that failed.

    Raises:
        InputError: the sources cannot be used, or have another origin than the index.
    """
    failures: list[tuple[str, str]] = []
    with open_index(where, name=name) as opened:
        trained = int(opened.about.report.get("recall", {}).get("rows", opened.about.count))
        known = AlreadyIndexed(opened.rows())
        with _vectors(
            opened.about.origin,
            sources,
            which,
            runtime,
            weights=weights,
            features=features,
            failures=failures,
            bar=bar,
            say=say,
            known=known,
        ) as (batches, _):
            added = opened.add(batches)
        count, kind = opened.about.count, opened.about.kind
    say(f"{added} vectors added to {where}: {count} in all")
    if known.left_out:
        say(f"  {known.left_out} {known.what} were in already and are left out")
    # The lists were placed by a sample of the first vectors. Far more vectors make them long, and others may lie apart.
    if kind not in ("flat", "hnsw") and count > 2 * trained:
        say(f"  its lists were made for {trained}: build it again to keep its recall")
    return failures


def search_index(
    where: str,
    make: Callable[[VectorOrigin], Query],
    k: int,
    runtime: Runtime,
    *,
    weights: Weights,
    features: str | None = None,
    other_images: bool = False,
    name: str = "difftap",
    gpu: bool = False,
) -> tuple[Query, JsonObject]:
    """Find the rows nearest to a query, whose vector is made with the index's own recipe.

    Args:
        where: the index.
        make: makes the query, as `difftap.retrieval.queries.read_query` gives it.
        k: number of hits.
        runtime: where the index's recipe runs.
        weights: completes the reference to the index's model.
        features: a feature store; if it holds the image, its features are read from it.
        other_images: leave out hits in the query's own image.
        name: the index's name in Milvus.
        gpu: let FAISS search on the GPU.

    Returns:
        the query, and the search as plain data, which docs/index.md describes.

    Raises:
        InputError: there is no such index, or the query cannot be made as its vectors were.
    """
    with open_index(where, name=name, gpu=gpu) as opened:
        origin = opened.about.origin
        query = make(origin)
        conditions: JsonObject = {}
        vector = query.vector
        if vector is None:
            with open_pipeline(origin, runtime, features=features, weights=weights) as pipeline:
                vector, conditions = embed(query, origin, pipeline), pipeline.conditions
        found = search_record(opened, vector, k, key=query.key, other_images=other_images)
        about = {"index": describe(opened), "query": dict(query.about)}
    return query, {"type": "search", "schema": SCHEMA, **conditions, **about, **found}


def judge_sources(
    where: str,
    sources: Sequence[Path],
    which: Patches,
    runtime: Runtime,
    *,
    weights: Weights,
    features: str | None = None,
    ks: Sequence[int] = (1, 5, 10),
    neighbours: int = 5,
    depth: int | None = None,
    name: str = "difftap",
    gpu: bool = False,
    bar: ProgressBar = no_bar,
    say: Callable[[str], None] = lambda text: None,
) -> tuple[Quality, JsonObject, list[tuple[str, str]]]:
    """Search for every vector of some sources, and judge the hits by class.

    The arguments are those of `add_sources` and `evaluate`.

    Returns:
        the figures; the same as plain data, with conditions and settings; path and reason of each image that failed.

    Raises:
        InputError: as `add_sources`; or no row of the index has a class, or there is no query.
    """
    failures: list[tuple[str, str]] = []
    with (
        open_index(where, name=name, gpu=gpu) as opened,
        _vectors(
            opened.about.origin,
            sources,
            which,
            runtime,
            weights=weights,
            features=features,
            failures=failures,
            bar=bar,
            say=say,
        ) as (batches, conditions),
    ):
        found, looked = evaluate(opened, batches, ks=ks, neighbours=neighbours, depth=depth)
        about = describe(opened)
    record = {
        "type": "retrieval",
        "schema": SCHEMA,
        **conditions,
        "index": about,
        "settings": {"neighbours": neighbours, "depth": looked, "left_out": "the query's own image"},
        **found.to_dict(),
    }
    return found, record, failures


def evaluate(
    index: Index,
    batches: Iterable[VectorBatch],
    *,
    ks: Sequence[int] = (1, 5, 10),
    neighbours: int = 5,
    depth: int | None = None,
    progress: Callable[[int], None] = lambda count: None,
) -> tuple[Quality, int]:
    """Search for every vector of some batches, leave out hits in its own image, and judge the others by class.

    Args:
        index: the index.
        batches: queries with their classes and images.
        ks: the values k of recall@k.
        neighbours: number of hits that vote for a class.
        depth: number of hits to judge; by default all rows, at most `MOST_HITS`.
        progress: called with the number of queries done since the last call.

    Returns:
        the figures, and the depth that was used.

    Raises:
        InputError: no row of the index has a class, or there is no query.
    """
    rows = index.rows()
    if not (rows.classes != "").any():
        raise InputError(f"the rows of index '{index.where}' have no class; build it with --labels folder, or a table")
    looked = min(depth or min(len(rows), MOST_HITS), len(rows))
    ks = sorted({min(k, looked) for k in ks})
    # Hits in the own image are left out afterwards. So ask for as many more as any image has rows.
    _, per_image = np.unique(rows.images, return_counts=True)
    reach = min(len(rows), looked + int(per_image.max()))
    parts = []
    for batch in batches:
        for start in range(0, len(batch.rows), 256):  # bounds the memory of hits, 256 x reach
            some = slice(start, start + 256)
            _, hits = index.search(batch.vectors[some], reach)
            queries = batch.rows.take(some)
            parts.append(_judged(hits, queries, rows, ks, min(neighbours, looked), looked))
            progress(len(queries))
    if not parts:
        raise InputError("there is no query: no vector was given")
    return summarise(parts, ks), looked


def _judged(
    hits: NDArray[np.int64], queries: Rows, rows: Rows, ks: Sequence[int], neighbours: int, depth: int
) -> QueryFigures:
    return judge(
        hits, queries.classes, queries.images, rows.classes, rows.images, ks=ks, neighbours=neighbours, depth=depth
    )
