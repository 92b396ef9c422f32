"""A pipeline whose engines do nothing but take a set time: what is left of the wall time is difftap's own."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from difftap.backbones.checkpoint import pocket_folder
from difftap.backbones.sd_unet import SDUNet
from difftap.coords import Size
from difftap.engine import BranchEngine, Engine, Featurizer, Graph, Profile
from difftap.engine.backend import Array
from difftap.features.sources import Item, Source
from difftap.images import Image
from difftap.recipe import Branch, Recipe

__all__ = ["FakePipeline", "made_source"]

_INPUT = (32, 32)


class FakeEngine(Engine):
    """Takes ``seconds`` for each image and gives maps that follow from what it is fed, though not as a network's do.

    Attributes:
        busy: seconds spent in all runs.
        first: when the first run began, by ``time.perf_counter``; None before it.
        last: when the last one ended.
    """

    def __init__(self, graph: Graph, profile: Profile, seconds: float, shape: tuple[int, int, int]) -> None:
        super().__init__(graph, profile, "cpu")
        self._seconds = seconds
        self._shape = shape
        self.busy = 0.0
        self.first: float | None = None
        self.last: float | None = None

    def _run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        began = time.perf_counter()
        made = self._make(feeds)
        left = began + self._seconds * len(next(iter(feeds.values()))) - time.perf_counter()
        if left > 0:
            time.sleep(left)
        self.last = time.perf_counter()
        self.first = began if self.first is None else self.first
        self.busy += self.last - began
        return made

    def _make(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        if self.graph.component == "vae":
            pixels = feeds["image"]  # (B, 3, H, W)
            mean = self.outputs[0].shape  # (B, C, h, w)
            cells = pixels[:, np.arange(int(mean[1])) % 3, ::8, ::8]
            return {"mean": np.ascontiguousarray(cells), "std": np.full_like(cells, 0.1)}
        noisy = feeds["mean"] + (feeds["noise"] * feeds["std"][:, None]).mean(axis=1)  # (B, C, h, w)
        wanted = int(np.prod(self._shape))
        maps = [np.resize(one, wanted).reshape(self._shape) for one in noisy]
        return {name: np.stack(maps) for name in (spec.name for spec in self.outputs)}


class FakePipeline:
    """What extraction needs of a `difftap.Pipeline`.

    Args:
        seconds: that the engines take for an image, half in the VAE, half in the UNet.
        shape: ``(C, h, w)`` of the tap's map.
        device: what it says it runs on; on a CPU the two networks take turns.
        batch: images a run.
        size: of the network's input.
    """

    def __init__(
        self,
        seconds: float = 0.0,
        shape: tuple[int, int, int] = (16, 8, 8),
        device: str = "cpu",
        batch: int = 1,
        size: Size = _INPUT,
        recipe: Recipe | None = None,
    ) -> None:
        self.model = SDUNet.read(pocket_folder(), "pocket")
        self.recipe = recipe or Recipe((Branch(("up1",), 261),), size=size, ensemble=2)
        self.batch = batch
        self.conditions: dict[str, Any] = {
            "difftap": "fake",
            "recipe": self.recipe.to_dict(),
            "model": {"name": "fake", "key": "0" * 16},
            "backend": {"name": "fake", "version": "0", "device": device, "precision": "fp32"},
        }
        vae = FakeEngine(Graph(self.model, "vae"), Profile(self.recipe.size, batch=batch), seconds / 2, shape)
        branches, self.engines = [], [vae]
        for branch in self.recipe.branches:
            prompt: NDArray[np.float32] = np.zeros((1, self.model.prompt_width), np.float32)
            profile = Profile(self.recipe.size, self.recipe.ensemble, 1, batch)
            share = seconds / 2 / len(self.recipe.branches)
            engine = FakeEngine(Graph(self.model, "unet", branch.taps), profile, share, shape)
            self.engines.append(engine)
            branches.append(BranchEngine(branch, engine, prompt))
        self.stages = Featurizer(self.model, self.recipe, vae, branches, batch)

    def close(self) -> None:
        """There is nothing to release."""

    @property
    def busy(self) -> float:
        """Seconds that the engines took."""
        return sum(engine.busy for engine in self.engines)

    @property
    def span(self) -> tuple[float, float]:
        """When the first run of an engine began, and when the last one ended, by ``time.perf_counter``."""
        firsts = [engine.first for engine in self.engines if engine.first is not None]
        lasts = [engine.last for engine in self.engines if engine.last is not None]
        return min(firsts), max(lasts)


@dataclass(frozen=True)
class MadeAt:
    """A small picture made of its number."""

    number: int

    def load(self) -> Image:
        """Make it."""
        pixels = np.zeros((*_INPUT, 3), np.uint8)
        pixels.reshape(-1)[:8] = np.frombuffer(self.number.to_bytes(8, "little"), np.uint8)
        return Image(pixels, f"<{self.number}>")


def made_source(count: int) -> Source:
    """So many made pictures."""
    return Source("made pictures", [Item(f"{number:07d}", MadeAt(number)) for number in range(count)])
