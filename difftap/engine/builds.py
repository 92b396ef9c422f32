"""Engines that are files: built once beside the graphs, trusted by their manifest, shared by every later run."""

from __future__ import annotations

import contextlib
import logging
import platform
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from difftap.artifacts.cache import Cache, Making
from difftap.artifacts.manifest import Manifest
from difftap.engine.backend import Backend, Calibration, Graph, Profile
from difftap.engine.graphfiles import file_stem, graph_identity, model_folder, placed_weights
from difftap.errors import ArtefactError, BackendError

__all__ = ["engine_identity", "engine_manifest_path", "ensure_built", "known_engine", "save_engine_manifest"]

_LOG = logging.getLogger("difftap")


def engine_identity(cache: Cache, graph: Graph, backend: Backend, profile: Profile, device: str) -> dict[str, Any]:
    """Say what an engine's manifest must hold for the engine to be the one meant, on this machine."""
    return {
        **graph_identity(cache, graph),
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
    """Say where an engine's manifest lies; its files, if it has any, are in the folder of the same stem."""
    stem = f"{file_stem(graph.name)}.{backend.name}-{device}.{profile.label}"
    return model_folder(cache, graph.model) / f"{stem}.engine.json"


def built_folder(manifest: Path) -> Path:
    """Name the folder of an engine's own files."""
    return manifest.with_name(manifest.name.removesuffix(".engine.json"))


def known_engine(
    cache: Cache,
    graph: Graph,
    backend: Backend,
    profile: Profile,
    device: str,
    calibration: Calibration | None = None,
) -> Path | None:
    """Find the folder of an engine's files, if they can be trusted; None if they were never built.

    Raises:
        ArtefactError: they are there, and are stale, foreign, cut short or changed, or calibrated on other images.
    """
    path = engine_manifest_path(cache, graph, backend, profile, device)
    identity = engine_identity(cache, graph, backend, profile, device)
    found = cache.find(path, identity, partial(_check_calibration, built_folder(path), calibration))
    return None if found is None else built_folder(path)


def ensure_built(
    cache: Cache,
    graph: Graph,
    backend: Backend,
    profile: Profile,
    device: str,
    calibration: Calibration | None = None,
    check: Callable[[Path], Mapping[str, Any]] | None = None,
) -> Path | None:
    """Give the folder of an engine's files, built if it is not there or not to be trusted; None if the engine has none.

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
    manifest = engine_manifest_path(cache, graph, backend, profile, device)
    folder = built_folder(manifest)

    def make(scratch: Path) -> Making:
        _LOG.info("building %s on %s for %s", graph.name, backend.name, profile.label)
        scratch.mkdir()
        try:
            details = backend.build(graph, profile, device, scratch, calibration)
            report = {"build": dict(details), **(check(scratch) if check else {})}
        except MemoryError as error:
            raise BackendError(
                f"building {graph.name} on {backend.name} for {profile.label} ran out of memory; close other programs, "
                "or build for a smaller size or ensemble"
            ) from error
        return Making(_graph_files(graph), report=report)

    return cache.get_or_make(
        "engine",
        folder,
        engine_identity(cache, graph, backend, profile, device),
        make,
        manifest=manifest,
        check=partial(_check_calibration, folder, calibration),
    )


def save_engine_manifest(
    cache: Cache, graph: Graph, backend: Backend, profile: Profile, device: str, report: Mapping[str, Any]
) -> tuple[Path, Manifest]:
    """Write an engine's manifest: what it was made for, the hashes of all its files, and what was measured."""
    path = engine_manifest_path(cache, graph, backend, profile, device)
    identity = engine_identity(cache, graph, backend, profile, device)
    own = sorted(p for p in built_folder(path).rglob("*") if p.is_file())
    with contextlib.suppress(ArtefactError):  # what was measured before stays, unless it is measured again
        earlier = Manifest.load(path)
        report = {**earlier.report, **report} if earlier.made_from == identity else report
    return path, cache.record("engine", path, identity, [*_graph_files(graph), *own], report)


def _graph_files(graph: Graph) -> list[Path]:
    """List the files that an engine's graph consists of; none for a backend that runs the checkpoint itself."""
    return [] if graph.path is None else [graph.path, *placed_weights(graph, graph.path.parent)]


def _check_calibration(folder: Path, calibration: Calibration | None, manifest: Manifest) -> None:
    """Refuse an engine that was calibrated on other images than the user chose.

    Raises:
        ArtefactError: it was.
    """
    used = manifest.report.get("build", {}).get("calibration")
    if calibration is not None and calibration.chosen and used is not None and used != calibration.key:
        raise ArtefactError(f"engine in '{folder}' was calibrated on other images")
