"""Read what is indexed, tables of prototypes or cells of images' feature maps, as streams of bounded memory.

Axis letters: B vectors of a batch; D width; C channels; h w cells.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from difftap.engine import finite_or_alone
from difftap.errors import ImageError, InputError, NonFiniteError, first_line, require
from difftap.featuremap import FeatureMap
from difftap.images import PICTURE_ENDINGS, FolderScan, Image, load_image
from difftap.pipeline.pipeline import Provider
from difftap.retrieval.index import Rows, VectorBatch, VectorOrigin

__all__ = [
    "AlreadyIndexed",
    "Patches",
    "are_tables",
    "list_images",
    "open_tables",
    "patch_batches",
    "table_batches",
    "table_origin",
]

_ROWS = 4096  # prototypes of a batch


def table_origin(path: Path) -> VectorOrigin:
    """Read the origin of a table's prototypes.

    Raises:
        InputError: the file is no table of prototypes, is empty, or holds several taps or timesteps.
    """
    from difftap.prototypes import load_provenance

    provenance = load_provenance(path)
    parquet = require("pyarrow.parquet", "index", "a table of prototypes")
    table = parquet.read_table(path, columns=["tap", "timestep"], memory_map=False)
    kinds = sorted({*zip(table.column("tap").to_pylist(), table.column("timestep").to_pylist(), strict=True)})
    if len(kinds) != 1:
        raise InputError(f"'{path}' holds prototypes of {len(kinds)} taps and timesteps; allowed: one, so split it")
    return VectorOrigin.of_table(provenance, *kinds[0], path)


def open_tables(paths: Sequence[Path]) -> tuple[VectorOrigin, Iterator[VectorBatch]]:
    """Give the origin that some tables share, and a stream of all their prototypes.

    Raises:
        InputError: one is no table, or their origins differ.
    """
    origin = table_origin(paths[0])
    for path in paths[1:]:
        origin.check(table_origin(path), f"'{path}'")
    return origin, (batch for path in paths for batch in table_batches(path))


def table_batches(path: Path, rows: int = _ROWS) -> Iterator[VectorBatch]:
    """Yield a table's prototypes, ``rows`` at a time.

    Raises:
        InputError: the file is damaged.
    """
    arrow = require("pyarrow", "index", "a table of prototypes")
    parquet = require("pyarrow.parquet", "index", "a table of prototypes")
    try:
        with parquet.ParquetFile(path, memory_map=False) as file:
            names = ["class", "image", "instance"]
            boxed = "box" in file.schema_arrow.names
            for part in file.iter_batches(rows, columns=[*names, *(["box"] if boxed else []), "vector"]):
                vectors = part.column("vector")
                flat = vectors.flatten().to_numpy(zero_copy_only=False).astype(np.float32, copy=False)
                facts = [part.column(name).to_pylist() for name in names]
                if boxed:  # a box of zeros is not known
                    facts.append(
                        [" ".join(map(str, one)) if any(one) else "" for one in part.column("box").to_pylist()]
                    )
                yield VectorBatch(flat.reshape(-1, vectors.type.list_size), Rows.objects(*facts))
    except (arrow.ArrowException, OSError, KeyError, AttributeError) as error:
        raise InputError(
            f"'{path}' is no whole table of prototypes ({first_line(error)}); build it again with 'difftap prototypes "
            "build'"
        ) from error


def are_tables(sources: Iterable[Path]) -> bool:
    """Tell by their ending whether sources are tables of prototypes; otherwise they are images or folders.

    Raises:
        InputError: some are tables and some are not.
    """
    kinds = {source.suffix.lower() == ".parquet" for source in sources}
    if len(kinds) > 1:
        raise InputError(
            "tables and images cannot be indexed together; give tables of prototypes (.parquet), or images"
        )
    return kinds.pop()


def list_images(paths: Iterable[Path], say: Callable[[str], None] = lambda text: None) -> list[Path]:
    """List image files, and those in folders (and folders in them), in the order of their names.

    Args:
        paths: files and folders.
        say: told what of a folder is left out.

    Raises:
        InputError: a path does not exist, or there is no image.
    """
    given = list(paths)
    found: list[Path] = []
    for path in given:
        if path.is_dir():
            scan = FolderScan.of(path)
            found += scan.pictures
            if scan.left_out:
                say(f"left out of '{path}': {scan.left_out}")
        elif path.is_file():
            found.append(path)
        else:
            raise InputError(f"no image or folder at '{path}'; give image files, or folders of them")
    if not found:
        raise InputError(f"no image in {', '.join(map(str, given))}; allowed endings: {', '.join(PICTURE_ENDINGS)}")
    return list(dict.fromkeys(found))


class AlreadyIndexed:
    """Leave out what an index holds already, so that no object and no image is added twice.

    Attributes:
        left_out: number of objects or images left out.
        what: which of the two: ``objects`` or ``images``.
    """

    def __init__(self, rows: Rows) -> None:
        self.left_out = 0
        self.what = "objects"
        self._images = set(rows.images.tolist())
        self._objects = set(zip(rows.images.tolist(), rows.instances.tolist(), strict=True))

    def objects(self, batches: Iterable[VectorBatch]) -> Iterator[VectorBatch]:
        """Yield the objects of tables that are not in the index; an object that comes twice is yielded once."""
        for batch in batches:
            keep = np.ones(len(batch.rows), bool)
            for i, one in enumerate(zip(batch.rows.images.tolist(), batch.rows.instances.tolist(), strict=True)):
                keep[i] = one not in self._objects
                self._objects.add(one)
            self.left_out += int(np.count_nonzero(~keep))
            if keep.any():
                yield VectorBatch(batch.vectors[keep], batch.rows.take(keep))

    def images(self, paths: Sequence[Path]) -> list[Path]:
        """List the images of which the index holds no patch."""
        self.what = "images"
        new = [path for path in paths if str(path.resolve()) not in self._images]
        self.left_out = len(paths) - len(new)
        return new


@dataclass(frozen=True)
class Patches:
    """Which cells of an image's map are indexed, and with which class.

    Attributes:
        per_image: at most this many cells, drawn at random; None for all. The draw depends on the seed and the image's
            content only.
        labels: ``folder``: an image's class is its folder's name; ``none``: there is no class.
        seed: the seed of the draw.

    Raises:
        InputError: a value is not allowed.
    """

    per_image: int | None = None
    labels: str = "none"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.per_image is not None and self.per_image < 1:
            raise InputError(f"per-image is {self.per_image}; allowed: 1 or more cells of an image")
        if self.labels not in ("folder", "none"):
            raise InputError(f"labels is '{self.labels}'; allowed: folder, none")


def patch_batches(
    pipeline: Provider,
    paths: Sequence[Path],
    which: Patches,
    progress: Callable[[int], None] = lambda count: None,
    failures: list[tuple[str, str]] | None = None,
) -> Iterator[VectorBatch]:
    """Yield the cells of the joined map of each image, with their places in the image.

    Args:
        pipeline: makes the maps.
        paths: the images.
        which: the cells to take, and their class.
        progress: called with the number of images done since the last call.
        failures: collects path and reason of each image that cannot be used; if it is None, such an image is an error.

    Raises:
        ImageError, NonFiniteError: an image cannot be used, and ``failures`` is None.
    """
    for start in range(0, len(paths), pipeline.batch):
        images: list[Image] = []
        for path in paths[start : start + pipeline.batch]:
            try:
                images.append(load_image(path))
            except ImageError as error:
                _fail(failures, str(path), error)
        for image, features in _maps(pipeline, images, failures):
            label = Path(image.path).resolve().parent.name if which.labels == "folder" else ""
            yield _cells(image, features, which, label)
        progress(len(paths[start : start + pipeline.batch]))


def _fail(failures: list[tuple[str, str]] | None, path: str, error: Exception) -> None:
    if failures is None:
        raise error
    failures.append((path, " ".join(str(error).split())))


def _maps(
    pipeline: Provider, images: Sequence[Image], failures: list[tuple[str, str]] | None
) -> Iterator[tuple[Image, FeatureMap]]:
    """Yield images with their joined maps. An image whose map is not finite is a failure."""
    for some, maps in finite_or_alone(lambda batch: list(pipeline.extract(batch)), images):
        if isinstance(maps, NonFiniteError):
            _fail(failures, some[0].path, maps)
        else:
            yield from zip(some, maps, strict=True)


def _cells(image: Image, features: FeatureMap, which: Patches, label: str) -> VectorBatch:
    """Take the cells of one map that lie on the image (not in its padding), or a random part of them."""
    width, height = features.grid
    columns, rows = np.meshgrid(np.arange(width), np.arange(height))
    places = features.to_pixels(np.stack([columns.ravel(), rows.ravel()], axis=1))  # (h w, 2)
    chosen = np.flatnonzero(features.geometry.contains(places))
    if which.per_image is not None and which.per_image < len(chosen):
        rng = np.random.default_rng([which.seed, int(image.digest[:16], 16)])
        chosen = np.sort(rng.choice(chosen, which.per_image, replace=False))
    vectors = features.data.reshape(features.channels, -1)[:, chosen].T
    count = len(chosen)
    # The full path: the same image must be recognised when it is named from another folder.
    where = str(Path(image.path).resolve())
    classes, images, instances = (np.array([one] * count, np.str_) for one in (label, where, ""))
    return VectorBatch(
        np.ascontiguousarray(vectors), Rows(classes, images, instances, places[chosen, 0], places[chosen, 1])
    )
