"""Engines: a recipe's graphs made ready on backends, run, held against the float32 reference, and recorded.

For ONNX Runtime and OpenVINO in float32 the engine's file is the graph itself with its shapes fixed when it is opened;
what is quantised or compiled ahead of time has a folder of its own beside the same manifest.
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
from difftap.errors import ArtefactError, BackendError, InputError
from difftap.export.parity import TensorParity
from difftap.machine import available_cores
from difftap.pipeline.environment import Environment, RecipeEngines, Runtime, open_cache, report_of
from difftap.pipeline.fastest import AUTO, forget_choices, open_environment
from difftap.recipe import Recipe

__all__ = ["Artefact", "BuildJob", "build_engines", "clean", "list_artefacts", "plan_builds", "verify_artefact"]

_SLACK = 1.05
"""Measured again, an engine's error may be this much larger than when it was built, for another count of threads."""
_FLOOR = 1e-5
"""Relative errors below this are rounding, and are not compared."""


@dataclass(frozen=True)
class Artefact:
    """A graph or an engine in the cache: its manifest's path and content."""

    path: Path
    manifest: Manifest

    @property
    def size(self) -> int:
        """Bytes of the files it uses; weights may be shared with other engines."""
        return sum(record.size for record in self.manifest.files.values())

    @property
    def stem(self) -> str:
        """The name of the folder that an engine's own files lie in."""
        return built_folder(self.path).name

    @property
    def not_run(self) -> str | None:
        """Why an engine was built but not run where it was built; None if it was."""
        return self.manifest.report.get("not_run")

    @property
    def parity(self) -> dict[str, TensorParity]:
        """What was measured against the float32 reference, by output; empty where nothing was."""
        return {name: TensorParity(**one) for name, one in self.manifest.report.get("parity", {}).items()}


@dataclass(frozen=True)
class BuildJob:
    """A recipe's engines on one backend, in one precision and at one size."""

    recipe: Recipe
    runtime: Runtime

    @property
    def label(self) -> str:
        """For tables and messages: ``512x512 openvino int8``."""
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
                raise InputError("backend 'auto' chooses in one precision; got 'all'; allowed: named ones")
            pairs += [(AUTO, precision) for precision in dict.fromkeys(precisions)]
            continue
        backend = get_backend(name)
        device = choose_device(backend, runtime.device)
        has = backend.precisions(device)
        wanted = has if "all" in precisions else precisions
        if len(backends) == 1:
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


def build_engines(recipe: Recipe, runtime: Runtime) -> Iterator[tuple[Artefact, float]]:
    """Make a recipe's engines on one backend: yields each one's record, and the seconds that it took.

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
        if not engine_is_file:  # what has files was measured when it was built
            # The fidelity of one member is that of many, in less memory.
            parity = at.fidelity(graph, replace(profile, ensemble=1, batch=1), None)
            report = {**at.record(), **report_of(parity)}
        path, manifest = save_engine_manifest(at.cache, graph, at.backend, profile, at.device, report)
        if engine_is_file:
            forget_choices(at.cache)  # what was left out for want of this engine is measured next time
        yield Artefact(path, manifest), time.perf_counter() - start


def list_artefacts(cache: Cache) -> list[Artefact | ArtefactError]:
    """Every graph and engine in the cache, in the order of their names; a damaged manifest gives its error."""
    records: list[Artefact | ArtefactError] = []
    for path in sorted(cache.folder.glob("*/*.json")):
        try:
            records.append(Artefact(path, Manifest.load(path)))
        except ArtefactError as error:
            records.append(error)
    return records


def verify_artefact(artefact: Artefact, *, cache: Cache | None = None, quick: bool = False) -> str | None:
    """Read an artefact's files again in full and compare them with its manifest, then measure an engine again.

    Args:
        artefact: what to verify.
        cache: where it lies; None for the default cache.
        quick: look at files and versions alone.

    Returns:
        What could not be looked at here and why, or was for the first time, in a few words; None if everything was.

    Raises:
        ArtefactError: a file is missing or changed; an engine was made with another version of its runtime or for other
            weights; or it is farther from the reference than when it was built.
        InputError: there is no such backend.
    """
    artefact.manifest.check(artefact.path.parent, {})
    if artefact.manifest.kind != "engine":  # what does not run has nothing to be measured
        return None
    made_from = artefact.manifest.made_from
    backend = get_backend(str(made_from.get("backend")))
    lacking = backend.missing()
    if lacking:
        return f"not measured: {lacking}"
    if backend.version() != made_from.get("backend_version"):
        raise ArtefactError(
            f"engine '{artefact.path.name}' was made with {backend.name} {made_from.get('backend_version')}, "
            f"installed is {backend.version()}; build it again"
        )
    hindrance = backend.cannot_run(str(made_from.get("device")))
    if hindrance or quick:
        return hindrance
    return _measure_again(artefact, cache or open_cache())


def _measure_again(artefact: Artefact, cache: Cache) -> str | None:
    """Compare an engine's error with what its manifest says; gives why that cannot be done, or None."""
    made_from, report = artefact.manifest.made_from, artefact.manifest.report
    if "model" not in report:
        return "not measured: it was built by an older difftap"
    if not artefact.parity and not artefact.not_run:
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
    artefact.manifest.check(artefact.path.parent, graph_identity(cache, graph) | {"precision": profile.precision})
    built = built_folder(artefact.path)
    files = built if built.is_dir() else None
    parity = at.fidelity(graph, profile if files else replace(profile, ensemble=1, batch=1), files)
    if artefact.not_run and parity:  # built where it could not run: what is measured here is what it is held to
        kept = {name: value for name, value in report.items() if name != "not_run"}
        replace(artefact.manifest, report={**kept, **report_of(parity)}).save(artefact.path)
        worst = max(one.relative for one in parity.values())
        return f"measured for the first time: relative {worst:.1e}"
    for name, one in (parity or {}).items():
        then = artefact.parity[name].relative
        if one.relative > max(_FLOOR, _SLACK * then):
            raise ArtefactError(
                f"engine '{artefact.path.name}' gives '{name}' with a relative error of {one.relative:.1e}; "
                f"when it was built it was {then:.1e}; build it again"
            )
    return None


def clean(cache: Cache, checkpoints: bool = False) -> tuple[int, int]:
    """Remove every model's graphs, engines and linked weights from the cache, and what ``auto`` chose.

    Args:
        cache: what to clean.
        checkpoints: remove checkpoints that were built into the cache with random weights too.

    Returns:
        Bytes freed, and bytes of such checkpoints that stay.

    Raises:
        OutputError: something cannot be removed.
    """
    built = cache.folder / "checkpoints"
    # Only folders that bear a model's key are ours to remove.
    folders = [p for p in cache.folder.glob("*") if len(p.name) == 16 and set(p.name) <= set("0123456789abcdef")]
    before = _size(cache.folder)
    with output_errors(cache.folder):
        forget_choices(cache)
    for folder in [*folders, *([built] if checkpoints and built.is_dir() else [])]:
        with output_errors(folder):
            shutil.rmtree(folder)
    return before - _size(cache.folder), _size(built)


def _size(folder: Path) -> int:
    """Bytes on disk below a folder; what has several names there counts once."""
    files = {(s.st_dev, s.st_ino): s.st_size for s in (p.stat() for p in folder.rglob("*") if p.is_file())}
    return sum(files.values())
