"""Queries: turn an image, or the part of it under a mask or at a point, into a vector like those of an index."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from difftap.artifacts.files import JsonObject
from difftap.errors import InputError
from difftap.features.provider import open_features, precision_of, precisions_agree
from difftap.images import Image, load_image, read_mask
from difftap.pipeline.environment import Runtime
from difftap.pipeline.pipeline import Provider
from difftap.points import check_inside, parse_point
from difftap.recipe import ModelReference, Recipe
from difftap.retrieval.index import VectorOrigin
from difftap.retrieval.vectors import table_batches, table_origin

__all__ = ["Query", "embed", "image_query", "mask_query", "open_pipeline", "point_query", "read_query", "row_query"]

Mask = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Query:
    """Something to search for.

    Attributes:
        image: the picture; None for a table's row.
        mask: bool ``(H, W)``, the part of the image to search for; None for a table's row.
        about: a description of the query, as plain data.
        key: the name that its image has in an index, to leave out hits in the same image.
        vector: float32 ``(D,)``, if it is known already; only a table's row has it.
    """

    image: Image | None
    mask: Mask | None
    about: JsonObject
    key: str
    vector: NDArray[np.float32] | None = None


def _name(image: Image) -> str:
    return str(Path(image.path).resolve())


def image_query(image: Image) -> Query:
    """Search for the whole image."""
    return Query(image, np.ones(image.pixels.shape[:2], bool), {"kind": "image", "image": image.path}, _name(image))


def point_query(image: Image, x: float, y: float) -> Query:
    """Search for the cell at a point, in pixels of the image.

    Raises:
        PointError: the point lies outside the image.
    """
    check_inside([[x, y]], image.size, "the image")
    # A mask of one pixel: the prototype of so small an object is the cell that holds it.
    mask = np.zeros(image.pixels.shape[:2], bool)
    height, width = image.pixels.shape[:2]
    mask[min(max(round(y), 0), height - 1), min(max(round(x), 0), width - 1)] = True
    return Query(image, mask, {"kind": "point", "image": image.path, "x": x, "y": y}, _name(image))


def mask_query(image: Image, mask: Mask, path: Path) -> Query:
    """Search for the object under a mask.

    Raises:
        InputError: the mask is empty or of another size than the image.
    """
    if mask.shape != image.pixels.shape[:2]:
        size = f"{mask.shape[1]} x {mask.shape[0]}"
        raise InputError(
            f"mask '{path}' is {size} pixels, the image {image.size[0]} x {image.size[1]}; allowed: the same size"
        )
    if not mask.any():
        raise InputError(f"mask '{path}' is empty; allowed: at least one pixel of the object")
    return Query(image, mask, {"kind": "mask", "image": image.path, "mask": str(path)}, _name(image))


def row_query(path: Path, number: int, origin: VectorOrigin) -> Query:
    """Search for a row of a table of prototypes, counted from 0.

    Raises:
        InputError: the table has another origin than the index, or has no such row.
    """
    origin.check(table_origin(path), f"'{path}'")
    start = 0
    for batch in table_batches(path):
        if start <= number < start + len(batch.rows):
            record = batch.rows.record(number - start)
            about = {"kind": "row", "table": str(path), "row": number, **record}
            return Query(None, None, about, str(record["image"]), batch.vectors[number - start])
        start += len(batch.rows)
    raise InputError(f"row {number} of '{path}' does not exist; allowed: 0 to {start - 1}")


def read_query(
    image: Path | None,
    *,
    mask: Path | None = None,
    mask_value: int | None = None,
    point: str | None = None,
    row: str | None = None,
) -> Callable[[VectorOrigin], Query]:
    """Read a query, and check it as far as possible before the index is opened.

    Args:
        image: the image's file.
        mask: a mask's file; search for the object under it.
        mask_value: the value in the mask that means the object; None for every value but 0.
        point: search for the cell at this place, ``x,y`` in pixels.
        row: search for a row of a table of prototypes, ``TABLE:N``, instead of an image.

    Returns:
        a function that makes the query for an index of the given origin.

    Raises:
        InputError: nothing is given, or it cannot be read.
    """
    if row is not None:
        table, _, number = row.rpartition(":")
        if not table or not number.isdecimal():
            raise InputError(f"--row is {row!r}; allowed: TABLE:N, such as voc.parquet:12")
        return lambda origin: row_query(Path(table), int(number), origin)
    if image is None:
        raise InputError("nothing to search for; give an image (with --mask or --point, if a part is meant) or --row")
    loaded = load_image(image)
    if mask is not None:
        made = mask_query(loaded, read_mask(mask, mask_value), mask)
    elif point is not None:
        made = point_query(loaded, *parse_point(point))
    else:
        made = image_query(loaded)
    return lambda origin: made


Weights = Callable[[ModelReference], ModelReference]
"""Completes the reference to an index's model with the user's revision, seed or folder."""


def open_pipeline(
    origin: VectorOrigin,
    runtime: Runtime,
    *,
    features: str | None = None,
    weights: Weights = lambda known: known,
) -> Provider:
    """Open a pipeline that makes vectors like those of an index.

    Args:
        origin: what decides the index's vectors.
        runtime: where the pipeline runs.
        features: a feature store; images that it holds are read from it.
        weights: completes the reference to the model.

    Raises:
        InputError: the model or the precision is not the one that the index was made with.
        RecipeError: the store holds other features.
    """
    recipe = Recipe.from_dict(origin.recipe)
    recipe = replace(recipe, model=weights(recipe.model))
    if features is None:
        _check_precision(runtime.precision, origin)  # before opening, which may take minutes to make engines
    pipeline = open_features(recipe, features, runtime)
    _check_precision(precision_of(pipeline.conditions), origin)  # a store's precision is known only now
    found = str(pipeline.conditions["model"]["key"])
    if found != origin.model_key:
        name = pipeline.model.name
        pipeline.close()
        raise InputError(
            f"model '{name}' has the key {found}, the index was made with {origin.model_key}; vectors of two models "
            "cannot be compared: give the same weights, or build the index again"
        )
    return pipeline


def _check_precision(precision: str, origin: VectorOrigin) -> None:
    if not precisions_agree(precision, origin.precision):
        raise InputError(
            f"the index was made at {origin.precision}, and here features are made at {precision}, which differ by "
            f"more than rounding; give --precision {origin.precision}"
        )


def embed(query: Query, origin: VectorOrigin, pipeline: Provider) -> NDArray[np.float32]:
    """Make the query's vector, float32 ``(D,)``.

    For an index of prototypes, it is made as their builder makes them; for an index of patches, from the joined map.
    """
    from difftap.prototypes import prototypes

    if query.vector is not None:
        return query.vector
    assert query.image is not None and query.mask is not None  # noqa: S101 - only a row lacks them; it has a vector
    (features,) = islice(pipeline.features([query.image]), 1)
    if origin.source == "patches":
        maps = [pipeline.join(features)]
    else:
        maps = [one for taps in features.branches for one in taps.values()]
    vectors, _ = prototypes(maps, query.mask[None], origin.rule)
    return np.asarray(vectors[0], np.float32)
