"""The training loop: steps, validation, the best epoch, and a state from which a stopped run continues.

The order of pairs depends only on the seed and the epoch, so a resumed run does the same as an unbroken one.
Axis letters: B images; N keypoints; C channels; h w cells.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

from difftap.artifacts.files import write_atomic
from difftap.artifacts.memory import MemoryCache
from difftap.artifacts.run import check_conditions
from difftap.bench.predictions import Prediction
from difftap.bench.protocols import PROTOCOLS
from difftap.bench.scoring import measure
from difftap.coords import CornerGeometry, Geometry
from difftap.datasets.keypoints import Sample
from difftap.engine.noise import draw
from difftap.errors import InputError, NonFiniteError, OutputError, require
from difftap.features.keeper import View
from difftap.matching import Matches, nearest_cell
from difftap.matching.grid import content_cells
from difftap.recipe import Recipe
from difftap.tuning.learner import Learner, PromptKey, key_of, views_of
from difftap.tuning.loss import fused_cosines, gaussian_cross_entropy
from difftap.tuning.passes import TappedUNet
from difftap.tuning.posteriors import ImagePosterior, ImageStore
from difftap.tuning.settings import TuneSettings
from difftap.tuning.training_pairs import TrainingPairs

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

__all__ = [
    "ALPHAS",
    "CELLS_AT_ONCE",
    "ProcessGroup",
    "Progress",
    "ProgressCallbacks",
    "TrainingLoop",
    "load_state",
    "open_processes",
    "save_state",
]


_T = TypeVar("_T")


class ProcessGroup:
    """The processes that learn one prompt together, seen from this one.

    Each process takes its share of a step's pairs, and the gradients are summed. So the learned prompt is the same as
    that of one process, up to rounding. They are started with ``accelerate launch -m difftap.cli tune ...``.

    Args:
        accelerator: accelerate's; None if this process is alone.

    Attributes:
        rank: this process's number; number 0 writes files.
        size: number of processes.
    """

    def __init__(self, accelerator: Accelerator | None = None) -> None:
        self._accelerator = accelerator
        self.rank = 0 if accelerator is None else int(accelerator.process_index)
        self.size = 1 if accelerator is None else int(accelerator.num_processes)

    @property
    def device(self) -> str | None:
        """The device that accelerate gave to this process; None without it."""
        return None if self._accelerator is None else str(self._accelerator.device)

    def share(self, items: Sequence[_T]) -> Sequence[_T]:
        """Give this process's part of a list."""
        return items[self.rank :: self.size]

    def add(self, values: torch.Tensor) -> torch.Tensor:
        """Sum the tensors of all processes."""
        if self._accelerator is None:
            return values
        summed: torch.Tensor = self._accelerator.reduce(values, reduction="sum")
        return summed

    def wait(self) -> None:
        """Wait until every process has reached this call."""
        if self._accelerator is not None:
            self._accelerator.wait_for_everyone()


