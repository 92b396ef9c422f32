"""The layout of a feature store: its provenance, its arrays and its journal.

::

    zarr.json              the group; its attribute "difftap" is the provenance
    journal       (P,)     text: one page per shard, which lists finished images and failures
    0/up1         (N, C, h, w)   a tap's maps; one array for each branch (by number) and tap (by name)
    0/up1.scale   (N, C)   int8 only: the factors of the values; (N, 1) with one scale per map
    0/up1.mean, 0/up1.components   (C,), (K, C): with PCA, the basis of the values
    key, digest, image, content    (N,), (N, 32), (N, 2), (N, 4): the journal's rows, for other programs that read zarr

The first axis of the arrays is the row. The journal decides which rows exist. It has one page per shard, as JSON lines,
and a page is written after its shard's data. Data in the arrays that no page names are unfinished work. A failure names
an image that has no row, and the reason. The last four arrays are filled when a run ends.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from difftap.artifacts.files import JsonObject
from difftap.artifacts.run import differences
from difftap.coords import Geometry, Size
from difftap.errors import ArtifactError, DifftapError, InputError, RecipeError, first_line
from difftap.features.store.encoding import Basis, Encoding
from difftap.features.store.place import Place, StoreArray, StoreGroup
from difftap.prompts.choose import SLOT

__all__ = [
    "SCHEMA",
    "Failure",
    "Provenance",
    "ShardEntry",
    "StoredRow",
    "TapArray",
    "load_bases",
    "pages",
    "read_provenance",
    "tap_arrays",
]

# ---- the journal


@dataclass(frozen=True)
class StoredRow:
    """One image of the store.

    Attributes:
        row: its index along the arrays' first axis.
        key: its name: relative path, list entry, tar member or row id.
        digest: the digest of its pixels, `difftap.images.Image.digest`.
        image: its size ``(W, H)`` in pixels.
        content: the part of the network's input that it fills, `difftap.coords.Geometry.content`.
        sha256: the digest of its stored map, by array.
        fidelity: the fidelity of its stored map, by array; measured on the first image of each shard only.
    """

    row: int
    key: str
    digest: str
    image: Size
    content: tuple[float, float, float, float]
    sha256: Mapping[str, str] = field(default_factory=dict)
    fidelity: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def geometry(self, size: Size) -> Geometry:
        """Give the geometry of the image on an input of ``size`` (W, H)."""
        return Geometry(self.image, size, self.content)


@dataclass(frozen=True)
class Failure:
    """An image that could not be used, and why."""

    key: str
    error: str


@dataclass(frozen=True)
class ShardEntry:
    """One page of the journal: the finished images and the failures of one shard."""

    rows: tuple[StoredRow, ...] = ()
    failures: tuple[Failure, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.rows or self.failures)

    def text(self) -> str:
        """Write the page as JSON lines, the last of which holds the hash of the others; "" for a page of nothing."""
        lines = "".join(_line(record) for record in (*map(_row, self.rows), *map(_failure, self.failures)))
        return lines and lines + _line({"sha256": hashlib.sha256(lines.encode()).hexdigest()})

    @classmethod
    def parse(cls, text: str, where: str) -> ShardEntry:
        """Read what `text` gave; ``where`` names the page in the error.

        Raises:
            ArtifactError: the text is damaged.
        """
        rows, failures = [], []
        try:
            lines = text.splitlines(keepends=True)
            last = json.loads(lines[-1]) if lines else {}
            if last.keys() == {"sha256"}:  # pages of difftap 0.1.0 have no such line
                lines.pop()
                if last["sha256"] != hashlib.sha256("".join(lines).encode()).hexdigest():
                    raise ValueError("its SHA-256 differs")
            for line in lines:
                data = json.loads(line)
                if "error" in data:
                    failures.append(Failure(data["key"], data["error"]))
                    continue
                data["image"], data["content"] = tuple(data["image"]), tuple(data["content"])
                rows.append(StoredRow(**data))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ArtifactError(f"{where} is damaged ({error}); 'difftap store verify' says what is left") from error
        return cls(tuple(rows), tuple(failures))


def _row(row: StoredRow) -> dict[str, object]:
    data = {name: value for name, value in vars(row).items() if value or name == "row"}  # row 0 is a value too
    return data | {"image": list(row.image), "content": list(row.content)}


def _failure(failure: Failure) -> dict[str, object]:
    return {"key": failure.key, "error": failure.error}


def _line(record: Mapping[str, object]) -> str:
    return json.dumps(record, ensure_ascii=True, allow_nan=False, separators=(",", ":")) + "\n"


def keys_of(pages: Iterable[ShardEntry]) -> tuple[dict[str, int], dict[str, str]]:
    """Give the row of each finished image by key, and the reason of each failure by key.

    An image that failed once and was finished later counts as finished.
    """
    rows: dict[str, int] = {}
    failed: dict[str, str] = {}
    for page in pages:
        rows.update((row.key, row.row) for row in page.rows)
        failed.update((failure.key, failure.error) for failure in page.failures)
    return rows, {key: error for key, error in failed.items() if key not in rows}


# ---- the provenance and the arrays

SCHEMA = "difftap.store/1"
_PAGES = 32  # pages read at once; with 256 small maps per page, that is about 3 MB of text
CONDITIONS = ("name", "device", "precision")
"""The backend's fields that must not change within a store; recipe, model and encoding must not either."""


