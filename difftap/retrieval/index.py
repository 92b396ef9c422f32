"""The interface of every index (a folder with a FAISS index, or a Milvus collection), its rows and its origin."""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from types import ModuleType

import numpy as np
from numpy.typing import NDArray

from difftap.artifacts.files import JsonObject, atomic_path
from difftap.errors import ArtifactError, InputError, first_line, require
from difftap.features.provider import precision_of, precisions_agree
from difftap.recipe import Recipe
from difftap.retrieval.kinds import IndexMetric

__all__ = ["Index", "IndexInfo", "Rows", "VectorBatch", "VectorOrigin", "is_milvus"]


@dataclass(frozen=True, eq=False)
class Rows:
    """What is known of the N vectors of an index.

    Attributes:
        classes: ``(N,)`` str; empty where unknown.
        images: ``(N,)`` str: the data set's key of the image, or its path.
        instances: ``(N,)`` str: the object's identity; empty for patches.
        x: ``(N,)`` float32, pixels of the image; NaN for an object, which has no single place.
        y: ``(N,)`` float32, likewise.
        boxes: ``(N,)`` str: an object's box, ``x0 y0 x1 y1`` in pixels, ends excluded; empty where it is not known.

    Raises:
        InputError: the arrays differ in length.
    """

    classes: NDArray[np.str_]
    images: NDArray[np.str_]
    instances: NDArray[np.str_]
    x: NDArray[np.float32]
    y: NDArray[np.float32]
    boxes: NDArray[np.str_] = field(default_factory=lambda: np.zeros(0, np.str_))

    def __post_init__(self) -> None:
        if not len(self.boxes):
            object.__setattr__(self, "boxes", np.full(len(self.classes), "", np.str_))
        for name in ("classes", "images", "instances", "boxes"):
            object.__setattr__(self, name, np.asarray(getattr(self, name), np.str_))
        for name in ("x", "y"):
            object.__setattr__(self, name, np.asarray(getattr(self, name), np.float32))
        shapes = {getattr(self, f.name).shape for f in fields(self)}
        if len(shapes) != 1 or len(next(iter(shapes))) != 1:
            raise InputError(f"facts of rows have the shapes {sorted(shapes)}; allowed: one entry a row")

    def __len__(self) -> int:
        return len(self.classes)

    @classmethod
    def objects(
        cls, classes: Sequence[str], images: Sequence[str], instances: Sequence[str], boxes: Sequence[str] = ()
    ) -> Rows:
        """Make rows of objects, which have no position."""
        x, y = np.full((2, len(classes)), np.nan, np.float32)
        names = [np.array(column, np.str_) for column in (classes, images, instances, boxes)]
        return cls(names[0], names[1], names[2], x, y, names[3])

    def take(self, rows: NDArray[np.bool_] | NDArray[np.integer] | slice) -> Rows:
        """Give the rows that a mask, a slice or row numbers choose."""
        return Rows(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})

    @classmethod
    def concat(cls, parts: Sequence[Rows]) -> Rows:
        """Join rows one after the other."""
        if not parts:
            return cls.objects([], [], [])
        return cls(**{f.name: np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(cls)})

    def record(self, row: int) -> JsonObject:
        """Give one row as plain data."""
        x, y = float(self.x[row]), float(self.y[row])
        return {
            "class": str(self.classes[row]) or None,
            "image": str(self.images[row]),
            "instance": str(self.instances[row]) or None,
            "position": None if np.isnan(x) or np.isnan(y) else {"x": round(x, 2), "y": round(y, 2)},
            "box": [int(one) for one in str(self.boxes[row]).split()] or None,
        }

    def save(self, path: Path) -> None:
        """Write a Parquet file, whole or not at all.

        Raises:
            OutputError: it cannot be written.
            MissingExtraError: pyarrow is not installed.
        """
        arrow, parquet = _arrow()
        columns = {
            f.name: arrow.array(
                getattr(self, f.name).tolist(), arrow.float32() if f.name in ("x", "y") else arrow.string()
            )
            for f in fields(self)
        }
        with atomic_path(path) as scratch:
            parquet.write_table(arrow.table(columns), scratch, compression="zstd")

    @classmethod
    def load(cls, path: Path) -> Rows:
        """Read a file that `save` wrote. Files written before boxes were kept have none.

        Raises:
            ArtifactError: the file is damaged.
        """
        arrow, parquet = _arrow()
        try:
            table = parquet.read_table(path, memory_map=False)
            names = [name for name in ("classes", "images", "instances", "boxes") if name in table.column_names]
            texts = {name: np.array(table.column(name).to_pylist(), np.str_) for name in names}
            return cls(**texts, x=table.column("x").to_numpy(), y=table.column("y").to_numpy())
        except (arrow.ArrowException, OSError, KeyError, ValueError, TypeError) as error:
            raise ArtifactError(f"'{path}' cannot be read ({first_line(error)}); build the index again") from error


