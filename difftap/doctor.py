"""What is here and what is not: backends, extras, devices, the cache, and what ``--backend auto`` has chosen."""

from __future__ import annotations

import platform
import re
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from difftap.artifacts.table import Table, result_json
from difftap.engine import BACKENDS, Cache, get_backend
from difftap.errors import DifftapError, first_line
from difftap.machine import available_cores, available_memory, cpu, gpu
from difftap.pipeline.engines import Artifact, list_artifacts
from difftap.pipeline.fastest import stored_choices
from difftap.version import __version__

__all__ = ["SCHEMA", "BackendState", "Health", "clashes", "examine", "extras", "format_health", "to_json"]

SCHEMA = "difftap.doctor/1"
_FAMILIES = {
    "onnxruntime": re.compile(r"(onnxruntime|ort)(-(gpu|directml|openvino|rocm|training|qnn|silicon|migraphx))?$"),
}


@dataclass(frozen=True)
class BackendState:
    """One backend here.

    Attributes:
        name: what ``--backend`` calls it.
        version: the runtime's; None if it cannot run here.
        missing: what is missing, with the pip line; None if nothing is.
        devices: best first.
        precisions: by device.
        only_builds: why engines can be built here and not run; None if they run, on one device at least.
    """

    name: str
    version: str | None
    missing: str | None
    devices: tuple[str, ...] = ()
    precisions: dict[str, tuple[str, ...]] | None = None
    only_builds: str | None = None


@dataclass(frozen=True)
class Health:
    """All that `examine` found; sizes in bytes.

    Attributes:
        versions: difftap, python, system.
        machine: ``cpu``, ``cores``, ``memory`` that is free, ``gpu``.
        backends: every registered one.
        extras: by extra, the packages that are missing; empty where it is complete.
        cache: ``folder``, ``exists``, ``bytes`` of all in it, ``free`` on its disk.
        artifacts: graphs and engines: ``kind``, ``name``, ``bytes`` of the files each uses, ``model``; or ``broken``.
        choices: of ``--backend auto``: what for, why, and whether it ``holds`` here.
        clashes: packages that break one another.
    """

    versions: dict[str, str]
    machine: dict[str, Any]
    backends: tuple[BackendState, ...]
    extras: dict[str, tuple[str, ...]]
    cache: dict[str, Any]
    artifacts: tuple[dict[str, Any], ...]
    choices: tuple[dict[str, Any], ...]
    clashes: tuple[str, ...]


def examine(cache: Cache) -> Health:
    """Look; nothing is changed, exported or measured."""
    return Health(
        versions={"difftap": __version__, "python": platform.python_version(), "system": platform.platform()},
        machine={"cpu": cpu(), "cores": available_cores(), "memory": available_memory(), "gpu": gpu()},
        backends=tuple(_backend(name) for name in BACKENDS),
        extras=extras(),
        cache=_cache(cache.folder),
        artifacts=tuple(
            {
                "kind": one.manifest.kind,
                "name": one.path.name,
                "model": one.path.parent.name,
                "bytes": one.size,
                "device": one.manifest.made_from.get("device"),
            }
            if isinstance(one, Artifact)
            else {"broken": str(one)}
            for one in list_artifacts(cache)
        ),
        choices=tuple(
            {
                "about": dict(choice.about),
                "why": choice.why,
                "trials": [asdict(t) for t in choice.trials],
                "holds": holds,
            }
            for choice, holds in stored_choices(cache)
        ),
        clashes=tuple(clashes()),
    )


def _backend(name: str) -> BackendState:
    backend = get_backend(name)
    lacking = backend.missing()
    if lacking:
        return BackendState(name, None, lacking)
    try:
        devices = backend.devices()
        reasons = [backend.cannot_run(device) for device in devices]
        hindrance = reasons[0] if reasons and all(reasons) else None
        precisions = {device: backend.precisions(device) for device in devices}
        return BackendState(name, backend.version(), None, devices, precisions, hindrance)
    except DifftapError as error:
        return BackendState(name, None, str(error))
    except Exception as error:  # a runtime that is installed and broken; the others are still to be shown
        return BackendState(name, None, f"is installed and does not work: {first_line(error)}; install it again")


def extras() -> dict[str, tuple[str, ...]]:
    """Difftap's extras, each with the distributions of it that are not installed."""
    found: dict[str, list[str]] = {}
    try:
        wanted = metadata.requires("difftap") or []
    except metadata.PackageNotFoundError:  # run from a folder, not installed
        return {}
    for line in wanted:
        extra = re.search(r"extra\s*==\s*['\"]([^'\"]+)['\"]", line)
        name = re.match(r"[A-Za-z0-9._-]+", line)
        if extra is None or name is None:
            continue
        lacking = found.setdefault(extra[1], [])
        try:
            metadata.distribution(name[0])
        except metadata.PackageNotFoundError:
            lacking.append(name[0])
    return {extra: tuple(lacking) for extra, lacking in sorted(found.items())}


