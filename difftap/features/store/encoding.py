"""How a feature map is stored: its number type, its scale and its PCA basis; and how much accuracy that costs.

A map is stored unchanged (``float32``), rounded to half precision (``float16``), or as whole numbers times a scale
(``int8``). With a basis (a principal component analysis of the run's first images), its K leading components are stored
instead of the C channels, and the map is rebuilt from them when it is read. `Fidelity` measures how far the result is
from the extracted map. Axis letters: C channels, K stored components, h w cells.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from difftap.artifacts.files import JsonObject
from difftap.coords import Geometry
from difftap.engine import Features
from difftap.errors import InputError, require

__all__ = [
    "DTYPES",
    "SCALES",
    "Basis",
    "EncodedMap",
    "Encoding",
    "Fidelity",
    "Moments",
    "StoredImage",
    "row_digest",
    "shapes_of",
    "store_image",
]

DTYPES = ("float16", "float32", "int8")
SCALES = ("channel", "map")
_LARGE = 1 << 16  # values from which Arrow's rounding is worth its call
_BLOCK = 32  # channels compared at once, which bounds the memory of float64 copies
_TOP = 127.0  # -128 is not used, so that the range is symmetric


@dataclass(frozen=True)
class Basis:
    """The leading principal components of a tap's cells.

    Attributes:
        mean: ``(C,)``.
        components: ``(K, C)``, orthonormal rows, most variance first.
        share: fraction of the sample's variance that they hold, 0 to 1.
    """

    mean: NDArray[np.float32]
    components: NDArray[np.float32]
    share: float

    def project(self, data: NDArray[np.float32]) -> NDArray[np.float32]:
        """Project a map ``(C, h, w)`` on the components, ``(K, h, w)``."""
        flat = data.reshape(len(data), -1) - self.mean[:, None]
        return (self.components @ flat).reshape(-1, *data.shape[1:])

    def rebuild(self, data: NDArray[np.float32]) -> NDArray[np.float32]:
        """Rebuild a map ``(C, h, w)`` from its components ``(K, h, w)``."""
        flat = self.components.T @ data.reshape(len(data), -1) + self.mean[:, None]
        return flat.reshape(-1, *data.shape[1:])


class Moments:
    """The first and second moments of a tap's cells, summed map by map, so that no sample of maps is kept."""

    def __init__(self) -> None:
        self._count = 0
        self._total: NDArray[np.float64] = np.zeros(0)
        self._outer: NDArray[np.float64] = np.zeros((0, 0))

    def add(self, data: NDArray[np.float32]) -> None:
        """Add the cells of a map ``(C, h, w)``."""
        # float64: the covariance is a difference of large sums.
        cells = data.reshape(len(data), -1).astype(np.float64)  # (C, h*w)
        if not self._count:
            self._total, self._outer = np.zeros(len(cells)), np.zeros((len(cells), len(cells)))
        self._count += cells.shape[1]
        self._total += cells.sum(axis=1)
        self._outer += cells @ cells.T

    def basis(self, components: int) -> Basis:
        """Find the leading principal components.

        Raises:
            InputError: there are fewer channels than components, or not more cells.
        """
        channels = len(self._total)
        if not 1 <= components <= min(channels, self._count - 1):
            raise InputError(
                f"{components} components are asked for, of maps with {channels} channels, {self._count} cells seen; "
                "allowed: 1 to the number of channels, and fewer than the cells (a larger --pca-sample has more)"
            )
        mean = self._total / self._count
        values, vectors = np.linalg.eigh(self._outer / self._count - np.outer(mean, mean))  # ascending
        share = float(values[::-1][:components].clip(0).sum() / max(values.clip(0).sum(), np.finfo(float).tiny))
        leading = vectors[:, ::-1][:, :components].T
        # The sign of an eigenvector is arbitrary. Its largest entry is made positive, so that all machines agree.
        largest = np.abs(leading).argmax(axis=1)
        leading = leading * np.sign(leading[np.arange(components), largest])[:, None]
        return Basis(mean.astype(np.float32), np.ascontiguousarray(leading, np.float32), share)