def _arrow() -> tuple[ModuleType, ModuleType]:
    why = "an index's rows"
    return require("pyarrow", "index", why), require("pyarrow.parquet", "index", why)


@dataclass(frozen=True)
class VectorOrigin:
    """What decides the vectors of an index; vectors can be compared only if these are equal.

    Attributes:
        source: ``prototypes`` (the mean over an object) or ``patches`` (a cell of the joined map).
        feature_key: the recipe's key of the maps.
        model_key: the checkpoint's key.
        taps: the taps, in order, joined by ``+``; with their timesteps if there are several.
        timestep: the timestep of the pass; -1 for several.
        rule: how masks choose cells.
        join: how the maps of patches are joined, as far as it changes the vectors; empty for one map and for
            prototypes.
        recipe: the recipe as plain data, to make the vectors of queries. It is not compared: the keys above are.
        precision: the precision that engines computed in; all floating-point ones count as equal.
        stored: how a feature store encoded the maps, in words; empty if they came from an engine. It is not compared,
            because a query's image need not be in the store.
    """

    source: str
    feature_key: str
    model_key: str
    taps: str
    timestep: int
    rule: str
    join: str
    recipe: JsonObject
    precision: str = "fp32"
    stored: str = ""

    def check(self, other: VectorOrigin, what: str) -> None:
        """Check that other vectors can be compared with those of this origin.

        Args:
            other: their origin.
            what: what they are, as the subject of an error's sentence.

        Raises:
            InputError: they cannot; the message names what differs.
        """
        mine, theirs = asdict(self), asdict(other)
        for name in (f.name for f in fields(self) if f.name not in ("recipe", "stored")):
            alike = precisions_agree if name == "precision" else operator.eq
            if not alike(mine[name], theirs[name]):
                raise InputError(
                    f"{what} is of another origin than the index: {name.replace('_', ' ')} {theirs[name]!r}, the "
                    f"index's {mine[name]!r}; vectors of two recipes or models cannot be compared"
                )

    def to_dict(self) -> JsonObject:
        """Give plain data that `from_dict` reads."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: JsonObject) -> VectorOrigin:
        """Read what `to_dict` gave. Fields with a default may be missing: older indexes lack them.

        Raises:
            KeyError, TypeError: the data are no origin.
        """
        return cls(**{f.name: data[f.name] for f in fields(cls) if f.name in data or f.default is MISSING})

    @classmethod
    def of_table(cls, provenance: JsonObject, taps: str, timestep: int, path: Path) -> VectorOrigin:
        """Read the origin of a table of prototypes.

        Args:
            provenance: the table's provenance.
            taps: what its column ``tap`` says.
            timestep: what its column ``timestep`` says.
            path: its file, for the error.

        Raises:
            InputError: the provenance is incomplete.
        """
        try:
            return cls(
                "prototypes",
                str(provenance["feature_key"]),
                str(provenance["model_key"]),
                taps,
                timestep,
                str(provenance["rule"]),
                "",
                dict(provenance["conditions"]["recipe"]),
                precision_of(provenance["conditions"]),
                _kept_as(provenance["conditions"]),
            )
        except (KeyError, TypeError) as error:
            raise InputError(
                f"'{path}' does not say how its prototypes were made ({error} is missing); build it again with "
                "'difftap prototypes build'"
            ) from error

    @classmethod
    def of_patches(cls, recipe: Recipe, conditions: JsonObject) -> VectorOrigin:
        """Give the origin of the cells of a recipe's joined map, made under a pipeline's conditions."""
        times = {branch.timestep for branch in recipe.branches}
        taps = [(tap, branch) for branch in recipe.branches for tap in branch.taps]
        label = "+".join(tap if len(times) == 1 else f"{tap}@{branch.timestep}" for tap, branch in taps)
        shares = ":".join(f"{branch.weight:g}" for branch in recipe.branches)
        join = f"{recipe.upsample} {shares}" if len(taps) > 1 else ""
        timestep = times.pop() if len(times) == 1 else -1
        return cls(
            "patches",
            recipe.feature_key(),
            str(conditions["model"]["key"]),
            label,
            timestep,
            "area",
            join,
            recipe.to_dict(),
            precision_of(conditions),
            _kept_as(conditions),
        )


def _kept_as(conditions: JsonObject) -> str:
    """Describe how the store encoded the maps, in words; empty without a store."""
    encoding = conditions.get("store", {}).get("encoding", {})
    return ", ".join(f"{name} {value}" for name, value in sorted(encoding.items()) if value is not None)


@dataclass(frozen=True, eq=False)
class VectorBatch:
    """Some vectors, float32 ``(B, D)``, and their rows; the vectors are not yet prepared for a metric."""

    vectors: NDArray[np.float32]
    rows: Rows


@dataclass(frozen=True)
class IndexInfo:
    """The description that is stored with an index.

    Attributes:
        origin: what decides its vectors.
        metric: the metric it ranks by.
        kind: flat, ivf, ivf-pq or hnsw.
        width: D, the width of a vector.
        count: number of rows.
        report: how it was made and what was measured then: parameters, recall against exact search, versions.
    """

    origin: VectorOrigin
    metric: str
    kind: str
    width: int
    count: int
    report: JsonObject = field(default_factory=dict)

    @property
    def space(self) -> IndexMetric:
        """The metric, with what it does to vectors and scores."""
        return IndexMetric(self.metric)

    def to_dict(self) -> JsonObject:
        """Give plain data that `from_dict` reads."""
        return {**asdict(self), "report": dict(self.report)}

    @classmethod
    def from_dict(cls, data: JsonObject, where: str) -> IndexInfo:
        """Read what `to_dict` gave; ``where`` names the index in the error.

        Raises:
            ArtifactError: the data are no such description.
        """
        try:
            origin = VectorOrigin.from_dict(data["origin"])
            numbers = int(data["width"]), int(data["count"])
            return cls(origin, IndexMetric(data["metric"]).metric, str(data["kind"]), *numbers, dict(data["report"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ArtifactError(f"index '{where}' does not say what it is ({error}); build it again") from error


class Index(ABC):
    """An open index.

    Attributes:
        where: the folder or address, as the user gave it.
        about: its description; `add` changes it.
    """

    where: str
    about: IndexInfo

    @abstractmethod
    def find(self, queries: NDArray[np.float32], k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Find the nearest rows of prepared queries ``(Q, D)``.

        Returns:
            raw scores ``(Q, k)`` and row numbers ``(Q, k)``, nearest first; row -1 where there is none.
        """

    @abstractmethod
    def rows(self) -> Rows:
        """Read every row."""

    @abstractmethod
    def facts(self, rows: NDArray[np.int64]) -> Rows:
        """Read some rows, in the order given."""

    @abstractmethod
    def add(self, batches: Iterable[VectorBatch]) -> int:
        """Add vectors, all or none; return their number."""

    @abstractmethod
    def close(self) -> None:
        """Free the memory and close connections."""

    def search(self, vectors: NDArray[np.float32], k: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Find the nearest rows of queries ``(Q, D)``.

        Returns:
            scores ``(Q, k)`` (`IndexMetric.higher_is_nearer` tells their direction) and row numbers ``(Q, k)``,
            nearest first; k is at most the number of rows. Where fewer are found, the row is -1 and the score NaN.

        Raises:
            InputError: the vectors have another width than the index's, or k is below 1.
        """
        if vectors.ndim != 2 or vectors.shape[1] != self.about.width:
            raise InputError(f"queries have the shape {vectors.shape}; allowed: (Q, {self.about.width}), the index's")
        if k < 1:
            raise InputError(f"k is {k}; allowed: 1 or more")
        raw, rows = self.find(self.about.space.prepare(vectors), min(k, self.about.count))
        return np.where(rows >= 0, self.about.space.score(raw), np.nan), rows

    def __enter__(self) -> Index:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def is_milvus(where: str) -> bool:
    """Tell whether an address is one of Milvus: ``http://host:port``, or a milvus-lite file that ends in ``.db``."""
    return where.startswith(("http://", "https://", "tcp://")) or where.endswith(".db")
