"""Engines that are files: built once beside the graphs, trusted by their manifest, shared by every later run.

A backend whose `builds` says so writes into an empty folder; the folder gets its name only when it is whole, and its
manifest is written after that. So a build that is killed half-way leaves nothing that looks like an engine, and of two
processes that want the same engine one builds and the other waits.
"""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import secrets
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from difftap.artifacts.files import output_errors
from difftap.artifacts.manifest import FileRecord, Manifest
from difftap.engine.backend import Backend, Calibration, Graph, Profile
from difftap.engine.cache import Cache, file_stem
from difftap.errors import ArtefactError, BackendError

__all__ = ["engine_identity", "engine_manifest_path", "ensure_built", "known_engine", "save_engine_manifest"]

_LOG = logging.getLogger("difftap")


def engine_identity(cache: Cache, graph: Graph, backend: Backend, profile: Profile, device: str) -> dict[str, Any]:
    """What an engine's manifest must say for the engine to be the one meant, on this machine."""
    return {
        **cache.graph_identity(graph),
        "backend": backend.name,
        "backend_version": backend.version(),
        "device": device,
        "precision": profile.precision,
        "size": list(profile.size),
        "ensemble": profile.ensemble,
        "tokens": profile.tokens,
        "batch": profile.batch,
        "machine": platform.machine(),
        **backend.identity(profile, device),
    }


def engine_manifest_path(cache: Cache, graph: Graph, backend: Backend, profile: Profile, device: str) -> Path:
    """Where an engine's manifest lies; its files, if it has any, are in the folder of the same stem."""
    stem = f"{file_stem(graph.name)}.{backend.name}-{device}.{profile.label}"
    return cache.model_folder(graph.model) / f"{stem}.engine.json"


def built_folder(manifest: Path) -> Path:
    """The folder of an engine's own files."""
    return manifest.with_name(manifest.name.removesuffix(".engine.json"))


def known_engine(
    cache: Cache,
    graph: Graph,
    backend: Backend,
    profile: Profile,
    device: str,
    calibration: Calibration | None = None,
) -> Path | None:
    """The folder of an engine's files, if they are there and to be trusted; None if they were never built.

    Raises:
        ArtefactError: they are there, and are stale, foreign, cut short or changed, or calibrated on other images.
    """
    path = engine_manifest_path(cache, graph, backend, profile, device)
    if not path.is_file():
        return None
    folder = built_folder(path)
    manifest = Manifest.load(path)
    manifest.check(path.parent, engine_identity(cache, graph, backend, profile, device), cache.memo.digest)
    _check_calibration(manifest, calibration, folder)
    return folder


def ensure_built(
    cache: Cache,
    graph: Graph,
    backend: Backend,
    profile: Profile,
    device: str,
    calibration: Calibration | None = None,
    check: Callable[[Path], Mapping[str, Any]] | None = None,
) -> Path | None:
    """The folder of an engine's files, built if it is not there or not to be trusted; None if the engine has none.

    Args:
        calibration: feeds of real images; where the user chose them, an engine calibrated on others is built again.
        check: called with the files' folder before they are trusted; what it gives goes into the manifest's report, and
            an engine for which it raises is not kept.

    Raises:
        BackendError: the runtime cannot build it, or it gives values that are not finite.
        OutputError: the cache cannot be written.
    """
    if not backend.builds(profile, device):
        return None
    path = engine_manifest_path(cache, graph, backend, profile, device)
    folder = built_folder(path)
    with cache.lock(path.parent, path.name):
        try:
            known = known_engine(cache, graph, backend, profile, device, calibration)
            if known is not None:
                return known
        except ArtefactError as error:
            _LOG.warning("%s; building it again", error)
        _LOG.info("building %s on %s for %s", graph.name, backend.name, profile.label)
        with output_errors(folder):
            path.unlink(missing_ok=True)
            _remove(folder)
            for stale in folder.parent.glob(f".{folder.name}.*.part"):  # of a build that was killed; we hold the lock
                shutil.rmtree(stale)
            scratch = folder.with_name(f".{folder.name}.{os.getpid()}.{secrets.token_hex(4)}.part")
            scratch.mkdir(parents=True)
        try:
            with output_errors(folder):
                details = backend.build(graph, profile, device, scratch, calibration)
            report = {"build": dict(details), **(check(scratch) if check else {})}
            with output_errors(folder):
                os.replace(scratch, folder)
        except MemoryError as error:
            raise BackendError(
                f"building {graph.name} on {backend.name} for {profile.label} ran out of memory; close other programs, "
                "or build for a smaller size or ensemble"
            ) from error
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        save_engine_manifest(cache, graph, backend, profile, device, report)
    return folder


def save_engine_manifest(
    cache: Cache, graph: Graph, backend: Backend, profile: Profile, device: str, report: Mapping[str, Any]
) -> tuple[Path, Manifest]:
    """Write an engine's manifest: what it was made for, the hashes of all its files, and what was measured."""
    path = engine_manifest_path(cache, graph, backend, profile, device)
    identity = engine_identity(cache, graph, backend, profile, device)
    files: list[Path] = []
    if graph.path is not None:
        weights = [graph.path.parent / graph.component / p.name for p in graph.model.weight_files(graph.component)]
        files += [graph.path, *weights]
    folder = built_folder(path)
    if folder.is_dir():
        files += sorted(p for p in folder.rglob("*") if p.is_file())
    # Relative where they lie in the cache, so that a cache may be carried to another machine; a graph that was shipped
    # beside its checkpoint is named where it is.
    names = {f: f.relative_to(path.parent).as_posix() if f.is_relative_to(path.parent) else str(f) for f in files}
    records = {name: FileRecord(file.stat().st_size, cache.memo.digest(file)) for file, name in names.items()}
    with contextlib.suppress(ArtefactError):  # what was measured before stays, unless it is measured again
        earlier = Manifest.load(path)
        report = {**earlier.report, **report} if earlier.made_from == identity else report
    manifest = Manifest("engine", identity, records, report)
    with output_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    manifest.save(path)
    return path, manifest


def _check_calibration(manifest: Manifest, calibration: Calibration | None, folder: Path) -> None:
    used = manifest.report.get("build", {}).get("calibration")
    if calibration is not None and calibration.chosen and used is not None and used != calibration.key:
        raise ArtefactError(f"engine in '{folder}' was calibrated on other images")


def _remove(folder: Path) -> None:
    if folder.is_dir():
        shutil.rmtree(folder)