@dataclass(frozen=True)
class Provenance:
    """What a store holds and what made it.

    Attributes:
        conditions: the conditions of the pipeline that began it: recipe, model, backend, device, precision, versions.
        features: the fields of the recipe that decide the features.
        encoding: how maps are stored.
        shard: rows per shard.
    """

    conditions: JsonObject
    features: JsonObject
    encoding: Encoding
    shard: int

    @property
    def size(self) -> Size:
        """``(W, H)`` of the network's input."""
        width, height = self.features["size"]
        return int(width), int(height)

    @property
    def model_key(self) -> str:
        """The model's key, made from its weights and configuration."""
        return str(self.conditions["model"]["key"])

    @property
    def branches(self) -> tuple[tuple[str, ...], ...]:
        """The taps of each branch."""
        return tuple(tuple(branch["taps"]) for branch in self.features["branches"])

    def to_dict(self) -> dict[str, object]:
        """Give plain data."""
        return {
            "schema": SCHEMA,
            "conditions": dict(self.conditions),
            "features": dict(self.features),
            "encoding": self.encoding.to_dict(),
            "shard": self.shard,
        }


def read_provenance(group: StoreGroup, place: Place) -> Provenance:
    """Read the provenance of a store.

    Raises:
        InputError: the zarr group is no feature store, or has another schema.
    """
    data = dict(group.attrs).get("difftap")
    if not isinstance(data, Mapping) or not str(data.get("schema", "")).startswith("difftap.store/"):
        raise InputError(f"'{place}' is a zarr group but no feature store; give a store that 'difftap extract' wrote")
    if data["schema"] != SCHEMA:
        raise InputError(f"'{place}' has schema {data['schema']}; this difftap reads {SCHEMA}; extract it again")
    try:
        return Provenance(
            data["conditions"], data["features"], Encoding.from_dict(dict(data["encoding"])), int(data["shard"])
        )
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"'{place}' has a damaged provenance ({error}); extract it again") from error


def _of_no_category(features: JsonObject) -> JsonObject:
    """Give a recipe's fields for images without a category: a prompt with a slot for one becomes empty.

    Images in a store have no category, so their features were made with the empty prompt.
    """
    branches = [
        {**branch, "prompt": "" if SLOT in branch["prompt"] else branch["prompt"]} if "prompt" in branch else branch
        for branch in features.get("branches", ())
    ]
    return {**features, "branches": branches}


def check_features(
    place: Place,
    provenance: Provenance,
    features: JsonObject,
    model_key: str,
    prompts: Mapping[str, object] | None = None,
) -> None:
    """Check that a store's features are those of a recipe, a model and its learned prompts.

    Args:
        place: the store's address, for errors.
        provenance: the store's provenance.
        features: the recipe's fields that decide the features.
        model_key: the model's key. It is compared, not the name: the same weights may have another name.
        prompts: kind, mode and hash of the learned prompts; their content is compared, not their file's name.

    Raises:
        RecipeError: they differ; the message names the first field.
    """
    have, want = _of_no_category(provenance.features), _of_no_category(features)
    names = have.pop("model", None), want.pop("model", None)
    if provenance.model_key != model_key:
        raise RecipeError(
            f"the features in '{place}' are of model {names[0]!r} with key {provenance.model_key}, and {names[1]!r} "
            f"with key {model_key} is asked for; extract again, or use the store's model"
        )
    found = next(differences(have, want), None)
    if found:
        name, got, asked = found
        raise RecipeError(
            f"the features in '{place}' were made with {name} = {got!r}, and {asked!r} is asked for; extract again, or "
            "use the store's recipe ('difftap store info' shows it)"
        )
    had = provenance.conditions.get("prompts")
    if had != prompts:
        raise RecipeError(
            f"the features in '{place}' were made with {_said(had)}, and {_said(prompts)} are asked for: the prompt "
            "file was changed; extract again, or give the one it was made with"
        )


