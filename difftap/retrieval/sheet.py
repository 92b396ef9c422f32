"""Contact sheets: the query and its hits as thumbnails, with class, score and place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as PIL
from PIL import ImageDraw, ImageFont

from difftap.errors import ImageError
from difftap.images import PICTURE_ENDINGS, load_image
from difftap.retrieval.queries import Query

__all__ = ["draw_sheet", "find_image"]

_TILE = 200  # pixels of a thumbnail's longer side
_GAP = 10
_TEXT = 38  # pixels under a thumbnail
_COLUMNS = 5
_PAPER, _INK, _FAINT = (245, 245, 245), (30, 30, 30), (130, 130, 130)
_MARK, _SAME, _OTHER = (255, 90, 0), (30, 140, 60), (200, 60, 50)


def find_image(key: str, roots: Sequence[Path]) -> Path | None:
    """Find the file of an image that an index knows by a key: a path, or a name under one of some folders."""
    for root in (Path(), *roots):
        for ending in ("", *PICTURE_ENDINGS):
            path = root / f"{key}{ending}"
            if path.is_file():
                return path
    return None


def draw_sheet(
    query: Query, hits: Sequence[dict[str, Any]], meaning: str, roots: Sequence[Path] = ()
) -> tuple[PIL.Image, int]:
    """Draw a query and its hits.

    Args:
        query: its image is drawn with the part outside the mask dimmed, or with a ring at its point.
        hits: records with ``rank``, ``score``, ``class``, ``image``, ``position`` and ``box``, nearest first.
        meaning: of the score.
        roots: folders in which images are sought that are known by a name alone.

    Returns:
        the sheet, and how many images were not found.
    """
    tiles = [_query_tile(query, roots)]
    missing = int(tiles[0] is None)
    wanted = query.about.get("class")
    captions = [("query", str(wanted or query.about["kind"]), _INK)]
    for hit in hits:
        path = find_image(hit["image"], roots)
        tiles.append(None if path is None else _tile(path, hit["position"], hit.get("box")))
        missing += tiles[-1] is None
        colour = _INK if wanted is None or hit["class"] is None else _SAME if hit["class"] == wanted else _OTHER
        captions.append((f"{hit['rank']}   {hit['score']:.3f}", str(hit["class"] or ""), colour))
    names = [_name(one) for one in (query.about, *hits)]
    columns = min(_COLUMNS, len(tiles))
    rows = -(-len(tiles) // columns)
    width = max(columns * (_TILE + _GAP) + _GAP, 2 * (_TILE + _GAP) + _GAP)
    canvas = PIL.new("RGB", (width, 24 + rows * (_TILE + _TEXT + _GAP) + _GAP), _PAPER)
    pen = ImageDraw.Draw(canvas)
    pen.text((_GAP, 6), _fitted(f"score: {meaning}", width - 2 * _GAP, 13), fill=_FAINT, font=_font(13))
    for i, (tile, (first, second, colour)) in enumerate(zip(tiles, captions, strict=True)):
        left, top = _GAP + (i % columns) * (_TILE + _GAP), 24 + _GAP + (i // columns) * (_TILE + _TEXT + _GAP)
        _place(canvas, tile, left, top)
        if i == 0:
            pen.rectangle([left - 3, top - 3, left + _TILE + 2, top + _TILE + 2], outline=_INK, width=2)
        pen.text((left, top + _TILE + 4), first, fill=_INK, font=_font(14))
        taken = pen.textlength(first, font=_font(14)) + 10
        pen.text((left + taken, top + _TILE + 4), _fitted(second, _TILE - taken, 14), fill=colour, font=_font(14))
        pen.text((left, top + _TILE + 21), _fitted(names[i], _TILE, 12), fill=_FAINT, font=_font(12))
    return canvas, missing


def _name(record: Mapping[str, Any]) -> str:
    """Name what tells one object, or one image, from the others, briefly."""
    return str(record.get("instance") or Path(record.get("image") or "").name)


def _font(size: int) -> Any:
    return ImageFont.load_default(size)


def _fitted(text: str, width: float, size: int) -> str:
    """Give the text, with its end cut off where it is too wide."""
    font = _font(size)
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."


def _place(canvas: PIL.Image, tile: PIL.Image | None, left: int, top: int) -> None:
    pen = ImageDraw.Draw(canvas)
    pen.rectangle([left, top, left + _TILE - 1, top + _TILE - 1], fill=(228, 228, 228))
    if tile is None:
        pen.text(
            (left + 8, top + _TILE // 2 - 8), _fitted("image not found", _TILE - 16, 13), fill=_FAINT, font=_font(13)
        )
        return
    canvas.paste(tile, (left + (_TILE - tile.width) // 2, top + (_TILE - tile.height) // 2))


def _tile(path: Path, position: dict[str, float] | None, box: Sequence[int] | None = None) -> PIL.Image | None:
    try:
        picture = PIL.fromarray(load_image(path).pixels)
    except ImageError:
        return None
    return _shrunk(picture, position, box)


def _shrunk(picture: PIL.Image, position: Any, box: Sequence[int] | None = None) -> PIL.Image:
    """Draw a thumbnail, with a ring at the position, or a frame around the box."""
    scale = _TILE / max(picture.size)
    tile = picture.resize(
        (max(1, round(picture.width * scale)), max(1, round(picture.height * scale))), PIL.Resampling.LANCZOS
    )
    if position is not None:
        x, y = ((position[axis] + 0.5) * scale for axis in "xy")
        pen = ImageDraw.Draw(tile)
        for radius, colour, width in ((9, (0, 0, 0), 4), (8, _MARK, 2)):
            pen.ellipse([x - radius, y - radius, x + radius, y + radius], outline=colour, width=width)
    elif box is not None:
        x0, y0, x1, y1 = (round(one * scale) for one in box)
        pen = ImageDraw.Draw(tile)
        for grown, colour, width in ((1, (0, 0, 0), 4), (0, _MARK, 2)):
            frame = (max(x0 - grown, 0), max(y0 - grown, 0), min(x1 + grown, tile.width), min(y1 + grown, tile.height))
            pen.rectangle(
                [frame[0], frame[1], max(frame[2] - 1, frame[0]), max(frame[3] - 1, frame[1])], None, colour, width
            )
    return tile


def _query_tile(query: Query, roots: Sequence[Path]) -> PIL.Image | None:
    if query.image is None or query.mask is None:
        path = find_image(query.key, roots)
        return None if path is None else _tile(path, query.about.get("position"), query.about.get("box"))
    pixels = query.image.pixels
    if query.about["kind"] == "mask":
        grey = 0.35 * pixels.mean(axis=2, keepdims=True) + 150.0
        pixels = np.where(query.mask[:, :, None], pixels, grey).astype(np.uint8)
    point = {"x": query.about["x"], "y": query.about["y"]} if query.about["kind"] == "point" else None
    return _shrunk(PIL.fromarray(pixels), point)
