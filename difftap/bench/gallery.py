"""The best, median and worst pairs of a run as pictures: where each keypoint is, and where it was found.

Left the source, right the target. A ring marks where a keypoint truly is, a dot where it was found, both in the
keypoint's colour; a line joins ring and dot, green if the match is right, red if it is not.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image as PIL
from PIL import ImageDraw, ImageFont

from difftap.artifacts.files import output_errors
from difftap.bench.predictions import Prediction, Predictions
from difftap.bench.protocols import Protocol
from difftap.bench.scoring import MeasuredPair, measure, reason_against
from difftap.errors import InputError
from difftap.features.keeper import View, load_view
from difftap.matching import Matches
from difftap.pages.draw import CAPTION_HEIGHT, draw_matches, place_on_target, save_picture

__all__ = ["choose", "clear_gallery", "draw_pair", "save_gallery"]

_NAME = re.compile(r"(best|median|worst)-\d+-.*\.png$")
_RIGHT, _WRONG = (40, 170, 70), (215, 40, 40)


def _merit(measured: MeasuredPair) -> tuple[float, float]:
    """Share of points right over thresholds up to 0.2, then the mean distance, capped: what pairs are ranked by."""
    alphas = [k / 50 for k in range(1, 11)]
    share = float(measured.hits(alphas, False).mean())
    capped = np.minimum(measured.distance / max(measured.length, 1e-9), 1.0)
    return share, -float(capped.mean())


def choose(measured: Sequence[MeasuredPair], count: int) -> dict[str, list[int]]:
    """Choose the indices of the best, median and worst pairs, ``count`` of each where there are as many; none twice."""
    order = sorted(range(len(measured)), key=lambda k: (*_merit(measured[k]), -k), reverse=True)
    count = min(count, max(1, len(order) // 3)) if order else 0
    middle = (len(order) - count) // 2
    chosen = {"best": order[:count], "median": order[middle : middle + count], "worst": order[::-1][:count]}
    seen: set[int] = set()
    unique = {}
    for name, indices in chosen.items():
        unique[name] = [k for k in indices if k not in seen]
        seen.update(indices)
    return unique


def draw_pair(pair: Prediction, measured: MeasuredPair, protocol: Protocol, alpha: float) -> PIL.Image:
    """One pair's picture.

    Raises:
        ImageError: one of its images cannot be read.
    """
    source, target = load_view(View(Path(pair.source))), load_view(View(Path(pair.target), pair.mirrored))
    picture = draw_matches(
        source, target, Matches(pair.source_points, pair.found, pair.score, pair.margin, pair.margin)
    )
    right = measured.hits([alpha], protocol.strict)[:, 0]
    pen = ImageDraw.Draw(picture)
    truth, found = (place_on_target(points, target, picture) for points in (pair.target_points, pair.found))
    for true, place, hit in zip(truth, found, right, strict=True):
        colour = _RIGHT if hit else _WRONG
        if np.isfinite(place).all():
            pen.line([tuple(true), tuple(place)], fill=colour, width=3)
        pen.ellipse([*(true - 9), *(true + 9)], outline=colour, width=3)
    text = f"{pair.name}: {int(right.sum())} of {len(right)} right, {protocol.name}@{alpha:g}"
    pen.rectangle([0, 0, picture.width, CAPTION_HEIGHT - 1], fill=(250, 250, 250))
    pen.text((4, 4), text, fill=(40, 40, 40), font=ImageFont.load_default(15))
    return picture


def clear_gallery(folder: Path) -> None:
    """Remove the pictures of an earlier gallery, and nothing else."""
    with output_errors(folder):
        for path in sorted(folder.glob("*.png")) if folder.is_dir() else ():
            if _NAME.match(path.name):
                path.unlink()


def save_gallery(
    predictions: Predictions, protocol: Protocol, folder: Path, count: int = 3, alpha: float = 0.1
) -> list[Path]:
    """Write the best, median and worst pairs, ``best-1-NAME.png`` and so on.

    Args:
        predictions: the run; its images must still be where they were.
        protocol: what is right.
        folder: where the pictures go; made if it is not there.
        count: pairs of each kind.
        alpha: the threshold that the colours show.

    Raises:
        InputError: the protocol does not apply.
        ImageError: an image cannot be read.
    """
    pairs = [pair for pair in predictions.pairs if pair.error is None and len(pair.target_points)]
    reason = reason_against(pairs, protocol, predictions.dataset)
    if reason:
        raise InputError(f"no gallery under protocol '{protocol.name}': {reason}; choose another --protocol")
    measured = [measure(pair, protocol, predictions.dataset) for pair in pairs]
    with output_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    clear_gallery(folder)
    files = []
    for kind, indices in choose(measured, count).items():
        for place, k in enumerate(indices, start=1):
            name = "".join(one if one.isalnum() or one in "-_" else "-" for one in pairs[k].name)[:60]
            path = folder / f"{kind}-{place}-{name}.png"
            save_picture(draw_pair(pairs[k], measured[k], protocol, alpha), path)
            files.append(path)
    return files