def clashes(names: Iterable[str] | None = None) -> list[str]:
    """Distributions that share an import name and overwrite one another's files.

    Args:
        names: names of the distributions installed; those of this environment by default.

    >>> clashes(["numpy", "onnxruntime"])
    []
    """
    if names is None:
        names = [str(one.metadata["Name"]) for one in metadata.distributions()]
    from difftap.retrieval.kinds import faiss_clash

    flat = sorted({name.lower().replace("_", "-") for name in names if name})
    lines = []
    for module, pattern in _FAMILIES.items():
        found = [name for name in flat if pattern.match(name)]
        if len(found) > 1:
            keep = next((name for name in found if "gpu" in name), found[0])
            lines.append(
                f"{' and '.join(found)} are installed together and overwrite each other's module '{module}'; keep one: "
                f"pip uninstall -y {' '.join(found)} && pip install {keep}"
            )
    faiss = faiss_clash(flat)
    return [*lines, *([faiss] if faiss else [])]


def _cache(folder: Path) -> dict[str, Any]:
    standing = folder
    while not standing.exists():
        standing = standing.parent
    files = {(s.st_dev, s.st_ino): s.st_size for s in (p.stat() for p in folder.rglob("*") if p.is_file())}
    return {
        "folder": str(folder),
        "exists": folder.is_dir(),
        "bytes": sum(files.values()),
        "free": shutil.disk_usage(standing).free,
    }


def to_json(health: Health) -> dict[str, Any]:
    """Give the findings as plain data, with the schema's name and version first."""
    return result_json(SCHEMA, health)


def format_health(health: Health) -> list[str]:
    """Lines for a terminal."""
    machine, cache = health.machine, health.cache
    lines = [
        "difftap {difftap}, Python {python}, {system}".format(**health.versions),
        f"{machine['cpu']}, {machine['cores']} cores, {_size(machine['memory'])} of memory free",
        f"GPU: {machine['gpu'] or 'no NVIDIA GPU found (nvidia-smi lists none)'}",
        "",
        "backends",
    ]
    backends: list[tuple[str, str, str]] = []
    for one in health.backends:
        if one.missing:
            backends.append((one.name, "missing", one.missing))
            continue
        kinds = "; ".join(f"{device}: {', '.join(kinds)}" for device, kinds in (one.precisions or {}).items())
        backends.append((one.name, (one.version or "").split("-")[0], kinds))
        if one.only_builds:
            backends.append(("", "", one.only_builds))
    lines += _columns(backends)
    lines += ["", "extras"]
    lines += _columns(
        [
            (extra, f"lacks {', '.join(lacking)}; pip install 'difftap[{extra}]'" if lacking else "complete")
            for extra, lacking in health.extras.items()
        ]
    )
    lines += ["", f"cache {cache['folder']}: {_size(cache['bytes'])}, {_size(cache['free'])} free on its disk"]
    whole = [item for item in health.artifacts if "broken" not in item]
    lines += _columns([(one["kind"], _size(one["bytes"]), f"{one['model']}/{one['name']}") for one in whole], right=1)
    lines += [f"  BROKEN  {item['broken']}" for item in health.artifacts if "broken" in item]
    lines += ["", "--backend auto"]
    lines += [f"  {line}" for one in health.choices for line in _choice(one)]
    if not health.choices:
        lines.append("  nothing measured yet; it is, once for each recipe, when --backend auto is first used")
    if health.clashes:
        lines += ["", "package clashes", *(f"  {line}" for line in health.clashes)]
    return lines


def _columns(rows: Sequence[tuple[str, ...]], right: int | None = None) -> list[str]:
    """Indented lines of texts under each other, the column of number ``right`` to the right."""
    count = len(rows[0]) if rows else 0
    table = Table.of(("",) * count, rows, left=[k for k in range(count) if k != right])
    return [f"  {line}" for line in table.text(heads=False)] if rows else []


def _choice(one: dict[str, Any]) -> list[str]:
    about = one["about"]
    taps = " with ".join("+".join(branch[:-1]) for branch in about["branches"])
    head = f"{about['model']}, {about['size'][0]}x{about['size'][1]}, {taps}, ensemble {about['ensemble']}"
    stale = "" if one["holds"] else " (out of date: it will be measured again)"
    left = [f"  not measured: {t['backend']}: {t['reason']}" for t in one["trials"] if t["reason"]]
    return [f"{head}, {about['precision']}: {one['why']}{stale}", *left]


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
