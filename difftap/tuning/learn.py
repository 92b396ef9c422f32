"""Learn prompts: from a model, a recipe and training pairs to a folder with a prompt file."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import platform
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from difftap.artifacts.files import JsonObject, atomic_path, only_writer, output_errors, write_atomic
from difftap.backbones.checkpoint import Checkpoint
from difftap.backbones.sd_unet import SDUNet
from difftap.datasets.keypoints import Sample
from difftap.engine import Cache, Engine, Graph, Profile, get_backend, model_key
from difftap.engine.noise import network_feeds, scales
from difftap.errors import ModelError, RecipeError, require
from difftap.features.keeper import View
from difftap.images import Image
from difftap.machine import available_cores
from difftap.pipeline.environment import check_fits, open_cache
from difftap.prompts import encode_prompt
from difftap.prompts.learned import PROMPT_FILE, LearnedPrompts, fits_of, save_learned
from difftap.prompts.tokens import TokenSource, dino_input, own_grid, own_tokens
from difftap.recipe import Recipe
from difftap.tuning.learner import Learner, PromptKey, key_of
from difftap.tuning.loop import ProcessGroup, open_processes
from difftap.tuning.settings import OWN_TOKENS, TuneSettings
from difftap.tuning.training_pairs import TrainingPairs

if TYPE_CHECKING:
    from difftap.tuning.learner import Learner
    from difftap.tuning.loop import Progress, ProgressCallbacks, TrainingLoop
    from difftap.tuning.posteriors import ImagePosterior, ImageStore

__all__ = ["TuneResult", "class_keys", "save_course", "save_plot", "tensors_of", "tune"]


CLASS_PAIRS = 200
"""At most this many training pairs of a class have their conditional prompts averaged, for the ``class`` mode."""


def class_keys(samples: Sequence[Sample], kind: str, classes: Sequence[str]) -> list[list[PromptKey]]:
    """List, for each row of a prompt file, the keys whose prompts are averaged: one row, or one row per class."""
    if kind == "single":
        return [[PromptKey()]]
    if kind == "class":
        return [[PromptKey(name)] for name in classes]
    rows = []
    for name in classes:
        own = [key_of(sample, kind) for sample in samples if sample.category == name]
        count = min(CLASS_PAIRS, len(own))
        rows.append([own[k * len(own) // count] for k in range(count)])
    return rows


def tensors_of(
    learner: Learner, rows: Sequence[Sequence[PromptKey]], tokens: Callable[[View], NDArray[np.float32]]
) -> dict[str, NDArray[np.float32]]:
    """Give a branch's tensors as a prompt file holds them.

    Prompts are averaged before they go through the text encoder.

    Args:
        learner: the branch's prompt.
        rows: the keys of each row (`class_keys`).
        tokens: gives an image's tokens ``(N, K)``.

    Returns:
        ``embedding`` ``(rows, L, D)``, and the parameters: ``head.*`` or ``tokens``.
    """
    import torch

    device = learner.space.empty.device
    with torch.no_grad():
        embeddings = []
        for keys in rows:
            total = torch.zeros(1, device=device)
            for key in keys:
                total = total + learner.sequences([key], lambda view: torch.from_numpy(tokens(view)).to(device))
            embeddings.append(learner.space.encode(total / len(keys))[0].float().cpu().numpy())
    found = {"embedding": np.stack(embeddings)}
    if learner.head is not None:
        found |= {f"head.{name}": value.cpu().numpy() for name, value in learner.head.state_dict().items()}
    elif learner.rows is not None:
        found["tokens"] = learner.rows.detach().cpu().numpy()
    return found


def save_course(path: Path, groups: Sequence[JsonObject]) -> None:
    """Write each training's losses and epochs as JSON."""
    write_atomic(path, json.dumps({"schema": 1, "groups": list(groups)}, indent=1) + "\n")


