"""An index in Milvus: a milvus-lite file, or a server that many machines share.

Two collections make one index. The collection ``NAME`` has a single row, which describes the index and names the
collection of its vectors. That row is replaced in one step, after everything it describes is there. So an interrupted
build leaves the old index. Rows of an interrupted ``add`` have numbers beyond the count; they are never read, and the
next ``add`` removes them.
"""

from __future__ import annotations

import contextlib
import json
import logging
import secrets
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from difftap.artifacts.files import JsonObject
from difftap.errors import ArtifactError, BackendError, InputError, MissingExtraError, OutputError, first_line, require
from difftap.retrieval.builder import NEIGHBOURS, IndexOptions, held_out, plan_for, spool
from difftap.retrieval.index import Index, IndexInfo, Rows, VectorBatch, VectorOrigin
from difftap.retrieval.kinds import IndexPlan, code_bytes, list_count, steps, tune
from difftap.retrieval.quality import exact_neighbours, recall, without_self

if TYPE_CHECKING:
    from pymilvus import CollectionSchema, DataType, MilvusClient

__all__ = ["MilvusIndex", "build_milvus"]

_KINDS = {"flat": "FLAT", "ivf": "IVF_FLAT", "ivf-pq": "IVF_PQ", "hnsw": "HNSW"}
_NOWHERE = -1e6  # x and y of a row without a position: Milvus has no NaN
_INSERT = 500  # rows of a message: 2.5 MB at 1280 dimensions; a server takes up to 64 MB
_PAGE = 4096  # rows read or prepared at once
_MOST = 16384  # Milvus gives at most so many hits
_TEXT = 65535  # bytes of the longest text that Milvus can hold


@contextlib.contextmanager
def _complaints(where: str) -> Iterator[None]:
    """Turn an error of Milvus into one clear line.

    Raises:
        BackendError: replaces any MilvusException of the body.
    """
    failure: type[Exception] = require("pymilvus.exceptions", "milvus", "an index in Milvus").MilvusException
    try:
        yield
    except failure as error:
        text = getattr(error, "message", None) or str(error)
        raise BackendError(f"Milvus at '{where}' fails: {first_line(Exception(text))}") from error


def _connect(where: str) -> MilvusClient:
    pymilvus = require("pymilvus", "milvus", "an index in Milvus")
    if where.endswith(".db") and "://" not in where:
        require("milvus_lite", "milvus", "an index in a milvus-lite file")
        # The client tries calls that this small server lacks, and works without them; each would be logged with a
        # traceback. If the server cannot start, the error below says why.
        for chatty in ("grpc._server", "milvus_lite"):
            logging.getLogger(chatty).setLevel(logging.CRITICAL)
        if Path(where).is_file():  # milvus-lite makes a folder
            raise InputError(f"'{where}' is a file, not a milvus-lite index; give another name")
        if not Path(where).absolute().parent.is_dir():
            raise OutputError(f"cannot write '{where}': its folder does not exist; make it first")
    try:
        with _complaints(where):
            return pymilvus.MilvusClient(where)
    except (OSError, RuntimeError, ValueError) as error:
        if isinstance(error, BackendError | MissingExtraError):
            raise
        raise BackendError(f"Milvus at '{where}' cannot be reached: {first_line(error)}") from error


