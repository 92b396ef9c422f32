"""Queries: an image, with a mask or a point or as a whole, made into the vector that an index of its kind holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

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
        image: the picture it is in; None for a table's row.
        mask: bool ``(H, W)``, the part of the image that is meant.
        about: what it is, as plain data.
        key: the name of its image in the index, if it is there.
        vector: float32 ``(D,)``, where it is known already.
    """

    image: Image | None
    mask: Mask | None
    about: Mapping[str, Any]
    key: str
    vector: NDArray[np.float32] | None = None


def _name(image: Image) -> str:
    return str(Path(image.path).resolve())


def image_query(image: Image) -> Query:
    """Ask with the whole image."""
    return Query(image, np.ones(image.pixels.shape[:2], bool), {"kind": "image", "image": image.path}, _name(image))


def point_query(image: Image, x: float, y: float) -> Query:
    """Ask with the cell at a point, in pixels of the image.

    Raises:
        PointError: it lies outside.
    """
    check_inside([[x, y]], image.size, "the image")
    mask = np.zeros(image.pixels.shape[:2], bool)
    height, width = image.pixels.shape[:2]
    mask[min(max(round(y), 0), height - 1), min(max(round(x), 0), width - 1)] = True
    return Query(image, mask, {"kind": "point", "image": image.path, "x": x, "y": y}, _name(image))


def mask_query(image: Image, mask: Mask, path: Path) -> Query:
    """Ask with the object under a mask.

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
    """Ask with a row of a table of prototypes, counted from 0.

    Raises:
        InputError: the table is of another origin than the index, or has no such row.
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
    """Read what is searched for, and check it as far as that can be done before the index is open.

    Args:
        image: its file.
        mask: the object in it: a mask's file.
        mask_value: the mask's value that means the object; None for any but 0.
        point: the place in it, ``x,y`` in pixels.
        row: ``TABLE:N``, a row of a table of prototypes, in place of an image.

    Returns:
        what makes the query for an index of some origin.

    Raises:
        InputError: nothing is named, or it cannot be read.
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
"""Says how an index's model is to be had: adds a revision or a seed to what the index knows of it."""


def open_pipeline(
    origin: VectorOrigin,
    runtime: Runtime,
    *,
    features: str | None = None,
    weights: Weights = lambda known: known,
) -> Provider:
    """Open the pipeline that makes vectors like an index's, from a feature store where one is named and has the image.

    Raises:
        InputError: the model that is found, or the precision asked for, is not the one the index was made with.
        RecipeError: the store holds other features.
    """
    recipe = Recipe.from_dict(origin.recipe)
    recipe = replace(recipe, model=weights(recipe.model))
    if features is None:
        _check_precision(runtime.precision, origin)  # before engines are made in vain
    pipeline = open_features(recipe, features, runtime)
    _check_precision(precision_of(pipeline.conditions), origin)  # of a store, no engine is open yet
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
    """Make the query's vector ``(D,)``: for prototypes as their builder makes them, for patches from the joined map."""
    from difftap.prototypes import prototypes

    if query.vector is not None:
        return query.vector
    assert query.image is not None and query.mask is not None  # noqa: S101 - only a row has none, and it has a vector
    (features,) = islice(pipeline.features([query.image]), 1)
    if origin.source == "patches":
        maps = [pipeline.join(features)]
    else:
        maps = [one for taps in features.branches for one in taps.values()]
    vectors, _ = prototypes(maps, query.mask[None], origin.rule)
    return np.asarray(vectors[0], np.float32)
