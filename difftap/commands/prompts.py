"""``difftap prompts``: the prompt files that ``difftap tune`` wrote."""

from __future__ import annotations

import json
from pathlib import Path

import click


@click.group()
def prompts() -> None:
    """List learned prompts, and show where one comes from."""


@prompts.command("list")
@click.argument("folder", type=click.Path(path_type=Path), default=Path("prompts"), required=False)
def list_(folder: Path) -> None:
    """List the learned prompts in FOLDER (default: prompts)."""
    from difftap.artifacts.table import Table
    from difftap.errors import DifftapError, InputError
    from difftap.prompts.learned import PROMPT_FILE, load_learned

    if not folder.is_dir():
        raise InputError(f"no folder '{folder}'; give the one that holds your learned prompts")
    files = sorted({*folder.glob(PROMPT_FILE), *folder.glob(f"*/{PROMPT_FILE}")})
    if not files:
        click.echo(f"no learned prompts in '{folder}'", err=True)
    rows, broken = [], []
    for file in files:
        try:
            found = load_learned(file)
        except DifftapError as error:
            broken.append(f"BROKEN  {error}")
            continue
        about = found.about
        taps = " with ".join(f"{'+'.join(b['taps'])} at t={b['timestep']}" for b in about["fits"]["branches"])
        size = "x".join(map(str, about["fits"]["size"]))
        gain = "not scored"
        if about["scores"]:
            scores = about["scores"][0]
            best = scores["best"].get("0.1", float("nan"))
            gain = f"PCK@0.10 {100 * scores['empty']['0.1']:.1f} -> {100 * best:.1f}"
        data = about["data"]["name"]
        rows.append((file.parent.as_posix(), found.kind, about["model"]["name"], size, f"{taps}, {data}, {gain}"))
    for line in [*Table.of(("",) * 5, rows, left=range(5)).text(heads=False), *broken]:
        click.echo(line)


@prompts.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def show(path: Path, as_json: bool) -> None:
    """Show what PATH (a folder of learned prompts, or the file in it) was learned for, from, how, and how well."""
    from difftap.artifacts.table import Table
    from difftap.prompts.learned import load_learned

    found = load_learned(path)
    about = found.about
    if as_json:
        click.echo(json.dumps({"path": str(found.path), "sha256": found.sha256, **about}, indent=1))
        return
    lines = {
        "file": found.path,
        "sha256": found.sha256,
        "kind": found.kind,
        "model": f"{about['model']['name']} (key {about['model']['key']})",
        "recipe": "; ".join(f"{'+'.join(b['taps'])} at t={b['timestep']}" for b in about["fits"]["branches"])
        + f", {'x'.join(map(str, about['fits']['size']))} px, {about['fits']['fit']}, noise {about['fits']['noise']}",
        "learned at": ", ".join(f"t={timestep}" for timestep in about["timesteps"]),
        "tokens": ", ".join(f"{one.shape[1]} x {one.shape[2]}" for one in found.embeddings),
        "classes": ", ".join(found.classes) or "-",
        "data": f"{about['data']['name']}, {about['data']['train_pairs']} pairs, {about['data']['how']}",
        "steps": about["steps"],
    }
    if found.image_tokens is not None:
        own = found.image_tokens
        where = f"its own, {own.tap} at t={own.timestep}" if own.kind == "own" else own.network
        lines["image tokens"] = f"{own.count} x {own.channels}, {where}"
    rows = [(name, str(value)) for name, value in lines.items()]
    for group in about["scores"]:
        for alpha, empty in group["empty"].items():
            learned = group["best"].get(alpha)
            text = "-" if learned is None else f"{100 * learned:.1f} (epoch {group['epoch']} of {group['epochs']})"
            branches = "+".join(map(str, group["branches"]))
            rows.append(
                (f"PCK@{float(alpha):.2f}", f"empty prompt {100 * empty:.1f}, learned {text}, branch {branches}")
            )
    if about["scores"]:
        rows.append(("", f"({about['scores'][0]['measure']})"))
    click.echo("\n".join(Table.of(("", ""), rows, left=(0, 1)).text(heads=False)))