class MilvusIndex(Index):
    """An open index in Milvus; see `Index`."""

    def __init__(self, where: str, name: str, client: MilvusClient, about: IndexInfo, vectors: str) -> None:
        self.where, self.about = where, about
        self._name, self._client, self._vectors = name, client, vectors
        self._effort: int | None = about.report.get("effort")

    @classmethod
    def open(cls, where: str, name: str = "difftap") -> MilvusIndex:
        """Open an index.

        Raises:
            InputError: there is none of that name.
            ArtifactError: the collection is no index of difftap's, or its vectors are missing.
            BackendError: Milvus cannot be reached, or fails.
            MissingExtraError: pymilvus or milvus-lite is not installed.
        """
        if where.endswith(".db") and "://" not in where and not Path(where).exists():
            raise InputError(f"no index at '{where}'; make one with 'difftap index build'")
        client = _connect(where)
        try:
            with _complaints(where):
                if not client.has_collection(name):
                    raise InputError(f"no index '{name}' in Milvus at '{where}'; make one with 'difftap index build'")
                about, vectors = _read_about(client, name, where)
                if not client.has_collection(vectors):
                    raise ArtifactError(f"index '{name}' at '{where}' has lost its vectors; build it again")
                client.load_collection(vectors)
            return cls(where, name, client, about, vectors)
        except BaseException:
            client.close()
            raise

    def find(self, queries: NDArray[np.float32], k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """See `Index.find`."""
        if k > _MOST:
            raise InputError(f"k is {k}; Milvus gives at most {_MOST} hits")
        names = {"ivf": "nprobe", "ivf-pq": "nprobe", "hnsw": "ef"}
        params: dict[str, int] = {}
        if self._effort is not None:
            # Milvus requires a graph's list of candidates to hold at least k.
            params = {names[self.about.kind]: max(self._effort, k) if self.about.kind == "hnsw" else self._effort}
        rows = np.full((len(queries), k), -1, np.int64)
        raw = np.zeros((len(queries), k), np.float32)
        for start in range(0, len(queries), 64):
            with _complaints(self.where):
                answers = self._client.search(
                    self._vectors,
                    data=queries[start : start + 64].tolist(),
                    limit=k,
                    filter=f"id < {self.about.count}",
                    search_params={"params": params},
                )
            for i, hits in enumerate(answers, start):
                rows[i, : len(hits)] = [hit["id"] for hit in hits]
                raw[i, : len(hits)] = [hit["distance"] for hit in hits]
        return raw, rows

    def rows(self) -> Rows:
        """See `Index.rows`."""
        return self._fetch(np.arange(self.about.count))

    def facts(self, rows: NDArray[np.int64]) -> Rows:
        """See `Index.facts`."""
        return self._fetch(rows)

    def _fetch(self, rows: NDArray[np.int64]) -> Rows:
        names = ["class", "image", "instance", "box", "x", "y"]
        found: dict[int, JsonObject] = {}
        wanted = np.unique(rows).tolist()
        for start in range(0, len(wanted), _PAGE):
            part = wanted[start : start + _PAGE]
            with _complaints(self.where):
                answers = self._client.query(self._vectors, ids=part, output_fields=["id", *names])
            found |= {int(one["id"]): one for one in answers}
        lost = [row for row in wanted if row not in found]
        if lost:
            raise ArtifactError(f"index '{self._name}' at '{self.where}' lacks row {lost[0]}; build it again")
        columns = [[found[int(row)][name] for row in rows] for name in names]
        classes, images, instances, boxes = (np.array(column, np.str_) for column in columns[:4])
        places = [np.array(column, np.float32) for column in columns[4:]]
        x, y = (np.where(place == _NOWHERE, np.float32(np.nan), place) for place in places)
        return Rows(classes, images, instances, x, y, boxes)

    def add(self, batches: Iterable[VectorBatch]) -> int:
        """See `Index.add`. Until all vectors are there, none of them is found.

        Milvus has no locks, so only one process at a time may add. Rows that another process added meanwhile are
        detected and refused, except in the moment between the last check and the write of the index's description.
        """
        start = self.about.count
        self._unchanged()
        with _complaints(self.where):
            self._client.delete(self._vectors, filter=f"id >= {start}")  # left by an add that was interrupted
        count = start
        for batch in batches:
            self._insert(count, self.about.space.prepare(batch.vectors), batch.rows)
            count += len(batch.rows)
        self._unchanged(count)
        self._commit(replace(self.about, count=count))
        return count - start

    def _unchanged(self, count: int | None = None) -> None:
        """Check that no other process changed the index, and that it holds ``count`` rows, if that is given.

        Raises:
            InputError: another process changed it.
        """
        with _complaints(self.where):
            about, vectors = _read_about(self._client, self._name, self.where)
            same = (about.count, vectors) == (self.about.count, self._vectors)
            if same and count is not None:
                self._client.flush(self._vectors)
                (found,) = self._client.query(self._vectors, filter="id >= 0", output_fields=["count(*)"])
                same = int(found["count(*)"]) == count
        if not same:
            raise InputError(f"index '{self._name}' at '{self.where}' was changed meanwhile; try again")

    def _insert(self, start: int, prepared: NDArray[np.float32], rows: Rows) -> None:
        x, y = (np.where(np.isnan(place), _NOWHERE, place) for place in (rows.x, rows.y))
        for low in range(0, len(rows), _INSERT):
            part = range(low, min(low + _INSERT, len(rows)))
            data = [
                {
                    "id": start + i,
                    "vector": prepared[i].tolist(),
                    "class": str(rows.classes[i]),
                    "image": str(rows.images[i]),
                    "instance": str(rows.instances[i]),
                    "box": str(rows.boxes[i]),
                    "x": float(x[i]),
                    "y": float(y[i]),
                }
                for i in part
            ]
            with _complaints(self.where):
                self._client.insert(self._vectors, data)

    def _commit(self, about: IndexInfo) -> None:
        """Replace the index's description; from then on, the inserted vectors are found."""
        text = json.dumps({"about": about.to_dict(), "vectors": self._vectors}, sort_keys=True)
        if len(text.encode()) > _TEXT:
            raise InputError(f"the description of the index takes {len(text)} bytes; Milvus allows {_TEXT}")
        with _complaints(self.where):
            self._client.flush(self._vectors)  # first: the description must not count vectors that may be lost
            self._client.upsert(self._name, [{"id": 0, "vector": [0.0, 0.0], "about": text}])
            self._client.flush(self._name)
        self.about = about

    def close(self) -> None:
        """See `Index.close`."""
        with contextlib.suppress(Exception):  # everything is saved already, so a failure to close loses nothing
            self._client.close()


def _read_about(client: MilvusClient, name: str, where: str) -> tuple[IndexInfo, str]:
    try:
        client.load_collection(name)
        (row,) = client.query(name, ids=[0], output_fields=["about"])
        data = json.loads(row["about"])
        return IndexInfo.from_dict(data["about"], f"{name}' at '{where}"), str(data["vectors"])
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"collection '{name}' at '{where}' is no index of difftap's ({error!r})") from error