def open_processes(device: str) -> ProcessGroup:
    """Join the processes that a launcher started together; without a launcher, this process is alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) <= 1:
        return ProcessGroup()
    accelerate = require("accelerate", "tune", "learning in several processes")
    return ProcessGroup(accelerate.Accelerator(cpu=device == "cpu"))


_KEY = "difftap"  # names our entry in the state's metadata


@dataclass
class Progress:
    """How far a training is.

    Attributes:
        epoch: the current epoch, from 0.
        step: steps of this epoch that are done.
        done: steps of all epochs that are done.
        total: sum of the loss over this epoch's pairs so far.
        pairs: number of this epoch's pairs so far.
        losses: mean loss of every step.
        history: one row per epoch: ``epoch``, ``loss``, and validation PCK at each alpha, 0 to 1.
        empty: validation PCK of the empty prompt.
        best: the best epoch's number, from 1; 0 before the first one ends.
        seconds: time spent so far, for people; it decides nothing.
    """

    epoch: int = 0
    step: int = 0
    done: int = 0
    total: float = 0.0
    pairs: int = 0
    losses: list[float] = field(default_factory=list)
    history: list[dict[str, float]] = field(default_factory=list)
    empty: dict[str, float] = field(default_factory=dict)
    best: int = 0
    seconds: float = 0.0


def save_state(
    path: Path,
    identity: Mapping[str, object],
    progress: Progress,
    parameters: Sequence[torch.Tensor],
    best: Sequence[torch.Tensor],
    optimizer: torch.optim.Optimizer,
) -> None:
    """Write everything that a later run needs to continue.

    Args:
        path: the state's file.
        identity: what must be equal for a run to continue it.
        progress: how far the training is.
        parameters: their current values.
        best: their values after the best epoch.
        optimizer: its moments are saved too.

    Raises:
        OutputError: the file cannot be written.
    """
    from safetensors.torch import save

    tensors: dict[str, torch.Tensor] = {}
    # Cloned, because safetensors refuses tensors that share memory.
    for name, group in (("now", parameters), ("best", best)):
        tensors |= {f"{name}.{k}": value.detach().cpu().contiguous().clone() for k, value in enumerate(group)}
    for k, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"adam.{k}.{name}": value.detach().cpu().contiguous().clone() for name, value in moments.items()}
    about = {"identity": identity, "progress": asdict(progress)}
    write_atomic(path, save(tensors, metadata={_KEY: json.dumps(about)}))


def load_state(
    path: Path,
    identity: Mapping[str, object],
    parameters: Sequence[torch.Tensor],
    best: list[torch.Tensor],
    optimizer: torch.optim.Optimizer,
) -> Progress:
    """Read a state into the parameters, the best values and the optimizer; return its progress.

    Raises:
        OutputError: the state is damaged or belongs to another training.
    """
    import torch
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            about = json.loads(file.metadata()[_KEY])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        earlier, progress = about["identity"], Progress(**about["progress"])
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise OutputError(f"'{path}' cannot be read ({error}); start again with --overwrite") from error
    check_conditions(path.parent.parent, earlier, json.loads(json.dumps(identity)), kind="folder")
    with torch.no_grad():
        for k, value in enumerate(parameters):
            value.copy_(tensors[f"now.{k}"])
        # In place, because the caller holds the list.
        best[:] = [tensors[f"best.{k}"].to(value.device) for k, value in enumerate(parameters)]
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("adam."):
            _, k, moment = name.split(".")
            state.setdefault(int(k), {})[moment] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    return progress


ALPHAS = (0.05, 0.1)

CELLS_AT_ONCE = 16384
"""Intermediate values of passes over at most this many latent cells are held at once, for the backward pass, unless
`TuneSettings.passes` decides."""

_EVERY = 30.0  # seconds between two saved states
_MAPS = 1 << 30  # bytes of maps that validation keeps


@dataclass(frozen=True)
class ProgressCallbacks:
    """Functions that are called with a training's progress.

    Attributes:
        step: called after each step with the steps done, the steps in all, and the seconds left.
        epoch: called after each epoch with the progress and the epoch's row of `Progress.history`.
    """

    step: Callable[[int, int, float], None] = lambda done, of, left: None
    epoch: Callable[[Progress, dict[str, float]], None] = lambda progress, row: None


class TrainingLoop:
    """One training: one prompt for each branch of a recipe, learned together.

    Args:
        recipe: gives branches, joining and size; the whole recipe, or one branch of it.
        settings: how to learn.
        pairs: training and validation pairs.
        learners: the prompts, one per branch.
        passes: the UNet, with one pass per branch.
        store: the images' posteriors.
        empty: ``(T, D)``, the empty prompt, to compare with.
        processes: the processes that share the work.
        device: the device of tensors.

    Attributes:
        best: the parameters' values after the best epoch.
        progress: how far the training is.
    """

    def __init__(
        self,
        recipe: Recipe,
        settings: TuneSettings,
        pairs: TrainingPairs,
        learners: Sequence[Learner],
        passes: TappedUNet,
        store: ImageStore,
        empty: NDArray[np.float32],
        processes: ProcessGroup,
        device: str,
    ) -> None:
        import torch

        self._recipe = recipe
        self._settings = settings
        self._pairs = pairs
        self._learners = tuple(learners)
        self._passes = passes
        self._store = store
        self._processes = processes
        self._device = device
        self._empty = torch.from_numpy(empty).to(device)
        groups = [group for learner in learners for group in learner.groups(settings)]
        self._parameters = [value for value, _ in groups]
        self.best = [value.detach().clone() for value in self._parameters]
        # foreach=False: the default depends on the device and may round differently.
        self._optimizer = torch.optim.Adam([{"params": [value], "lr": rate} for value, rate in groups], foreach=False)
        self._shares = [branch.weight / len(branch.taps) for branch in recipe.branches for _ in branch.taps]
        self.progress = Progress()
        self._sizes: dict[View, tuple[int, int]] = {}

    @property
    def steps(self) -> int:
        """Number of steps of one epoch."""
        return -(-len(self._pairs.train) // self._settings.batch)

    @property
    def total(self) -> int:
        """Number of steps of the whole training."""
        whole = self.steps * self._settings.epochs
        return min(whole, self._settings.steps) if self._settings.steps else whole

    def run(self, state: Path, identity: Mapping[str, object], watcher: ProgressCallbacks) -> None:
        """Learn to the end, continuing the state on disk if there is one.

        Args:
            state: the state's file.
            identity: what must be equal for a run to continue it.
            watcher: called with the progress.

        Raises:
            OutputError: the state belongs to another training, or cannot be written.
            NonFiniteError: the loss is not finite.
        """
        if state.is_file():
            self.progress = load_state(state, identity, self._parameters, self.best, self._optimizer)
        saved = time.monotonic()

        def save() -> None:  # does not wait for other processes: their clocks differ, so they would not come here
            nonlocal saved
            saved = time.monotonic()
            if self._processes.rank == 0:
                save_state(state, identity, self.progress, self._parameters, self.best, self._optimizer)

        if not self.progress.empty:  # measured once: a resumed run reads it from the state
            self.progress.empty = self.validate(None)
            save()
        at = self.progress
        spent: list[float] = []
        while not self._finished():
            order = self._order(at.epoch)
            while at.step < self.steps and not self._at_limit():
                began = time.monotonic()
                batch = order[at.step * self._settings.batch : (at.step + 1) * self._settings.batch]
                loss = self._step([self._pairs.train[k] for k in batch])
                at.step, at.done = at.step + 1, at.done + 1
                at.total, at.pairs = at.total + loss * len(batch), at.pairs + len(batch)
                at.losses.append(loss)
                spent = [*spent[-19:], time.monotonic() - began]  # the last 20 steps, to estimate the seconds left
                at.seconds += spent[-1]
                watcher.step(at.done, self.total, sum(spent) / len(spent) * (self.total - at.done))
                if time.monotonic() - saved > _EVERY:
                    save()
            self._end_epoch(watcher)
            save()

    def take_best(self) -> None:
        """Copy the best epoch's values into the learners."""
        import torch

        with torch.no_grad():
            for value, best in zip(self._parameters, self.best, strict=True):
                value.copy_(best)

    def _at_limit(self) -> bool:
        return bool(self._settings.steps) and self.progress.done >= self._settings.steps

    def _finished(self) -> bool:
        # At a limit of steps, the epoch that it cuts short must still be validated; `_end_epoch` sets step to 0.
        return self.progress.epoch >= self._settings.epochs or (self._at_limit() and self.progress.step == 0)

    def _end_epoch(self, watcher: ProgressCallbacks) -> None:
        at = self.progress
        began = time.monotonic()
        row = {"epoch": at.epoch + 1.0, "loss": at.total / max(1, at.pairs), **self.validate(self._learners)}
        at.seconds += time.monotonic() - began
        if not at.best or row["0.1"] > max(old["0.1"] for old in at.history):
            at.best = at.epoch + 1
            self.best = [value.detach().clone() for value in self._parameters]
        at.history.append(row)
        at.epoch, at.step, at.total, at.pairs = at.epoch + 1, 0, 0.0, 0
        watcher.epoch(at, row)

    def _order(self, epoch: int) -> list[int]:
        # A counter-based generator with the epoch in its key: no state of earlier epochs has to be saved.
        rng = np.random.Generator(np.random.Philox(key=[self._settings.seed, epoch]))
        return [int(k) for k in rng.permutation(len(self._pairs.train))]

    def _step(self, batch: Sequence[Sample]) -> float:
        """Do one step of Adam on a batch; return its mean loss."""
        import torch

        self._optimizer.zero_grad(set_to_none=False)
        for value in self._parameters:
            if value.grad is None:  # a process whose share is empty must still add a gradient
                value.grad = torch.zeros_like(value)
        mine = self._processes.share(batch)
        width, height = self._recipe.size
        cells = (width // self._passes.stride) * (height // self._passes.stride)
        together = self._settings.passes or max(1, CELLS_AT_ONCE // (2 * cells))
        total = torch.zeros(1, device=self._device)
        for start in range(0, len(mine), together):
            losses = self.losses(mine[start : start + together])
            (losses.sum() / len(batch)).backward()  # gradients add up, so the parts give the batch's mean
            total += losses.detach().sum()
        loss = float(self._processes.add(total)) / len(batch)
        if not np.isfinite(loss):
            raise NonFiniteError(f"the loss of step {self.progress.done + 1} is not finite; use precision fp32")
        for value in self._parameters:
            if value.grad is not None:  # never None here, but its type allows it
                value.grad = self._processes.add(value.grad)
        self._optimizer.step()
        return loss

    def losses(self, samples: Sequence[Sample]) -> torch.Tensor:
        """Compute the loss of each pair, averaged over its keypoints, ``(pairs,)``."""
        import torch

        maps = self._maps(samples, self._learners, fresh=self._settings.draws == "fresh")
        losses = []
        for sample in samples:
            scores, _, there = self._scores(sample, maps)
            cells = self._cells(sample.target_points, there, (scores.shape[2], scores.shape[1]))
            losses.append(gaussian_cross_entropy(scores, cells, self._settings.loss).mean())
        return torch.stack(losses)

    def validate(self, learners: Sequence[Learner] | None) -> dict[str, float]:
        """Measure the validation pairs' PCK at each of `ALPHAS`: nearest cell, SD4Match's protocol, mean over images.

        Args:
            learners: their prompts are used; None for the empty prompt.

        Returns:
            alpha, as text -> PCK, 0 to 1.
        """
        import torch

        protocol, dataset = PROTOCOLS["sd4match"], str(self._pairs.about["name"])
        # No entry is touched, so the oldest maps leave first. This order decides which images share a batch, and so the
        # last digits of their maps. It is kept because earlier results were made with it.
        kept: MemoryCache[tuple[View, PromptKey], list[torch.Tensor]] = MemoryCache(
            _MAPS, lambda maps: sum(one.nbytes for one in maps)
        )
        sums = torch.zeros(len(ALPHAS) + 1, dtype=torch.float64)
        with torch.no_grad():
            for sample in self._processes.share(self._pairs.val):
                maps = self._maps([sample], learners, kept)
                scores, _, geometry = self._scores(sample, maps, learners is None)
                # By the rules of matching: ties to the first cell, no cell of letterbox padding.
                grid = (scores.shape[2], scores.shape[1])
                similarity = np.where(content_cells(geometry, grid), scores.cpu().numpy().astype(np.float64), -np.inf)
                found = geometry.to_pixels(nearest_cell(similarity), grid)
                nothing = np.full(len(found), np.nan)
                matches = Matches(sample.source_points, found, np.zeros(len(found)), nothing, nothing)
                hits = measure(Prediction.of(0, sample, matches), protocol, dataset).hits(ALPHAS, protocol.strict)
                sums += torch.tensor([*hits.mean(0), 1.0], dtype=torch.float64)
        sums = self._processes.add(sums.to(self._device)).cpu()
        return {f"{alpha:g}": float(sums[k] / sums[-1]) for k, alpha in enumerate(ALPHAS)}

    def _maps(
        self,
        samples: Sequence[Sample],
        learners: Sequence[Learner] | None,
        kept: MemoryCache[tuple[View, PromptKey], list[torch.Tensor]] | None = None,
        fresh: bool = False,
    ) -> dict[tuple[View, PromptKey], list[torch.Tensor]]:
        """Compute the maps of all images of these pairs under their prompts; each image and prompt once.

        Args:
            samples: the pairs.
            learners: the prompts; None for the empty one.
            kept: maps that are there already, and to which new ones are added.
            fresh: draw posterior and noise anew for this step, in place of those that belong to each image.

        Returns:
            (view, prompt key) -> maps ``(C, h, w)`` of all branches and taps, in order.
        """
        kind = self._settings.kind if learners is not None else "single"
        wanted: dict[tuple[View, PromptKey], None] = {}
        for sample in samples:
            for view, size in zip(views_of(sample), (sample.source_size, sample.target_size), strict=True):
                self._sizes[view] = size
                wanted[view, key_of(sample, kind)] = None
        found = {one: kept[one] for one in wanted if kept is not None and one in kept}
        missing = [one for one in wanted if one not in found]
        if missing:
            made = self._run(missing, learners, fresh)
            found |= made
            if kept is not None:
                for one, maps in made.items():
                    kept.put(one, maps)
        return found

    def _run(
        self, wanted: Sequence[tuple[View, PromptKey]], learners: Sequence[Learner] | None, fresh: bool
    ) -> dict[tuple[View, PromptKey], list[torch.Tensor]]:
        import torch

        known = [self._store.get(view, self._sizes[view]) for view, _ in wanted]
        if fresh:
            known = [self._redrawn(one, view) for one, (view, _) in zip(known, wanted, strict=True)]
        keys = list(dict.fromkeys(key for _, key in wanted))
        place = {key: k for k, key in enumerate(keys)}
        rows = torch.tensor([place[key] for _, key in wanted], device=self._device)

        def tokens(view: View) -> torch.Tensor:
            return torch.from_numpy(self._store.get(view, self._sizes[view]).tokens).to(self._device)

        found: list[list[torch.Tensor]] = [[] for _ in wanted]
        for k in range(len(self._recipe.branches)):
            if learners is None:
                prompts = self._empty.expand(len(wanted), -1, -1)
            else:
                prompts = learners[k].prompts(keys, tokens).index_select(0, rows)
            for maps, more in zip(found, self._passes.run(k, known, prompts), strict=True):
                maps.extend(more)
        return dict(zip(wanted, found, strict=True))

    def _redrawn(self, known: ImagePosterior, view: View) -> ImagePosterior:
        """Give an image the noises of this step: the same in a resumed run, and in any process."""
        if self._recipe.noise == "none":
            return known
        name = f"{self.progress.done}:{view.mirrored}:{view.path.name}"
        first, second = draw(self._settings.seed, name, 1, known.mean.shape)
        return dataclasses.replace(known, posterior_noise=first, noise=second)

    def _scores(
        self, sample: Sample, maps: dict[tuple[View, PromptKey], list[torch.Tensor]], empty: bool = False
    ) -> tuple[torch.Tensor, Geometry, Geometry]:
        """Compute the scores ``(N, h, w)`` of a pair's source keypoints; give them and both geometries."""
        key = key_of(sample, "single" if empty else self._settings.kind)
        first, second = views_of(sample)
        here, there = (self._geometry(view) for view in (first, second))
        source, target = maps[first, key], maps[second, key]
        grid = max(one.shape[2] for one in source), max(one.shape[1] for one in source)
        cells = self._cells(sample.source_points, here, grid)
        recipe = self._recipe
        return fused_cosines(source, target, cells, self._shares, recipe.upsample, recipe.combine), here, there

    def _geometry(self, view: View) -> Geometry:
        geometry = self._store.get(view, self._sizes[view]).geometry
        if self._settings.reading == "corners":
            if self._recipe.fit != "stretch":
                raise InputError("reading by corners needs a stretched image; the recipe's fit is 'letterbox'")
            return CornerGeometry(geometry.image, geometry.input, geometry.content)
        return geometry

    def _cells(self, points: NDArray[np.float64], geometry: Geometry, grid: tuple[int, int]) -> torch.Tensor:
        """Turn points in pixels into fractional cells ``(N, 2)``; points beyond the image are moved to its border."""
        import torch

        inside = np.clip(points, -0.5, np.array(geometry.image, np.float64) - 0.5)
        cells = torch.from_numpy(geometry.to_cells(inside, grid))
        return cells.to(self._device, self._empty.dtype)
