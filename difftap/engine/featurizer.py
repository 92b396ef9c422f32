"""From images to feature maps: one map per branch and tap.

The encoder runs once per image. One graph then forms the ensemble's noisy latents, runs the tapped network and takes
the mean over the ensemble. A backbone without an encoder takes the image itself. On a CPU each image is a run of its
own: the ensemble already keeps the cores busy, and so an image's features are the same bit for bit whatever other
images come with it. Axis letters are those of `difftap.engine.backend`.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from difftap.artifacts.memory import MemoryCache
from difftap.backbones.checkpoint import Checkpoint
from difftap.coords import Geometry, Size
from difftap.engine.backend import Engine, Value
from difftap.engine.noise import draw_noise, network_feeds
from difftap.errors import InputError, NonFiniteError
from difftap.featuremap import FeatureMap
from difftap.images import Image, to_input
from difftap.recipe import Branch, Recipe

__all__ = [
    "BranchEngine",
    "EncodedBatch",
    "Features",
    "Featurizer",
    "InputBatch",
    "Latents",
    "encode",
    "finite_or_alone",
    "lay",
    "members_per_run",
]

_Item = TypeVar("_Item")
_Made = TypeVar("_Made")
_Maps = Mapping[str, NDArray[np.float32]]
"""A network's outputs by name, ``(B, C, h, w)`` each."""


ATTENTION_BUDGET = 1 << 30
"""Most bytes of the largest attention table in one run; about three arrays of that size exist at the same time."""


def finite_or_alone(
    run: Callable[[Sequence[_Item]], _Made], items: Sequence[_Item]
) -> Iterator[tuple[Sequence[_Item], _Made | NonFiniteError]]:
    """Run a batch; if an output is not finite, run its items one by one, so that a bad one does not spoil the others.

    Args:
        run: does all its work before it returns, and raises `NonFiniteError` if an output holds NaN or infinity.
        items: the batch.

    Yields:
        the items and what ``run`` returned for them: the whole batch at once if it is finite; else each item alone,
        with its result or its error.
    """
    if not items:
        return
    try:
        yield items, run(items)
        return
    except NonFiniteError as error:
        if len(items) == 1:
            yield items, error
            return
    for item in items:
        yield from finite_or_alone(run, [item])