def _field(schema: CollectionSchema, name: str, kind: DataType, **options: int) -> None:
    schema.add_field(name, kind, **options)


def _make_collections(client: MilvusClient, name: str, vectors: str, plan: IndexPlan, count: int, width: int) -> None:
    """Make the collection of the vectors; make the collection of the index's name too, if it does not exist."""
    types = require("pymilvus", "milvus", "an index in Milvus").DataType
    product = "IP" if plan.space.product == "ip" else "L2"
    schema = client.create_schema(auto_id=False, enable_dynamic_field=False)
    _field(schema, "id", types.INT64, is_primary=True)
    _field(schema, "vector", types.FLOAT_VECTOR, dim=width)
    for text in ("class", "image", "instance", "box"):
        _field(schema, text, types.VARCHAR, max_length=4096)
    for place in ("x", "y"):
        _field(schema, place, types.FLOAT)
    shape: dict[str, int] = {}
    if plan.kind.startswith("ivf"):
        shape = {"nlist": list_count(plan, count)}
    if plan.kind == "ivf-pq":
        shape |= {"m": code_bytes(plan, width), "nbits": 8}
    if plan.kind == "hnsw":
        shape = {"M": 32, "efConstruction": 100}
    index = client.prepare_index_params()
    index.add_index("vector", index_type=_KINDS[plan.kind], metric_type=product, params=shape)
    # Strong: a search must see all rows that were inserted before it.
    client.create_collection(vectors, schema=schema, index_params=index, consistency_level="Strong")
    if client.has_collection(name):
        return
    schema = client.create_schema(auto_id=False, enable_dynamic_field=False)
    _field(schema, "id", types.INT64, is_primary=True)
    _field(schema, "vector", types.FLOAT_VECTOR, dim=2)  # not used, but Milvus wants a vector in every collection
    _field(schema, "about", types.VARCHAR, max_length=_TEXT)
    index = client.prepare_index_params()
    index.add_index("vector", index_type="FLAT", metric_type="L2")
    client.create_collection(name, schema=schema, index_params=index, consistency_level="Strong")