def save_plot(path: Path, groups: Sequence[JsonObject]) -> None:
    """Draw loss and validation PCK of each training side by side, as PNG.

    Raises:
        MissingExtraError: matplotlib is not installed.
        OutputError: it cannot be written.
    """
    require("matplotlib", "tune", "drawing a training's course")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for number, group in enumerate(groups):
        name = "" if len(groups) == 1 else f"branch {group['branches'][0]} "
        losses, rows = np.asarray(group["losses"]), group["history"]
        colour = f"C{number}"
        left.plot(np.arange(1, len(losses) + 1), losses, color=colour, alpha=0.3, linewidth=0.8)
        if rows:
            steps = len(losses) / len(rows)
            left.plot(
                [steps * (row["epoch"] - 0.5) for row in rows],
                [row["loss"] for row in rows],
                color=colour,
                label=f"{name}mean of the epoch",
            )
            epochs = [row["epoch"] for row in rows]
            right.plot(epochs, [100 * row["0.1"] for row in rows], color=colour, marker=".", label=f"{name}learned")
        right.axhline(100 * group["empty"]["0.1"], color=colour, linestyle=":", label=f"{name}empty prompt")
        if group["best"]:
            best = rows[group["best"] - 1]
            right.plot([best["epoch"]], [100 * best["0.1"]], "o", color=colour, markerfacecolor="none", markersize=10)
    left.set(xlabel="step", ylabel="loss", title="Training loss")
    right.set(xlabel="epoch", ylabel="PCK@0.10, per cent", title="Validation (nearest cell; ring: kept)")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
    with atomic_path(path) as scratch, open(scratch, "wb") as handle:
        figure.savefig(handle, format="png", dpi=110)


_LOG = logging.getLogger("difftap")


@dataclass(frozen=True)
class TuneResult:
    """The result of a training.

    Attributes:
        prompts: the prompt file.
        scores: the scores of each group of branches that was learned together.
        images: images that went through the VAE in this run; those of an earlier run are read from files.
    """

    prompts: LearnedPrompts
    scores: Sequence[JsonObject]
    images: int


_AS_BEFORE = (("loss", "normalised"), ("draws", "fixed"))


@dataclass(frozen=True)
class _Job:
    """What a training is made of, checked and opened."""

    model: SDUNet
    recipe: Recipe
    settings: TuneSettings
    pairs: TrainingPairs
    cache: Cache
    folder: Path
    device: str
    threads: int
    processes: ProcessGroup
    timesteps: tuple[int, ...]


