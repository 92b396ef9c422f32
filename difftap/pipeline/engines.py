"""The commands ``difftap engines``: build a recipe's engines on backends, list, verify and remove them.

For ONNX Runtime and for OpenVINO in float32, an engine is the graph itself, whose shapes are fixed when it is opened.
An engine that is quantised or compiled ahead of time has its own folder of files. Both have a manifest.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from difftap.artifacts.files import JsonObject, output_errors
from difftap.artifacts.manifest import Manifest
from difftap.backbones.checkpoint import Checkpoint
from difftap.coords import Size
from difftap.engine import (
    BACKENDS,
    Cache,
    Profile,
    check_precision,
    choose_device,
    get_backend,
)
from difftap.engine.builds import built_folder, save_engine_manifest
from difftap.engine.graphfiles import graph_identity
from difftap.errors import ArtifactError, BackendError, InputError
from difftap.export.parity import TensorParity
from difftap.machine import available_cores
from difftap.pipeline.environment import Environment, RecipeEngines, Runtime, open_cache, report_of
from difftap.pipeline.fastest import AUTO, forget_choices, open_environment
from difftap.recipe import Recipe

__all__ = ["Artifact", "BuildJob", "build_engines", "clean", "list_artifacts", "plan_builds", "verify_artifact"]

_SLACK = 1.05
"""Factor by which an engine's error may grow when it is measured again: another number of threads changes rounding."""
_FLOOR = 1e-5
"""Relative errors below this are rounding, and are never refused."""


@dataclass(frozen=True)
class Artifact:
    """A graph or an engine in the cache: the path and the content of its manifest."""

    path: Path
    manifest: Manifest

    @property
    def size(self) -> int:
        """Bytes of all files that it uses; weights may be shared with other engines."""
        return sum(record.size for record in self.manifest.files.values())

    @property
    def stem(self) -> str:
        """The name of the folder of an engine's own files."""
        return built_folder(self.path).name

    @property
    def not_run(self) -> str | None:
        """The reason why an engine could not be run where it was built; None if it was run."""
        return self.manifest.report.get("not_run")

    @property
    def parity(self) -> dict[str, TensorParity]:
        """The measured differences from the float32 reference, by output; empty if none were measured."""
        return {name: TensorParity(**one) for name, one in self.manifest.report.get("parity", {}).items()}


@dataclass(frozen=True)
class BuildJob:
    """A recipe's engines on one backend, in one precision and at one size."""

    recipe: Recipe
    runtime: Runtime

    @property
    def label(self) -> str:
        """The job as a text for tables and messages: ``512x512 openvino int8``."""
        width, height = self.recipe.size
        return f"{width}x{height} {self.runtime.backend} {self.runtime.precision}"


def plan_builds(
    recipe: Recipe, runtime: Runtime, backends: Sequence[str], precisions: Sequence[str], sizes: Sequence[Size]
) -> list[BuildJob]:
    """Plan what to build: every backend in every precision at every size.

    Args:
        backends: names; ``all`` for those that can be used here, without those that are there to be compared with;
            ``auto`` for the one that `difftap.pipeline.fastest` chooses when the job is done.
        precisions: names; ``all`` for what each backend has. A precision that is named is left out for backends that
            lack it, where there are several.
        sizes: ``(W, H)``; none for the recipe's.

    Raises:
        InputError: there is no such backend, or every precision is wanted of ``auto``.
        BackendError: a backend that is named cannot be used here, or no backend has a precision.
    """
    if "all" in backends:
        every = {name: get_backend(name) for name in BACKENDS}
        usable = {name: one for name, one in every.items() if not one.missing()}
        backends = [name for name, one in usable.items() if runtime.device in ("auto", *one.devices())]
    pairs = []
    for name in dict.fromkeys(backends):
        if name == AUTO:
            if "all" in precisions:
                raise InputError("backend 'auto' compares backends in one precision; got 'all'; name a precision")
            pairs += [(AUTO, precision) for precision in dict.fromkeys(precisions)]
            continue
        backend = get_backend(name)
        device = choose_device(backend, runtime.device)
        has = backend.precisions(device)
        wanted = has if "all" in precisions else precisions
        if len(backends) == 1:  # with several, a precision is left out for those that lack it
            for precision in wanted:
                check_precision(backend, device, precision)
        pairs += [(name, precision) for precision in dict.fromkeys(wanted) if precision in has]
    lacking = [p for p in precisions if p != "all" and p not in {precision for _, precision in pairs}]
    if lacking or not pairs:
        raise BackendError(f"none of the backends {', '.join(backends)} has precision '{', '.join(lacking)}' here")
    return [
        BuildJob(replace(recipe, size=size), replace(runtime, backend=name, precision=precision))
        for size in dict.fromkeys(sizes or [recipe.size])
        for name, precision in pairs
    ]


def build_engines(recipe: Recipe, runtime: Runtime) -> Iterator[tuple[Artifact, float]]:
    """Build a recipe's engines on one backend.

    Yields:
        each engine, and the seconds that it took.

    Raises:
        DifftapError: as `difftap.pipeline.pipeline.Pipeline.open` does.
    """
    at = open_environment(recipe, runtime, to_run=False)
    check_precision(at.backend, at.device, at.precision)
    engines = RecipeEngines(at, recipe, runtime.batch, runtime.calibrate)
    for component, taps, profile in engines.plan():
        start = time.perf_counter()
        graph = at.graph(component, taps, profile)
        report: JsonObject = {}
        engine_is_file = engines.built(graph, profile) is not None
        if not engine_is_file:  # an engine with files was measured when they were built
            # One member and one image: the error is that of many, and takes less memory to measure.
            parity = at.fidelity(graph, replace(profile, ensemble=1, batch=1), None)
            report = {**at.record(), **report_of(parity)}
        path, manifest = save_engine_manifest(at.cache, graph, at.backend, profile, at.device, report)
        if engine_is_file:
            # Backend ``auto`` may have left this backend out because this engine was not built: let it choose again.
            forget_choices(at.cache)
        yield Artifact(path, manifest), time.perf_counter() - start


