"""``difftap recipes``: the named recipes, and one of them as TOML to start from."""

from __future__ import annotations

import json
from typing import Any

import click


def _toml(value: Any) -> str:
    """Plain data as a TOML value: JSON's syntax but for inline tables."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_toml(item)}" for key, item in value.items()) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    # DEL is the one character that a JSON string may hold as it is and a TOML string may not.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


@click.command()
@click.argument("name", required=False)
def recipes(name: str | None) -> None:
    """List the named recipes, or print recipe NAME as a TOML file to start from.

    \b
    difftap recipes dift > mine.toml
    difftap match a.jpg b.jpg --recipe mine.toml
    """
    from difftap.artifacts.table import Table
    from difftap.recipe import load_recipe, presets

    if name is not None:
        for field, value in load_recipe(name).to_dict().items():
            click.echo(f"{field} = {_toml(value)}")
        return
    rows = []
    for preset, recipe in presets().items():
        branches = " with ".join(f"{'+'.join(b.taps)} at t={b.timestep}" for b in recipe.branches)
        size = f"{recipe.size[0]}x{recipe.size[1]}"
        how = f"matcher {recipe.matcher.name} ({recipe.matcher.interpolation})"
        if len(recipe.branches) > 1:
            how += f", {recipe.combine}"
        if recipe.noise != "independent":
            how += f", noise {recipe.noise}"
        if recipe.learned is not None:
            how += f", learned prompts ({recipe.learned.kind})"
        rows.append((preset, recipe.model.name, size, f"ensemble {recipe.ensemble}", f"{branches}, {how}"))
    click.echo("\n".join(Table.of(("",) * 5, rows, left=range(5)).text(heads=False)))