def tune(
    model: Checkpoint,
    recipe: Recipe,
    pairs: TrainingPairs,
    settings: TuneSettings,
    folder: Path,
    *,
    cache: Cache | None = None,
    device: str = "auto",
    threads: int | None = None,
    overwrite: bool = False,
    watcher: ProgressCallbacks | None = None,
) -> TuneResult:
    """Learn a recipe's prompts and write them to a folder; continue a run that was stopped there.

    Args:
        model: the checkpoint.
        recipe: the recipe that the prompts are for.
        pairs: training and validation pairs.
        settings: how to learn.
        folder: gets the prompt file, the training's course and its state.
        cache: the artifact cache; the user's own by default.
        device: torch's name of the device, or ``auto``.
        threads: threads of torch; all cores by default.
        overwrite: start again, and delete what an earlier run left.
        watcher: called with the training's progress.

    Raises:
        MissingExtraError: torch, diffusers or transformers is not installed.
        InputError: model, recipe, pairs and settings do not fit together.
        OutputError: the folder holds another training, is in use, or cannot be written.
    """
    for module in ("torch", "diffusers", "transformers"):
        require(module, "tune", "learning a prompt")
    import torch

    processes = open_processes(device)
    device = processes.device or (("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    check_fits(recipe, model)
    if not isinstance(model, SDUNet):
        raise ModelError(f"model '{model.name}' reads no prompt that can be learned; allowed: Stable Diffusion's UNets")
    if model.pooled_width:
        raise ModelError(f"model '{model.name}' reads two text encoders (SDXL); allowed for learning: one, or none")
    settings.check(recipe)
    recipe = dataclasses.replace(recipe, learned=None)
    timesteps = _timesteps(recipe, settings, model)
    count = threads or available_cores()
    job = _Job(
        model,
        recipe,
        settings,
        pairs,
        cache or open_cache(),
        folder,
        device,
        count,
        processes,
        timesteps,
    )
    with _own_folder(folder, overwrite, processes), _threads(count):
        return _Run(job, watcher).run()


def _timesteps(recipe: Recipe, settings: TuneSettings, model: SDUNet) -> tuple[int, ...]:
    """Give the timestep at which each branch's prompt is learned.

    Raises:
        RecipeError: there is not one for each branch, or one is not in the schedule.
    """
    own = tuple(b.timestep if b.tuned_at is None else b.tuned_at for b in recipe.branches)
    chosen = settings.timesteps or own
    if len(chosen) != len(own):
        raise RecipeError(f"{len(chosen)} timesteps for a recipe of {len(own)} branches; give one for each, or none")
    for timestep in chosen:
        if timestep < 0:
            raise RecipeError(f"timestep is {timestep}; allowed: 0 or more")
        scales(model.noise_rule, timestep, recipe.noise)  # raises if the schedule has no such timestep
    return chosen


@contextlib.contextmanager
def _own_folder(folder: Path, overwrite: bool, processes: ProcessGroup) -> Iterator[None]:
    """Make the folder and lock it; of several processes, the first one does so.

    Raises:
        OutputError: it cannot be made, or another training is using it.
    """
    if processes.rank:
        processes.wait()  # until the first process has made the folder
        yield
        return
    with output_errors(folder):
        (folder / "training").mkdir(parents=True, exist_ok=True)
    with only_writer(folder, folder / "training" / ".lock"):
        if overwrite:
            for path in [*folder.glob("cpm.*"), folder / PROMPT_FILE, *(folder / "training").iterdir()]:
                if path.name != ".lock":
                    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        processes.wait()
        yield


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        # A resumed run must give the same prompt as an unbroken one.
        with torch.backends.cudnn.flags(deterministic=True, allow_tf32=False):
            yield
    finally:
        torch.set_num_threads(before)


class _Run:
    """The steps of a training, from the opened parts to the written files."""

    def __init__(self, job: _Job, watcher: ProgressCallbacks | None) -> None:
        self.job = job
        self.watcher = watcher

    def run(self) -> TuneResult:
        from difftap.tuning.learner import Learner, open_space
        from difftap.tuning.loop import TrainingLoop
        from difftap.tuning.passes import TappedUNet

        job = self.job
        source = self._token_source()
        space = open_space(job.model, job.cache, job.device, job.settings.tokens)
        store = self._store(source)
        empty = encode_prompt(job.model, "", job.cache)
        branches = range(len(job.recipe.branches))
        groups = [list(branches)] if job.settings.joint == "joint" else [[k] for k in branches]
        learners: dict[int, Learner] = {}
        scores: list[JsonObject] = []
        courses: list[JsonObject] = []
        unet = None
        for number, group in enumerate(groups):
            recipe = dataclasses.replace(job.recipe, branches=tuple(job.recipe.branches[k] for k in group))
            steps = [job.timesteps[k] for k in group]
            made = [
                Learner(
                    job.settings, space, job.pairs.classes, (source.count, source.channels) if source else (0, 0), k,
                    job.device,
                )
                for k in group
            ]  # fmt: skip
            passes = TappedUNet(
                job.model, recipe, steps, job.device, precision=job.settings.precision,
                checkpointing=job.settings.checkpointing, unet=unet,
            )  # fmt: skip
            unet = passes.unet  # the next group uses the same one: it is frozen
            loop = TrainingLoop(recipe, job.settings, job.pairs, made, passes, store, empty, job.processes, job.device)
            watcher = self._watching(loop, group, courses)
            loop.run(job.folder / "training" / f"state.{number}.safetensors", self._identity(source, group), watcher)
            loop.take_best()
            courses.append(_course(loop, group))
            self._save_course(courses)
            learners |= dict(zip(group, made, strict=True))
            scores.append(self._scores(loop, group))
        prompts = None
        if job.processes.rank == 0:
            prompts = self._write([learners[k] for k in branches], store, source, scores)
        job.processes.wait()
        if prompts is None:  # not the first process: read what the first one wrote
            from difftap.prompts.learned import load_learned

            prompts = load_learned(job.folder)
        return TuneResult(prompts, scores, store.made)

    def _watching(self, loop: TrainingLoop, group: Sequence[int], before: Sequence[JsonObject]) -> ProgressCallbacks:
        """Make callbacks that save the course after each epoch and then call the caller's."""
        from difftap.tuning.loop import ProgressCallbacks

        watcher = self.watcher or ProgressCallbacks()

        def epoch(progress: Progress, row: dict[str, float]) -> None:
            self._save_course([*before, _course(loop, group)])
            watcher.epoch(progress, row)

        return ProgressCallbacks(watcher.step, epoch)

    def _save_course(self, courses: Sequence[JsonObject]) -> None:
        if self.job.processes.rank == 0:
            save_course(self.job.folder / "training.json", courses)
            save_plot(self.job.folder / "training.png", courses)

    def _identity(self, source: TokenSource | None, group: Sequence[int]) -> dict[str, object]:
        """Give what must be equal for a run to continue a state."""
        import torch

        job = self.job
        settings = job.settings.to_dict()
        del settings["epochs"], settings["steps"]  # a finished training may be continued for longer
        # Settings that difftap 0.1.0 did not have are left out where they say what it did, so that its folders go on.
        settings = {name: value for name, value in settings.items() if (name, value) not in _AS_BEFORE}
        if job.settings.kind == "cpm":
            settings["alpha"] = "a token and channel"  # 0.1.0 learned one number, whose state does not fit
        return {
            "model": model_key(job.cache, job.model),
            "recipe": {**fits_of(job.recipe), "seed": job.recipe.seed, "joining": self._joining()},
            "data": dict(job.pairs.about),
            **settings,
            "timesteps": list(job.timesteps),
            "tokens_from": source and source.to_dict(),
            "branches": list(group),
            "threads": job.threads,
            "device": job.device.split(":")[0],
            "processes": job.processes.size,
            "torch": str(torch.__version__),
            "machine": platform.machine(),
        }

    def _joining(self) -> dict[str, object]:
        recipe = self.job.recipe
        weights = [branch.weight for branch in recipe.branches]
        return {"combine": recipe.combine, "upsample": recipe.upsample, "weights": weights}

    def _token_source(self) -> TokenSource | None:
        """Describe where image tokens come from; None if no prompt depends on an image."""
        job = self.job
        if job.settings.kind != "cpm":
            return None
        if job.settings.image_tokens != OWN_TOKENS:
            from difftap.export.conditional import dino_facts

            name = job.settings.image_tokens
            digest, side, channels = dino_facts(name, job.cache)
            return TokenSource("dinov2", 256, channels, network=name, weights=digest, side=side, fit="crop")
        tap = job.model.tap(job.settings.image_tap)
        if not tap.channels:
            raise RecipeError(f"image tap '{tap.name}' is a module path; allowed: a block's or a layer's short name")
        grid = own_grid(job.recipe.size, tap.stride)
        return TokenSource("own", grid[0] * grid[1], tap.channels, tap.name, job.timesteps[0], grid)

    def _store(self, source: TokenSource | None) -> ImageStore:
        from difftap.tuning.posteriors import ImageStore

        job, torch_backend = self.job, get_backend("torch")

        def engine(component: str, taps: tuple[str, ...], profile: Profile) -> Engine:
            return torch_backend.open(Graph(job.model, component, taps), profile, job.device, job.threads)

        vae = engine("vae", (), Profile(job.recipe.size))
        tokens: Callable[[Image, ImagePosterior], NDArray[np.float32]] | None = None
        if source is not None and source.kind == "own":
            empty = encode_prompt(job.model, "", job.cache)
            unet = engine("unet", (source.tap,), Profile(job.recipe.size, 1, len(empty)))

            def tokens(_image: Image, known: ImagePosterior) -> NDArray[np.float32]:
                return own_tokens(_own_map(job, unet, source, known, empty), source.grid)

        elif source is not None:
            from difftap.export.conditional import dino_folder, image_network, numpy_tokens

            network = numpy_tokens(image_network(dino_folder(source.network)), job.device)

            def tokens(image: Image, _known: ImagePosterior) -> NDArray[np.float32]:
                return network(dino_input(image, source.side, source.fit))

        # A folder for each process, so that two processes never write the same file.
        name = f"images.{job.processes.rank}" if job.processes.size > 1 else "images"
        return ImageStore(job.recipe, vae, tokens, job.folder / "training" / name, job.pairs.generators)

    def _scores(self, loop: TrainingLoop, group: Sequence[int]) -> JsonObject:
        at = loop.progress
        best = next((row for row in at.history if row["epoch"] == at.best), {})
        return {
            "branches": list(group),
            "measure": "validation PCK, SD4Match's frame and basis, nearest cell, mean over images",
            "empty": at.empty,
            "best": {name: value for name, value in best.items() if name not in ("epoch", "loss")},
            "epoch": at.best,
            "epochs": len(at.history),
            "steps": at.done,
            "history": at.history,
        }

    def _write(
        self, learners: Sequence[Learner], store: ImageStore, source: TokenSource | None, scores: list[JsonObject]
    ) -> LearnedPrompts:
        from difftap.version import __version__

        job = self.job
        classes = () if job.settings.kind == "single" else job.pairs.classes
        chosen = class_keys(job.pairs.train, job.settings.kind, classes)
        about = {
            "kind": job.settings.kind,
            "classes": list(classes),
            "model": {"name": job.model.name, "key": model_key(job.cache, job.model)},
            "fits": fits_of(job.recipe),
            "recipe": job.recipe.to_dict(),
            "timesteps": list(job.timesteps),
            "data": dict(job.pairs.about),
            "settings": job.settings.to_dict(),
            "image_tokens": source and source.to_dict(),
            "width": learners[0].space.width,
            "steps": sum(one["steps"] for one in scores),
            "scores": scores,
            "made_with": {"difftap": __version__, **self._identity(source, ()), "branches": len(learners)},
        }
        sizes = {
            path: size
            for sample in job.pairs.train
            for path, size in ((sample.source, sample.source_size), (sample.target, sample.target_size))
        }

        def tokens(view: View) -> NDArray[np.float32]:
            return store.get(view, sizes[view.path]).tokens

        branches = [tensors_of(learner, chosen, tokens) for learner in learners]
        prompts = save_learned(job.folder, about, branches)
        if job.settings.kind == "cpm":
            from difftap.export.conditional import export_heads, text_graph

            heads = [learner.head for learner in learners if learner.head is not None]
            export_heads(job.model, job.cache, prompts.path, prompts.sha256, heads)
            if learners[0].space.encoder is not None:
                length = branches[0]["embedding"].shape[1]
                text_graph(job.model, job.cache, length, learners[0].space.width)
        return prompts


def _course(loop: TrainingLoop, group: Sequence[int]) -> JsonObject:
    at = loop.progress
    return {
        "branches": list(group),
        "losses": list(at.losses),
        "history": list(at.history),
        "empty": at.empty,
        "best": at.best,
        "seconds": round(at.seconds, 1),
    }


def _own_map(
    job: _Job, unet: Engine, source: TokenSource, known: ImagePosterior, empty: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Compute the map ``(C, h, w)`` that an image's own tokens are made from."""
    posterior = {"mean": known.mean[None], "std": known.std[None]}
    noises = np.stack([known.posterior_noise, known.noise])[:, None]  # (2, B, E, C, h, w)
    feeds = network_feeds(job.model, source.timestep, job.recipe.noise, posterior, noises, empty)
    found: NDArray[np.float32] = unet.run(feeds)[source.tap][0]
    return found