def build_milvus(
    where: str,
    origin: VectorOrigin,
    batches: Iterable[VectorBatch],
    options: IndexOptions,
    *,
    overwrite: bool = False,
    name: str = "difftap",
) -> MilvusIndex:
    """Build an index in Milvus and open it.

    The vectors are written to a temporary file first, so that the kind can be chosen by their number.

    Args:
        where: a server's address or a milvus-lite file.
        origin: what decides the vectors.
        batches: the vectors and their rows.
        options: the user's choices.
        overwrite: replace an index of that name, once the new one is whole.
        name: the index's name.

    Raises:
        OutputError: an index of that name exists and ``overwrite`` is not set.
        InputError: there is nothing to index, or the options do not fit the vectors or Milvus.
        BackendError: Milvus cannot be reached, or fails.
        MissingExtraError: pymilvus or milvus-lite is not installed.
    """
    if options.metric == "manhattan" or options.refine or options.gpu:
        raise InputError("Milvus has no manhattan, and --refine and --gpu are for FAISS only; leave them out")
    client = _connect(where)
    try:
        with _complaints(where):
            old = None
            if client.has_collection(name):
                old = _old_vectors(client, name, where)
                if not overwrite and old is not None:
                    raise OutputError(
                        f"Milvus at '{where}' holds an index '{name}' already; add to it with 'difftap index add', "
                        "or --overwrite it"
                    )
            for stale in client.list_collections():  # left by builds that were interrupted
                if stale.startswith(f"{name}_v_") and stale != old:
                    client.drop_collection(stale)
        with tempfile.TemporaryDirectory(prefix="difftap-") as scratch:
            vectors, rows = spool(batches, Path(scratch) / "vectors")
            index = _fill(where, name, client, origin, vectors, rows, options)
        with _complaints(where):
            if old is not None:
                client.drop_collection(old)
        return index
    except BaseException:
        client.close()
        raise


def _old_vectors(client: MilvusClient, name: str, where: str) -> str | None:
    """Find the collection of the existing index's vectors; None if its first build was interrupted."""
    client.load_collection(name)
    if not client.query(name, ids=[0], output_fields=["id"]):
        return None
    return _read_about(client, name, where)[1]


def _fill(
    where: str,
    name: str,
    client: MilvusClient,
    origin: VectorOrigin,
    vectors: NDArray[np.float32],
    rows: Rows,
    options: IndexOptions,
) -> MilvusIndex:
    count, width = vectors.shape
    plan = replace(plan_for(options, count, width), refine=False)
    collection = f"{name}_v_{secrets.token_hex(4)}"
    with _complaints(where):
        _make_collections(client, name, collection, plan, count, width)
        client.load_collection(collection)
    report: JsonObject = {"parameters": {"seed": plan.seed, "recall": plan.recall}, "effort": None}
    about = IndexInfo(origin, options.metric, plan.kind, width, count, report)
    index = MilvusIndex(where, name, client, about, collection)
    for start in range(0, count, _PAGE):
        part = slice(start, start + _PAGE)
        index._insert(start, plan.space.prepare(vectors[part]), rows.take(part))
    with _complaints(where):
        client.flush(collection)
    # Fewer queries than for FAISS: each effort that is tried costs a message to the server.
    held = held_out(count, plan.seed)[:64] if plan.kind != "flat" else np.zeros(0, np.int64)
    effort, share = None, 1.0
    if len(held):
        queries = plan.space.prepare(vectors[held])
        true = without_self(exact_neighbours(vectors, queries, plan.space, NEIGHBOURS + 1), held, NEIGHBOURS)

        def use(one: int) -> None:
            index._effort = one

        def measured() -> float:
            return recall(without_self(index.find(queries, min(NEIGHBOURS + 1, count))[1], held, NEIGHBOURS), true)

        lists = list_count(plan, count) if plan.kind.startswith("ivf") else None
        effort, share = tune(steps(plan.kind, lists), use, measured, plan.recall)
    how = "exact" if effort is None else "held-out queries against exact search"
    found = {"at": NEIGHBOURS, "value": share, "queries": len(held), "rows": count, "how": how}
    index._commit(replace(about, report={**report, "effort": effort, "recall": found}))
    return index
