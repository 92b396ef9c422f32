"""What must be there before contenders are timed: model, prompts and graphs; and how much arithmetic an image is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from difftap.bench.flops import count_graph
from difftap.engine import Profile, model_key
from difftap.errors import ArtefactError, MissingExtraError
from difftap.export.graphs import ensure_graph
from difftap.pipeline.conditioning import embed_prompts
from difftap.pipeline.environment import check_fits, open_cache, open_checkpoint
from difftap.recipe import Recipe

__all__ = ["survey"]


def survey(recipe: Recipe, cache_folder: Path | None) -> dict[str, Any]:
    """Export what is missing, and count.

    Returns:
        ``model`` and its ``key``, ``weights`` in bytes, and multiply-adds: ``vae`` of one
        encoding, ``unet`` of one member in all branches; both None with the reason in ``uncounted`` where they cannot
        be counted.
    """
    cache = open_cache(cache_folder)
    model = open_checkpoint(recipe.model, cache, recipe.size)
    check_fits(recipe, model)
    encoder = ensure_graph(cache, model, model.encoder) if model.encoder else None
    about: dict[str, Any] = {
        "model": model.name,
        "key": model_key(cache, model),
        "weights": sum(p.stat().st_size for part in model.components for p in model.weight_files(part)),
        "vae": None,
        "unet": None,
        "uncounted": None,
    }
    networks = []
    for branch, prompt in zip(recipe.branches, embed_prompts(recipe, model, cache), strict=True):
        networks.append((ensure_graph(cache, model, model.tapped, branch.taps), Profile(recipe.size, 1, len(prompt))))
    try:
        about["vae"] = count_graph(encoder, Profile(recipe.size)) if encoder else 0
        about["unet"] = sum(count_graph(one, profile) for one, profile in networks)
    except (MissingExtraError, ArtefactError) as error:
        about["uncounted"] = str(error)
    return about