def members_per_run(model: Checkpoint, size: Size, ensemble: int) -> int:
    """Choose how many ensemble members one run takes: the largest divisor of E whose attention fits the budget.

    The budget is fixed, not read from the machine: sums over members are split at the same places everywhere, so
    features do not differ between machines.
    """
    table = model.attention_bytes(size)
    most = max(1, ATTENTION_BUDGET // table) if table else ensemble
    return max(d for d in range(1, ensemble + 1) if ensemble % d == 0 and d <= most)


@dataclass(frozen=True)
class BranchEngine:
    """A branch with its tapped network's engine and its prompt, ``(T, D)`` float32.

    The ensemble must be a multiple of the members in the engine's profile.
    """

    branch: Branch
    engine: Engine
    prompt: NDArray[np.float32]


@dataclass(frozen=True)
class Features:
    """All of one image's feature maps.

    Attributes:
        digest: the image's identity.
        branches: for each branch that was run, the maps of its taps by name.
    """

    digest: str
    branches: tuple[Mapping[str, FeatureMap], ...]


@dataclass(frozen=True)
class InputBatch:
    """A batch of images laid on the network's input, ``(B, 3, H, W)`` in [-1, 1], with identities and geometries."""

    digests: tuple[str, ...]
    geometries: tuple[Geometry, ...]
    pixels: NDArray[np.float32]


@dataclass(frozen=True)
class EncodedBatch:
    """A batch of images ready for the tapped networks of all branches and prompts.

    Attributes:
        digests: the images' identities.
        geometries: how each image lies on the input.
        given: the encoder's posterior, ``mean`` and ``std``, each ``(B, C, h, w)``; or ``image``, ``(B, 3, H, W)``, if
            there is no encoder.
        noises: the posterior's noise and the diffusion noise, ``(2, B, E, C, h, w)``; None without a noise rule.
    """

    digests: tuple[str, ...]
    geometries: tuple[Geometry, ...]
    given: Mapping[str, Value]
    noises: NDArray[np.float32] | None


def lay(recipe: Recipe, images: Sequence[Image]) -> InputBatch:
    """Lay images on the network's input."""
    laid = [to_input(image, recipe.size, recipe.fit, recipe.resize) for image in images]
    pixels = np.stack([values for values, _ in laid])  # (B, 3, H, W)
    return InputBatch(tuple(image.digest for image in images), tuple(geometry for _, geometry in laid), pixels)


def encode(
    recipe: Recipe,
    encoder: Engine | None,
    laid: InputBatch,
    members: int,
    turn: contextlib.AbstractContextManager[object] | None = None,
) -> EncodedBatch:
    """Run the encoder on a batch of images, and draw their noise.

    Args:
        recipe: kind of noise, and seed.
        encoder: its engine; None if the tapped network takes the images.
        laid: the images.
        members: E.
        turn: a lock to hold while the engine runs.

    Raises:
        NonFiniteError: the posterior holds NaN or infinity.
    """
    if encoder is None:
        return EncodedBatch(laid.digests, laid.geometries, {"image": laid.pixels}, None)
    with turn or contextlib.nullcontext():
        posterior = encoder.compute({"image": laid.pixels})
    encoder.check_finite(posterior)
    noises = draw_noise(recipe, laid.digests, posterior["mean"].shape[1:], members)
    return EncodedBatch(laid.digests, laid.geometries, posterior, noises)


class Latents:
    """Keeps the posteriors and noises of images in bounded memory, so that the encoder runs once per image.

    Use it where one image is run under several prompts: where each pair of images has its own prompt, for instance.

    Args:
        recipe: input size, fit, noise, seed and ensemble.
        encoder: its engine.
        budget: bytes to keep; 0 to keep nothing.

    Attributes:
        encoded: number of images that the encoder has run on.
    """

    def __init__(self, recipe: Recipe, encoder: Engine, budget: int = 0) -> None:
        self._recipe = recipe
        self._encoder = encoder
        self._budget = budget
        self._kept: MemoryCache[str, EncodedBatch] = MemoryCache(budget, _bytes)  # of one image each
        self.encoded = 0

    def get(self, images: Sequence[Image], members: int) -> EncodedBatch:
        """Give a batch of images with the noise of the first ``members``; images not kept are encoded in one run."""
        missing = [image for image in images if image.digest not in self._kept]
        found = {image.digest: self._kept[image.digest] for image in images if image.digest in self._kept}
        for digest in found:
            self._kept.touch(digest)
        if missing:
            made = encode(self._recipe, self._encoder, lay(self._recipe, missing), self._recipe.ensemble)
            self.encoded += len(missing)
            for k in range(len(missing)):
                one = _one(made, k)
                found[one.digests[0]] = one
                if self._budget:
                    self._kept.put(one.digests[0], one)
        parts = [found[image.digest] for image in images]
        noises = [part.noises[:, :, :members] for part in parts if part.noises is not None]
        return EncodedBatch(
            tuple(part.digests[0] for part in parts),
            tuple(part.geometries[0] for part in parts),
            {name: np.concatenate([part.given[name] for part in parts]) for name in parts[0].given},
            np.concatenate(noises, axis=1),
        )


def _one(encoded: EncodedBatch, k: int) -> EncodedBatch:
    """Copy one image out of a batch: a view would keep the arrays of the whole batch in memory."""
    # `encode` gives arrays on the host, which can be indexed.
    given = {name: np.array(value[k : k + 1]) for name, value in encoded.given.items()}  # type: ignore[index]
    noises = None if encoded.noises is None else encoded.noises[:, k : k + 1].copy()
    return EncodedBatch((encoded.digests[k],), (encoded.geometries[k],), given, noises)


def _bytes(encoded: EncodedBatch) -> int:
    given = sum(int(np.prod(value.shape)) * value.dtype.itemsize for value in encoded.given.values())
    return given + (0 if encoded.noises is None else encoded.noises.nbytes)


class Featurizer:
    """Streams images through a model's engines.

    Args:
        model: the checkpoint.
        recipe: resolution, ensemble, noise, seed.
        encoder: the encoder's engine; None if the tapped network takes the images.
        branches: one per branch of the recipe.
        batch: images per engine run; the engines' profiles must allow it.
        latents: keeps posteriors where an image is run under several prompts; None to keep none.
    """

    def __init__(
        self,
        model: Checkpoint,
        recipe: Recipe,
        encoder: Engine | None,
        branches: Sequence[BranchEngine],
        batch: int = 1,
        latents: Latents | None = None,
    ) -> None:
        if batch < 1:
            raise InputError(f"batch is {batch}; allowed: 1 or more images")
        self._model = model
        self._recipe = recipe
        self._encoder = encoder
        self._latents = latents
        self._branches = tuple(branches)
        self._batch = batch
        self._turn = threading.Lock()  # extraction runs the stages in several threads, engines one at a time

    def __call__(self, images: Iterable[Image], branches: Sequence[BranchEngine] | None = None) -> Iterator[Features]:
        """Yield each image's features, in the images' order.

        Args:
            images: any number; they are taken one batch at a time.
            branches: the branches to run, perhaps with other prompts; None for all.
        """
        pending = iter(images)
        while chunk := list(islice(pending, self._batch)):
            yield from self._extract(chunk, self._branches if branches is None else branches)

    def _extract(self, images: Sequence[Image], branches: Sequence[BranchEngine]) -> Iterator[Features]:
        """Run one batch of images."""
        if self._latents is not None:
            with self._turn:
                encoded = self._latents.get(images, self._recipe.ensemble)
                outputs = [self._run_branch(branch, encoded) for branch in branches]
        else:
            laid = self.lay(images)
            with self._turn:
                encoded = self._on_device(laid)
                outputs = [self._run_branch(branch, encoded) for branch in branches]
        yield from _features(encoded, branches, outputs)

    def _on_device(self, laid: InputBatch) -> EncodedBatch:
        """Encode, but leave the posterior in the device's memory; the engine's next run may overwrite it."""
        if self._encoder is None:
            return self.encode(laid)
        given = self._encoder.run_on_device({"image": laid.pixels})
        noises = draw_noise(self._recipe, laid.digests, given["mean"].shape[1:], self._recipe.ensemble)
        return EncodedBatch(laid.digests, laid.geometries, given, noises)

    # The same work in three stages, so that threads can be at different stages of different batches at the same time.
    # Engines run one at a time, because each uses all cores. Some write a run's outputs over those of the last run, so
    # here the posterior is copied to the host before the next batch's encoder runs.

    def lay(self, images: Sequence[Image]) -> InputBatch:
        """Lay images on the network's input."""
        return lay(self._recipe, images)

    def encode(self, laid: InputBatch) -> EncodedBatch:
        """Run the encoder, and draw the noise.

        Raises:
            NonFiniteError: the posterior holds NaN or infinity.
        """
        return encode(self._recipe, self._encoder, laid, self._recipe.ensemble, self._turn)

    def tap(self, encoded: EncodedBatch) -> Iterator[Features]:
        """Run every branch's tapped network.

        Raises:
            NonFiniteError: a map holds NaN or infinity.
        """
        with self._turn:
            outputs = [self._run_branch(branch, encoded) for branch in self._branches]
        yield from _features(encoded, self._branches, outputs)

    def _run_branch(self, branch: BranchEngine, encoded: EncodedBatch) -> dict[str, NDArray[np.float32]]:
        """Run as many members at once as the engine takes, and average over all of them."""
        total: dict[str, NDArray[np.float32]] = {}
        together, members = branch.engine.profile.ensemble, self._recipe.ensemble
        for start in range(0, members, together):
            noises = None if encoded.noises is None else encoded.noises[:, :, start : start + together]
            feeds = network_feeds(
                self._model, branch.branch.timestep, self._recipe.noise, encoded.given, noises, branch.prompt
            )
            means = branch.engine.compute(feeds)
            total = {name: total[name] + mean for name, mean in means.items()} if total else means
        runs = members // together  # groups of equal size, so the mean of their means is the mean over all members
        return total if runs == 1 else {name: value / np.float32(runs) for name, value in total.items()}


def _features(encoded: EncodedBatch, branches: Sequence[BranchEngine], outputs: Sequence[_Maps]) -> Iterator[Features]:
    """Check that the branches' outputs are finite, and split them by image.

    It is called after the lock is released: checking large maps takes as long as a run of a fast engine.
    """
    for branch, maps in zip(branches, outputs, strict=True):
        branch.engine.check_finite(maps)
    for i, digest in enumerate(encoded.digests):
        yield Features(digest, tuple(_maps(output, i, encoded.geometries[i]) for output in outputs))


def _maps(output: _Maps, index: int, geometry: Geometry) -> dict[str, FeatureMap]:
    # Copies, because a view of one image's map would keep the whole batch in memory.
    return {
        name: FeatureMap(value[index] if len(value) == 1 else value[index].copy(), geometry)
        for name, value in output.items()
    }