def _said(prompts: Mapping[str, object] | None) -> str:
    return f"learned prompts {str(prompts['sha256'])[:12]}" if prompts else "no learned prompts"


@dataclass(frozen=True)
class TapArray:
    """One tap of one branch in a store.

    Attributes:
        branch: number of the branch.
        tap: its name.
        values: the zarr array ``(N, K, h, w)``.
        scale: the zarr array of scales; int8 only, else None.
        basis: the basis that rebuilds the values; None without PCA.
    """

    branch: int
    tap: str
    values: StoreArray
    scale: StoreArray | None
    basis: Basis | None

    @property
    def name(self) -> str:
        """The path of its array in the store."""
        return f"{self.branch}/{self.tap}"


def tap_arrays(group: StoreGroup, provenance: Provenance, place: Place) -> list[TapArray]:
    """Open a store's tap arrays, branch by branch; empty if the store has no row yet.

    Raises:
        ArtifactError: some are missing or cannot be read.
    """
    with _readable(f"an array of '{place}'"):
        return _tap_arrays(group, provenance, place)


@contextlib.contextmanager
def _readable(what: str) -> Iterator[None]:
    """Turn any error of zarr about damaged files into one clear line.

    Raises:
        ArtifactError: replaces any error of the body that is not ours.
    """
    try:
        yield
    except DifftapError:
        raise
    except Exception as error:  # zarr, its codecs and json raise errors of many kinds
        raise ArtifactError(
            f"{what} cannot be read ({type(error).__name__}: {first_line(error)}); it is damaged: extract it again"
        ) from error


def _tap_arrays(group: StoreGroup, provenance: Provenance, place: Place) -> list[TapArray]:
    found, missing = [], []
    bases = load_bases(group, provenance)
    for branch, taps in enumerate(provenance.branches):
        for tap in taps:
            name = f"{branch}/{tap}"
            if name not in group:
                missing.append(name)
                continue
            scale = group.get(f"{name}.scale")
            found.append(TapArray(branch, tap, group[name], scale, bases.get(name)))
            if (provenance.encoding.dtype == "int8") != (scale is not None):
                missing.append(f"{name}.scale")
            if (provenance.encoding.pca is not None) != (name in bases):
                missing.append(f"{name}.components")
    if found and missing:
        raise ArtifactError(f"'{place}' lacks the array '{missing[0]}'; it is damaged: extract it again")
    return found


def load_bases(group: StoreGroup, provenance: Provenance) -> dict[str, Basis]:
    """Read the PCA bases of a store, by the name of the tap's array."""
    bases = {}
    for branch, taps in enumerate(provenance.branches):
        for tap in taps:
            name = f"{branch}/{tap}"
            if f"{name}.components" in group and f"{name}.mean" in group:
                array = group[f"{name}.components"]
                mean: NDArray[np.float32] = group[f"{name}.mean"][:]
                bases[name] = Basis(mean, array[:], float(array.attrs.get("share", 0.0)))
    return bases


def pages(group: StoreGroup, place: Place) -> Iterator[ShardEntry]:
    """Yield the pages of the journal, in the order of the shards.

    Raises:
        ArtifactError: the journal is damaged.
    """
    with _readable(f"the journal of '{place}'"):
        journal = group.get("journal")
    if journal is None:  # a run was killed right after it had begun the store
        return
    for start in range(0, journal.shape[0], _PAGES):
        with _readable(f"the journal of '{place}'"):
            texts = list(journal[start : start + _PAGES])
        for number, text in enumerate(texts, start):
            yield ShardEntry.parse(str(text), f"page {number} of the journal in '{place}'")
