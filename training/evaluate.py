"""Make the table of the model card.

From the repository root:

    python -m training.evaluate --config training/pocket.toml --data DIR

The tap, resolution and timestep of each method are chosen on validation pairs made from held-out training photographs
(training/pairs.py). Then PF-WILLOW is scored once per method. Writes table.md and results.json into the run folder.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F  # noqa: N812

from training.data import Config, ImageCache
from training.features import extract, noise_prediction, reconstruction, stretched
from training.model import Pocket, Taps, build, load
from training.pairs import held_out_indices, pck, score, validation_pairs
from training.teacher import Target, TargetCache
from training.willow import benchmark

log = logging.getLogger("training")
Extract = Callable[[list[np.ndarray]], list[torch.Tensor]]
SIZES = (192, 256, 320)
TIMESTEPS = (1, 50)
NOISE_TIMESTEPS = [1, 25, 50, 100, 200, 400, 600, 800, 999]


def joined(maps: dict[str, torch.Tensor], names: str) -> list[torch.Tensor]:
    """Join maps such as "up1+up2": scale cells to unit length, interpolate to the finest grid, concatenate."""
    parts = [maps[name] for name in names.split("+")]
    if len(parts) == 1:
        return list(parts[0])
    finest = max(p.shape[-1] for p in parts)
    parts = [
        F.interpolate(F.normalize(p, dim=1), (finest, finest), mode="bilinear", align_corners=False) for p in parts
    ]
    return list(torch.cat(parts, 1))


def network(pocket: Pocket, std: float, taps: tuple[str, ...], ensemble: int) -> Iterator[tuple[str, Extract]]:
    """Yield the candidates of a network: tap x size x timestep."""
    runner = Taps(pocket.unet)
    for size in SIZES:
        for timestep in TIMESTEPS if taps != ("latent",) else (1,):
            memo: dict[int, dict[str, torch.Tensor]] = {}

            def maps_of(
                images: list[np.ndarray], size: int = size, timestep: int = timestep, memo: dict = memo
            ) -> dict[str, torch.Tensor]:
                # All taps come from one pass and are scored one after the other, so the last maps are kept. The key is
                # made from the start of each image, because hashing all pixels takes longer.
                key = hash(tuple(i.tobytes()[:512] for i in images)) ^ len(images)
                if key not in memo:
                    memo.clear()
                    memo[key] = extract(pocket, runner, std, images, size, timestep, ensemble)
                return memo[key]

            for tap in taps:
                name = f"{tap}, {size} px" + (f", t={timestep}" if taps != ("latent",) else "")
                yield name, lambda images, tap=tap, maps_of=maps_of: joined(maps_of(images), tap)


def teacher(config: Config, state: dict[str, Any]) -> Iterator[tuple[str, Extract]]:
    """Yield the candidates of the alignment target: input size."""
    for size in (256, 320, 384):
        target = Target(config | {"resolution": size})
        target.restore(state)

        def maps_of(images: list[np.ndarray], target: Target = target, size: int = size) -> list[torch.Tensor]:
            return [m for n in range(0, len(images), 8) for m in target(stretched(images[n : n + 8], size))]

        yield f"{size} px", maps_of


def dense_sift() -> Iterator[tuple[str, Extract]]:
    """Yield the candidates of dense SIFT (OpenCV, RootSIFT): image size x patch size, a descriptor every 8 pixels."""
    import cv2

    for size in (128, 192):
        for patch in (16, 32):

            def maps_of(images: list[np.ndarray], size: int = size, patch: int = patch) -> list[torch.Tensor]:
                sift, cells = cv2.SIFT_create(), size // 8
                places = [cv2.KeyPoint(8 * x + 4.0, 8 * y + 4.0, patch) for y in range(cells) for x in range(cells)]
                for place in places:
                    place.angle = 0.0
                out = []
                for image in images:
                    gray = np.asarray(Image.fromarray(image).convert("L").resize((size, size), Image.BICUBIC))
                    _, found = sift.compute(gray, places)
                    found = np.sqrt(found / (found.sum(1, keepdims=True) + 1e-6))
                    out.append(torch.from_numpy(found).float().view(cells, cells, 128).permute(2, 0, 1))
                return out

            yield f"{size} px, patch {patch}", maps_of


def choose(name: str, candidates: Iterator[tuple[str, Extract]], pairs: list) -> tuple[str, Extract, dict]:
    """Choose the candidate with the best mean validation figure (three kinds of pairs, PCK at 0.05 and 0.10)."""
    best: tuple[str, Extract, dict] | None = None
    for setting, function in candidates:
        found = {k: [round(float(x), 4) for x in v] for k, v in score(pairs, function).items()}
        mean = float(np.mean(list(found.values())))
        log.info("%s: %s: %.3f %s", name, setting, mean, found)
        if best is None or mean > best[2]["mean"]:
            best = (setting, function, found | {"mean": mean})
    if best is None:
        raise ValueError(f"{name}: no such setting; leave out --setting to try them all")
    return best


def table(rows: list[dict[str, Any]]) -> str:
    """Format the results as a Markdown table, in per cent."""
    lines = [
        "| features | chosen setting | warp @.05 / @.10 | aligned | class (teacher's matches) | PF-WILLOW |",
        "|---" * 6 + "|",
    ]
    for row in rows:
        cells = [" / ".join(f"{100 * x:.1f}" for x in row[key]) for key in ("warp", "aligned", "class", "willow")]
        lines.append(f"| {row['name']} | {row['setting']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def run(config: Config, data: Path, count: int, only: list[str], settings: list[str]) -> None:
    """Choose settings on validation pairs, score PF-WILLOW, and write the table."""
    torch.set_num_threads(config["run"]["threads"])
    folder, one_in = Path(config["run"]["folder"]), config["data"]["held_out_one_in"]
    images = ImageCache(data, Path(config["run"]["cache"]), config["data"]["max_short_side"])
    targets = TargetCache(images, config["teacher"], Path(config["run"]["cache"]))
    pairs = validation_pairs(images, one_in, count, 320, targets=targets)
    pocket, std = load(Path(config["run"]["export"]))
    torch.manual_seed(config["train"]["seed"])
    untrained = build(config["model"], pocket.prompts.words)
    all_taps = ("up1", "up2", "up1+up2")
    methods: dict[str, Iterator[tuple[str, Extract]]] = {
        "pocket": network(pocket, std, all_taps, 2),
        "the same network, untrained": network(untrained, 0.3, all_taps, 2),
        "pocket's raw latents": network(pocket, std, ("latent",), 1),
        "dense SIFT": dense_sift(),
        "alignment target": teacher(config["teacher"], targets.target.state()),
    }
    # With `only`, rows measured earlier on the same pairs are kept, so that baselines are measured only once.
    path = folder / "results.json"
    report = json.loads(path.read_text()) if only and path.exists() else {}
    rows = {row["name"]: row for row in report.get("results", []) if report.get("pairs") == len(pairs)}
    for name, candidates in methods.items():
        if only and name not in only:
            continue
        kept = (c for c in candidates if not settings or c[0] in settings)
        setting, function, found = choose(name, kept, pairs)
        details: list = []
        rows[name] = {"name": name, "setting": setting, **found, "willow": list(benchmark(data, function, details))}
        rows[name]["classes"] = by_class(details)
        log.info("%s", rows[name])
    same = {k: list(v) for k, v in score_position(pairs).items()}
    name = "same relative position"
    rows[name] = {"name": name, "setting": "-", **same, "willow": list(benchmark(data, None))}
    report |= {"pairs": len(pairs), "results": list(rows.values())}
    if not only or "pocket" in only:
        held = held_out_indices(images, one_in)[::2]
        pixels = stretched([images.image(i) for i in held], 256)
        report |= {"noise_images": len(held), "noise": noise_prediction(pocket, std, pixels, NOISE_TIMESTEPS)}
        report["reconstruction"] = reconstruction(pocket, pixels)
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1, default=float))
    (folder / "table.md").write_text(table(report["results"]))
    print(table(report["results"]), json.dumps(report.get("noise", {})))


def by_class(details: list) -> dict[str, list[float]]:
    """Average PCK per PF-WILLOW class, from rows (pair, predicted, PCK)."""
    rows: dict[str, list[np.ndarray]] = {}
    for pair, _, value in details:
        rows.setdefault(pair.a.split("/")[1], []).append(value)
    return {name: [float(x) for x in np.mean(values, 0)] for name, values in rows.items()}


def score_position(pairs: list) -> dict[str, np.ndarray]:
    """Score the baseline whose answer is the point's own relative position."""
    rows: dict[str, list[np.ndarray]] = {}
    for pair in pairs:
        rows.setdefault(pair.kind, []).append(pck(pair.points_a, pair.points_b, (0.05, 0.10)))
    return {kind: np.mean(values, 0) for kind, values in rows.items()}


def main() -> int:
    """Parse the arguments and evaluate."""
    parser = argparse.ArgumentParser(description="measure the embedded model", allow_abbrev=False)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--pairs", type=int, default=60, help="validation pairs of each kind")
    parser.add_argument("--only", action="append", default=[], help="a method's name; may be repeated")
    parser.add_argument("--setting", action="append", default=[], help='one candidate, such as "up2, 256 px, t=1"')
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    try:
        run(tomllib.loads(args.config.read_text()), args.data, args.pairs, args.only, args.setting)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
