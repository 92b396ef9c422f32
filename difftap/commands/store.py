"""``difftap store``: look at a feature store, verify it, make it compact."""

from __future__ import annotations

import json
import sys
from typing import Any

import click

from difftap.commands.progress import progress_bar


@click.group()
def store() -> None:
    """Look at a feature store, verify it, make it compact."""


@store.command()
@click.argument("path", metavar="STORE")
@click.option("--failures", is_flag=True, help="List every image that could not be used, and why.")
@click.option("--keys", is_flag=True, help="List every image's key.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def info(path: str, failures: bool, keys: bool, as_json: bool) -> None:
    """Say what is in STORE: provenance, counts, size, fidelity, failures."""
    from difftap.features.store import FeatureStore
    from difftap.features.store.care import info as describe

    opened = FeatureStore.open(path)
    told = describe(opened)
    if as_json:
        extra: dict[str, Any] = {"failures": dict(opened.failures)} if failures else {}
        extra |= {"keys": opened.keys()} if keys else {}
        click.echo(json.dumps(told | extra, indent=1, allow_nan=False))
        return
    _show(told)
    if keys:
        for key in opened.keys():  # noqa: SIM118 - in the order of the rows
            click.echo(key)
    if failures:
        for key, error in opened.failures.items():
            click.echo(f"failed: {key}: {error}")


def _show(told: dict[str, Any]) -> None:
    """Print what `info` found, for people."""
    state = "complete" if told["complete"] else "unfinished: the command that began it goes on with it"
    holes = f", {told['holes']:,} unused rows ('difftap store compact')" if told["holes"] else ""
    click.echo(f"{told['store']}: {told['images']:,} images, {told['failed']:,} failed{holes}; {state}")
    click.echo(f"  size      {told['bytes'] / 1e6:,.1f} MB, shards of {told['shard']} images")
    encoding = ", ".join(f"{name} {value}" for name, value in told["encoding"].items() if value is not None)
    click.echo(f"  encoding  {encoding}")
    for name, array in told["arrays"].items():
        share = f", {100 * array['pca_share']:.1f} % of the sample's variance" if "pca_share" in array else ""
        shape = " x ".join(map(str, array["shape"]))
        click.echo(f"  array     {name}: {shape} {array['dtype']}, of {array['channels']} channels{share}")
        one = told["fidelity"].get(name)
        if one:
            click.echo(
                f"            cosine with what was extracted: mean {one['cosine']:.6f}, lowest cell "
                f"{one['lowest']:.6f}; relative error up to {one['error']:.2e} ({one['maps']} maps measured)"
            )
    recipe = told["recipe"]
    click.echo(
        f"  recipe    {recipe['size'][0]} x {recipe['size'][1]} {recipe['fit']}, ensemble {recipe['ensemble']}, "
        f"noise {recipe['noise']}, seed {recipe['seed']}"
    )
    for branch in recipe["branches"]:
        prompt = f", prompt {branch['prompt']!r}" if branch.get("prompt") else ""
        click.echo(f"  branch    {'+'.join(branch['taps'])} at timestep {branch['timestep']}{prompt}")
    click.echo(f"  model     {told['model']['name']}, key {told['model']['key']}")
    backend = told["backend"]
    click.echo(
        f"  backend   {backend['name']} {backend.get('version', '')} on {backend['device']}, {backend['precision']}; "
        f"difftap {told['difftap']}; {len(told['runs'])} kind(s) of run"
    )


@store.command(epilog="Exit codes: 0 all is well; 1 something is wrong; 2 no such store.")
@click.argument("path", metavar="STORE")
def verify(path: str) -> None:
    """Read all of STORE again: shapes, the hash of every image's data, finite values, keys."""
    from difftap.features.store import FeatureStore
    from difftap.features.store.care import verify as check

    opened = FeatureStore.open(path)
    wrong = 0
    with progress_bar(len(opened), "images", rate=True) as advance:
        for problem in check(opened, advance):
            wrong += 1
            click.echo(f"{problem.key}: {problem.message}" if problem.key else problem.message)
    click.echo(f"{path}: {len(opened):,} images, {f'{wrong:,} problems' if wrong else 'all is well'}")
    if wrong:
        click.echo("'difftap store compact --drop-damaged', then the extraction again, makes them anew", err=True)
        sys.exit(1)


@store.command()
@click.argument("path", metavar="STORE")
@click.option("-o", "--output", metavar="NEW", help="Write a new store and leave STORE.  [default: replace it]")
@click.option("--shard", type=click.IntRange(1), metavar="N", help="Images a shard.  [default: as before]")
@click.option("--drop-damaged", is_flag=True, help="Leave out images whose data is not what was written.")
def compact(path: str, output: str | None, shard: int | None, drop_damaged: bool) -> None:
    """Write STORE anew without unused rows and without its failures, which a later extraction then tries again."""
    from difftap.features.store import FeatureStore
    from difftap.features.store.care import compact as run

    with progress_bar(len(FeatureStore.open(path)), "images", rate=True) as advance:
        done = run(path, output, shard=shard, drop_damaged=drop_damaged, progress=advance)
    damaged = f", {done.damaged:,} damaged ones left out" if done.damaged else ""
    click.echo(
        f"{output or path}: {done.kept:,} images{damaged}, {done.forgotten:,} failures forgotten; "
        f"{done.before / 1e6:,.1f} MB before, {done.after / 1e6:,.1f} MB after"
    )
