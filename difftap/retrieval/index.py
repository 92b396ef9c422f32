"""What every index is, wherever it lies, and how one is opened: a folder with a FAISS index, or a Milvus collection."""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from difftap.artifacts.files import atomic_path
from difftap.errors import ArtefactError, InputError, first_line, require
from difftap.features.provider import precision_of, precisions_agree
from difftap.recipe import Recipe
from difftap.retrieval.kinds import IndexMetric

__all__ = ["Index", "IndexInfo", "Rows", "VectorBatch", "VectorOrigin", "is_milvus"]


@dataclass(frozen=True, eq=False)
class Rows:
    """Facts of N rows.

    Attributes:
        classes: ``(N,)`` str; empty where unknown.
        images: ``(N,)`` str: the data set's key of the image, or its path.
        instances: ``(N,)`` str: the object's identity; empty for patches.
        x: ``(N,)`` float32, pixels of the image; NaN where the row is no place (an object).
        y: ``(N,)`` float32, likewise.
        boxes: ``(N,)`` str: an object's box, ``x0 y0 x1 y1`` in pixels, ends excluded; empty where it is not known.
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
        """Rows that are objects, without a position."""
        x, y = np.full((2, len(classes)), np.nan, np.float32)
        names = [np.array(column, np.str_) for column in (classes, images, instances, boxes)]
        return cls(names[0], names[1], names[2], x, y, names[3])

    def take(self, rows: NDArray[Any] | slice) -> Rows:
        """Take some of the rows."""
        return Rows(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})

    @classmethod
    def concat(cls, parts: Sequence[Rows]) -> Rows:
        """Rows one after the other."""
        if not parts:
            return cls.objects([], [], [])
        return cls(**{f.name: np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(cls)})

    def record(self, row: int) -> dict[str, Any]:
        """One row as plain data."""
        x, y = float(self.x[row]), float(self.y[row])
        return {
            "class": str(self.classes[row]) or None,
            "image": str(self.images[row]),
            "instance": str(self.instances[row]) or None,
            "position": None if np.isnan(x) or np.isnan(y) else {"x": round(x, 2), "y": round(y, 2)},
            "box": [int(one) for one in str(self.boxes[row]).split()] or None,
        }

    def save(self, path: Path) -> None:
        """Write them as Parquet, whole or not at all.

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
        """Read what `save` wrote.

        Raises:
            ArtefactError: the file is damaged.
        """
        arrow, parquet = _arrow()
        try:
            table = parquet.read_table(path, memory_map=False)
            names = [name for name in ("classes", "images", "instances", "boxes") if name in table.column_names]
            texts = {name: np.array(table.column(name).to_pylist(), np.str_) for name in names}
            return cls(**texts, x=table.column("x").to_numpy(), y=table.column("y").to_numpy())
        except (arrow.ArrowException, OSError, KeyError, ValueError, TypeError) as error:
            raise ArtefactError(f"'{path}' cannot be read ({first_line(error)}); build the index again") from error


def _arrow() -> tuple[Any, Any]:
    why = "an index's rows"
    return require("pyarrow", "index", why), require("pyarrow.parquet", "index", why)