def list_artifacts(cache: Cache) -> list[Artifact | ArtifactError]:
    """List every graph and engine in the cache, sorted by name; a damaged manifest gives its error instead."""
    records: list[Artifact | ArtifactError] = []
    for path in sorted(cache.folder.glob("*/*.json")):
        try:
            records.append(Artifact(path, Manifest.load(path)))
        except ArtifactError as error:
            records.append(error)
    return records


def verify_artifact(artifact: Artifact, *, cache: Cache | None = None, quick: bool = False) -> str | None:
    """Read an artifact's files in full and compare them with its manifest; measure an engine again.

    Args:
        artifact: what to verify.
        cache: its cache; None for the default one.
        quick: compare only files and versions.

    Returns:
        a remark, if something could not be measured here or was measured for the first time; None otherwise.

    Raises:
        ArtifactError: a file is missing or changed; an engine was made with another version of its runtime or for other
            weights; or its error is larger than when it was built.
        InputError: there is no such backend.
    """
    artifact.manifest.check(artifact.path.parent, {})
    if artifact.manifest.kind != "engine":  # graphs and weights were compared with torch when they were made
        return None
    made_from = artifact.manifest.made_from
    backend = get_backend(str(made_from.get("backend")))
    lacking = backend.missing()
    if lacking:
        return f"not measured: {lacking}"
    if backend.version() != made_from.get("backend_version"):
        raise ArtifactError(
            f"engine '{artifact.path.name}' was made with {backend.name} {made_from.get('backend_version')}, "
            f"installed is {backend.version()}; build it again"
        )
    hindrance = backend.cannot_run(str(made_from.get("device")))
    if hindrance or quick:
        return hindrance
    return _measure_again(artifact, cache or open_cache())


def _measure_again(artifact: Artifact, cache: Cache) -> str | None:
    """Compare an engine's error with the one in its manifest.

    Returns:
        a remark, as `verify_artifact`.

    Raises:
        ArtifactError: the error is larger than when the engine was built.
    """
    made_from, report = artifact.manifest.made_from, artifact.manifest.report
    if "model" not in report:
        return "not measured: it was built by an older difftap"
    if not artifact.parity and not artifact.not_run:
        return "not measured: it is the reference"
    try:
        model = Checkpoint.load(Path(report["model"]["folder"]), report["model"]["name"])
    except InputError as error:
        return f"not measured: {error}"
    profile = Profile(
        (made_from["size"][0], made_from["size"][1]),
        made_from["ensemble"],
        made_from["tokens"],
        made_from["batch"],
        made_from["precision"],
    )
    backend, device = get_backend(made_from["backend"]), made_from["device"]
    at = Environment(cache, model, backend, device, available_cores(), profile.precision)
    graph = at.graph(made_from["component"], tuple(made_from["taps"]), profile)
    artifact.manifest.check(artifact.path.parent, graph_identity(cache, graph) | {"precision": profile.precision})
    built = built_folder(artifact.path)
    files = built if built.is_dir() else None
    parity = at.fidelity(graph, profile if files else replace(profile, ensemble=1, batch=1), files)
    if artifact.not_run and parity:  # it could not be run where it was built, so this first error is recorded
        kept = {name: value for name, value in report.items() if name != "not_run"}
        replace(artifact.manifest, report={**kept, **report_of(parity)}).save(artifact.path)
        worst = max(one.relative for one in parity.values())
        return f"measured for the first time: relative {worst:.1e}"
    for name, one in (parity or {}).items():
        then = artifact.parity[name].relative
        if one.relative > max(_FLOOR, _SLACK * then):
            raise ArtifactError(
                f"engine '{artifact.path.name}' gives '{name}' with a relative error of {one.relative:.1e}; "
                f"when it was built it was {then:.1e}; build it again"
            )
    return None


def clean(cache: Cache, checkpoints: bool = False) -> tuple[int, int]:
    """Remove all models' graphs, engines and linked weights from the cache, and the choices of backend ``auto``.

    Args:
        cache: what to clean.
        checkpoints: also remove the checkpoints that were built in the cache with random weights.

    Returns:
        bytes freed, and bytes of the checkpoints that stay.

    Raises:
        OutputError: something cannot be removed.
    """
    built = cache.folder / "checkpoints"
    # Only folders named by a model's key: a cache folder that the user chose may hold other files.
    folders = [p for p in cache.folder.glob("*") if len(p.name) == 16 and set(p.name) <= set("0123456789abcdef")]
    before = _size(cache.folder)
    with output_errors(cache.folder):
        forget_choices(cache)
    for folder in [*folders, *([built] if checkpoints and built.is_dir() else [])]:
        with output_errors(folder):
            shutil.rmtree(folder)
    return before - _size(cache.folder), _size(built)


def _size(folder: Path) -> int:
    """Count the bytes on disk below a folder; a file with several hard links counts once."""
    files = {(s.st_dev, s.st_ino): s.st_size for s in (p.stat() for p in folder.rglob("*") if p.is_file())}
    return sum(files.values())