@dataclass(frozen=True)
class EncodedMap:
    """One map as it is stored.

    Attributes:
        values: ``(K, h, w)``, of the encoding's number type.
        scale: float32 ``(K,)`` or ``(1,)``, by which int8 values are multiplied; None for other types.
    """

    values: NDArray[np.number]
    scale: NDArray[np.float32] | None = None


@dataclass(frozen=True)
class Fidelity:
    """How close a stored map is to the extracted map.

    Attributes:
        cosine: cosine between stored and extracted feature vectors, averaged over cells.
        lowest: the lowest such cosine of any cell.
        error: norm of the difference, divided by the norm of the extracted map.
        maps: number of maps measured.
    """

    cosine: float
    lowest: float
    error: float
    maps: int = 1

    @classmethod
    def measure(cls, want: NDArray[np.float32], got: NDArray[np.float32]) -> Fidelity:
        """Compare an extracted map ``(C, h, w)`` with the stored one; a cell that is zero in both has cosine 1."""
        first, second = (one.reshape(len(one), -1) for one in (want, got))
        sums = np.zeros((4, first.shape[1]))
        for start in range(0, len(first), _BLOCK):  # float64 sums without float64 copies of whole maps
            one, two = (part[start : start + _BLOCK].astype(np.float64) for part in (first, second))
            pairs = ((one, one), (two, two), (one, two), (one - two, one - two))
            sums += [np.einsum("cn,cn->n", left, right) for left, right in pairs]
        norms = np.sqrt(sums[0]) * np.sqrt(sums[1])
        both_zero = (sums[0] == 0) & (sums[1] == 0)
        cosines = np.divide(sums[2], norms, out=both_zero.astype(float), where=norms > 0)
        cosines = np.minimum(cosines, 1.0)  # rounding may exceed 1
        whole, other, differing = (float(np.sqrt(sums[k].sum())) for k in (0, 1, 3))
        error = differing / whole if whole else float(other > 0)
        return cls(float(cosines.mean()), float(cosines.min()), error)

    @classmethod
    def join(cls, parts: Sequence[Fidelity]) -> Fidelity:
        """Join the measurements of several maps: mean cosine, lowest cosine, largest error."""
        count = sum(part.maps for part in parts)
        mean = sum(part.cosine * part.maps for part in parts) / count
        return cls(mean, min(p.lowest for p in parts), max(p.error for p in parts), count)

    def to_dict(self) -> dict[str, float]:
        """Give plain data."""
        return asdict(self)


