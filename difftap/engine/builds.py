"""Engines that have files: built once, kept beside the graphs, trusted by their manifest, shared by all later runs."""

from __future__ import annotations

import contextlib
import logging
import platform
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from difftap.artifacts.cache import Cache, Making
from difftap.artifacts.manifest import Manifest
from difftap.engine.backend import Backend, Calibration, Graph, Profile
from difftap.engine.graphfiles import file_stem, graph_identity, model_folder, placed_weights
from difftap.errors import ArtifactError, BackendError

__all__ = ["engine_identity", "engine_manifest_path", "ensure_built", "known_engine", "save_engine_manifest"]

_LOG = logging.getLogger("difftap")


def engine_identity(cache: Cache, graph: Graph, backend: Backend, profile: Profile, device: str) -> dict[str, object]:
    """Give what an engine must have been made from to be used for a profile on this machine."""
    # The number of threads is not among it: a thread count is chosen when an engine is opened.
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
        "machine": platform.machine(),  # the cache folder may have been carried here from another machine
        **backend.identity(profile, device),
    }


def engine_manifest_path(cache: Cache, graph: Graph, backend: Backend, profile: Profile, device: str) -> Path:
    """Give the path of an engine's manifest. Its files, if it has any, are in the folder of the same stem."""
    stem = f"{file_stem(graph.name)}.{backend.name}-{device}.{profile.label}"
    return model_folder(cache, graph.model) / f"{stem}.engine.json"


def built_folder(manifest: Path) -> Path:
    """Give the folder of an engine's own files from the path of its manifest."""
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
        ArtifactError: they are stale, foreign, cut short or changed, or were calibrated on other images.
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
    check: Callable[[Path], Mapping[str, object]] | None = None,
) -> Path | None:
    """Give the folder of an engine's files; build them if there are none that can be trusted.

    Args:
        cache: where engines are kept.
        graph: what is built.
        backend: the runtime.
        profile: shapes and precision.
        device: one of the backend's.
        calibration: feeds of real images; if the user chose them, an engine calibrated on others is built again.
        check: called with the files' folder before they are trusted. It returns entries for the manifest's report; if
            it raises an error, the engine is not kept.

    Returns:
        the folder; None if engines of this profile have no files.

    Raises:
        BackendError: the runtime cannot build it, or its outputs are not finite.
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
    cache: Cache, graph: Graph, backend: Backend, profile: Profile, device: str, report: Mapping[str, object]
) -> tuple[Path, Manifest]:
    """Write an engine's manifest: what it was made from, the hashes of all its files, and what was measured."""
    path = engine_manifest_path(cache, graph, backend, profile, device)
    identity = engine_identity(cache, graph, backend, profile, device)
    own = sorted(p for p in built_folder(path).rglob("*") if p.is_file())
    with contextlib.suppress(ArtifactError):  # earlier measurements stay unless they were repeated
        earlier = Manifest.load(path)
        report = {**earlier.report, **report} if earlier.made_from == identity else report
    return path, cache.record("engine", path, identity, [*_graph_files(graph), *own], report)


def _graph_files(graph: Graph) -> list[Path]:
    """List a graph's files: the ONNX file and its weights; none for a backend that runs the checkpoint itself."""
    return [] if graph.path is None else [graph.path, *placed_weights(graph, graph.path.parent)]


def _check_calibration(folder: Path, calibration: Calibration | None, manifest: Manifest) -> None:
    """Refuse an engine if the user chose calibration images and it was calibrated on others.

    Raises:
        ArtifactError: it was calibrated on other images.
    """
    used = manifest.report.get("build", {}).get("calibration")
    if calibration is not None and calibration.chosen and used is not None and used != calibration.key:
        raise ArtifactError(f"engine in '{folder}' was calibrated on other images")