@dataclass(frozen=True)
class VectorOrigin:
    """What decides the vectors.

    Attributes:
        source: ``prototypes`` (an object's mean) or ``patches`` (a cell of the joined map).
        feature_key: the recipe's, of the maps.
        model_key: the checkpoint's.
        taps: which maps, in order; a tap of several passes with its timestep.
        timestep: of the pass; -1 for several.
        rule: from masks to cells.
        join: how the maps of patches are joined, as far as it changes them; empty for one map and for prototypes.
        recipe: plain data, to make vectors of queries by; the matcher in it has no say.
        precision: what engines computed in; all of floating point are one.
        stored: how the feature store that maps were read from kept them, in words; empty for engines' own. It has no
            say: queries cannot be made so.
    """

    source: str
    feature_key: str
    model_key: str
    taps: str
    timestep: int
    rule: str
    join: str
    recipe: Mapping[str, Any]
    precision: str = "fp32"
    stored: str = ""

    def check(self, other: VectorOrigin, what: str) -> None:
        """Make sure that other vectors are of the same kind.

        Args:
            other: their origin.
            what: they, as the subject of a sentence.

        Raises:
            InputError: they are not; the message names what differs.
        """
        mine, theirs = asdict(self), asdict(other)
        for name in (f.name for f in fields(self) if f.name not in ("recipe", "stored")):
            alike = precisions_agree if name == "precision" else operator.eq
            if not alike(mine[name], theirs[name]):
                raise InputError(
                    f"{what} is of another origin than the index: {name.replace('_', ' ')} {theirs[name]!r}, the "
                    f"index's {mine[name]!r}; vectors of two recipes or models cannot be compared"
                )

    def to_dict(self) -> dict[str, Any]:
        """Plain data; `from_dict` reads it back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> VectorOrigin:
        """Read what `to_dict` gave.

        Raises:
            KeyError, TypeError: it is none.
        """
        return cls(**{f.name: data[f.name] for f in fields(cls) if f.name in data or f.default is MISSING})

    @classmethod
    def of_table(cls, provenance: Mapping[str, Any], taps: str, timestep: int, path: Path) -> VectorOrigin:
        """Read the origin of a table of prototypes.

        Raises:
            InputError: its provenance is incomplete.
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
    def of_patches(cls, recipe: Recipe, conditions: Mapping[str, Any]) -> VectorOrigin:
        """Say the origin of cells of a recipe's joined map, made under a pipeline's conditions."""
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


def _kept_as(conditions: Mapping[str, Any]) -> str:
    """How the store kept the maps, in words; empty without one."""
    encoding = conditions.get("store", {}).get("encoding", {})
    return ", ".join(f"{name} {value}" for name, value in sorted(encoding.items()) if value is not None)


@dataclass(frozen=True, eq=False)
class VectorBatch:
    """Some vectors, float32 ``(B, D)``, not prepared, and what is known of them."""

    vectors: NDArray[np.float32]
    rows: Rows


@dataclass(frozen=True)
class IndexInfo:
    """What an index says of itself.

    Attributes:
        origin: of its vectors.
        metric: of its space.
        kind: flat, ivf, ivf-pq or hnsw.
        width: D.
        count: number of rows.
        report: how it was made and what was measured then: parameters, recall against exact, versions.
    """

    origin: VectorOrigin
    metric: str
    kind: str
    width: int
    count: int
    report: Mapping[str, Any] = field(default_factory=dict)

    @property
    def space(self) -> IndexMetric:
        """The metric's space."""
        return IndexMetric(self.metric)

    def to_dict(self) -> dict[str, Any]:
        """Plain data; `from_dict` reads it back."""
        return {**asdict(self), "report": dict(self.report)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str) -> IndexInfo:
        """Read what `to_dict` gave.

        Raises:
            ArtefactError: it is none.
        """
        try:
            origin = VectorOrigin.from_dict(data["origin"])
            numbers = int(data["width"]), int(data["count"])
            return cls(origin, IndexMetric(data["metric"]).metric, str(data["kind"]), *numbers, dict(data["report"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ArtefactError(f"index '{where}' does not say what it is ({error}); build it again") from error


class Index(ABC):
    """An index that is open.

    Attributes:
        where: the folder or address, as the user gave it.
        about: what it is; changes with `add`.
    """

    where: str
    about: IndexInfo

    @abstractmethod
    def find(self, queries: NDArray[np.float32], k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Raw scores and rows ``(Q, k)`` of prepared queries ``(Q, D)``, nearest first; row -1 where there is none."""

    @abstractmethod
    def rows(self) -> Rows:
        """Read what is known of every row."""

    @abstractmethod
    def facts(self, rows: NDArray[np.int64]) -> Rows:
        """Read what is known of some rows, in the order given."""

    @abstractmethod
    def add(self, batches: Iterable[VectorBatch]) -> int:
        """Add vectors, all or none; returns how many."""

    @abstractmethod
    def close(self) -> None:
        """Let go of what is open."""

    def search(self, vectors: NDArray[np.float32], k: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Scores (`IndexInfo.space` says their direction) and rows ``(Q, k)``, nearest first.

        ``k`` beyond the number of rows is cut to it; a row of -1 and a score of NaN stand where fewer were found.

        Raises:
            InputError: the vectors do not fit, or k is below 1.
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
    """Whether an address is Milvus': ``http://host:port``, or a milvus-lite file that ends in ``.db``."""
    return where.startswith(("http://", "https://", "tcp://")) or where.endswith(".db")