@dataclass(frozen=True)
class Encoding:
    """How maps are stored.

    Attributes:
        dtype: one of `DTYPES`.
        scale: int8 only: a scale for each ``channel`` (or component), or one for the whole ``map``.
        pca: number of components kept of each tap; None to keep the channels.

    Raises:
        InputError: a value is not allowed.
    """

    dtype: str = "float16"
    scale: str = "channel"
    pca: int | None = None

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise InputError(f"dtype is {self.dtype!r}; allowed: {', '.join(DTYPES)}")
        if self.scale not in SCALES:
            raise InputError(f"scale is {self.scale!r}; allowed: {', '.join(SCALES)}")
        if self.pca is not None and self.pca < 1:
            raise InputError(f"pca is {self.pca}; allowed: 1 or more components")

    def to_dict(self) -> JsonObject:
        """Give plain data that `from_dict` reads; ``scale`` is left out if the type has none."""
        data = asdict(self)
        if self.dtype != "int8":
            del data["scale"]
        return data

    @classmethod
    def from_dict(cls, data: JsonObject) -> Encoding:
        """Read what `to_dict` gave."""
        return cls(**data)

    def scales(self, components: int) -> int:
        """Give the number of scales of a map: none, one, or one per component."""
        return 0 if self.dtype != "int8" else components if self.scale == "channel" else 1

    def encode(self, data: NDArray[np.float32], basis: Basis | None = None) -> EncodedMap:
        """Encode a map ``(C, h, w)`` for the store.

        Raises:
            InputError: a value is too large for the number type.
        """
        values = data if basis is None else basis.project(data)
        if self.dtype == "float32":
            return EncodedMap(values)
        if self.dtype == "float16":
            top = max(float(values.max()), -float(values.min()))  # NaN if any value is
            if not top <= float(np.finfo(np.float16).max):  # not: NaN must be refused too
                raise InputError(
                    f"a feature is {top:.6g}; float16 holds up to {float(np.finfo(np.float16).max):.0f}; "
                    "store float32 (--dtype float32)"
                )
            return EncodedMap(_half(values))
        axes = (1, 2) if self.scale == "channel" else (0, 1, 2)
        most = np.abs(values).max(axis=axes, keepdims=True)
        scale = np.where(most > 0, most / np.float32(_TOP), np.float32(1)).astype(np.float32)  # (K or 1, 1, 1)
        # Clipped, because the smallest scales are subnormal numbers, and rounding may then make a quotient exceed 127.
        whole = np.clip(np.rint(values / scale), -_TOP, _TOP).astype(np.int8)
        return EncodedMap(whole, scale.reshape(-1))

    def decode(self, stored: EncodedMap, basis: Basis | None = None) -> NDArray[np.float32]:
        """Decode what `encode` gave into a map ``(C, h, w)``."""
        values = stored.values.astype(np.float32)
        if stored.scale is not None:
            values *= stored.scale.reshape(-1, 1, 1)
        return values if basis is None else basis.rebuild(values)


def _half(values: NDArray[np.float32]) -> NDArray[np.float16]:
    """Round to half precision. Large maps are rounded by Arrow: the same bits as numpy's, in half the time."""
    if values.size < _LARGE:
        return values.astype(np.float16)
    pyarrow = require("pyarrow", "store", "a feature store")
    compute = require("pyarrow.compute", "store", "a feature store")
    flat = compute.cast(pyarrow.array(values.reshape(-1)), pyarrow.float16())
    half: NDArray[np.float16] = flat.to_numpy(zero_copy_only=True)
    return half.reshape(values.shape)


@dataclass(frozen=True)
class StoredImage:
    """An image's features, encoded for one row of a store's arrays.

    Attributes:
        features: the features.
        maps: the encoded maps, by array name, ``branch/tap``.
        sha256: the digest of each encoded map (`row_digest`), by array name.
    """

    features: Features
    maps: Mapping[str, EncodedMap]
    sha256: Mapping[str, str]

    @property
    def geometry(self) -> Geometry:
        """How the image lies on its maps."""
        return next(iter(self.features.branches[0].values())).geometry


def store_image(features: Features, encoding: Encoding, bases: Mapping[str, Basis]) -> StoredImage:
    """Encode an image's maps.

    Args:
        features: the image's features.
        encoding: how the store keeps maps.
        bases: the PCA bases by array name; empty for a store without PCA.

    Raises:
        InputError: a value is too large for the store's number type.
    """
    maps = {
        f"{number}/{tap}": encoding.encode(one.data, bases.get(f"{number}/{tap}"))
        for number, taps in enumerate(features.branches)
        for tap, one in taps.items()
    }
    return StoredImage(features, maps, {name: row_digest(one) for name, one in maps.items()})


def row_digest(stored: EncodedMap) -> str:
    """Compute the first 32 hexadecimal digits of the SHA-256 of an encoded map: its values, then its scales."""
    digest = hashlib.sha256(np.ascontiguousarray(stored.values).data)
    if stored.scale is not None:
        digest.update(np.ascontiguousarray(stored.scale).data)
    return digest.hexdigest()[:32]


def shapes_of(features: Features) -> dict[str, tuple[int, int, int]]:
    """Give the shape ``(C, h, w)`` of each map, by array name."""
    return {
        f"{number}/{tap}": (one.data.shape[0], one.data.shape[1], one.data.shape[2])
        for number, taps in enumerate(features.branches)
        for tap, one in taps.items()
    }
