"""What all tests are made of: commands that are run, small pictures, a tiny checkpoint, a pipeline without networks."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import click
import numpy as np
from click.testing import CliRunner, Result
from PIL import Image as PIL

from difftap.backbones.checkpoint import pocket_folder
from difftap.backbones.sd_unet import SDUNet
from difftap.engine import BranchEngine, Engine, Featurizer, Graph, Profile
from difftap.export.parity import TensorParity
from difftap.features.sources import Item, Source
from difftap.images import Image
from difftap.pipeline.pipeline import Provider
from difftap.prompts import Prompt, PromptBook, Subject
from difftap.prompts.learned import remembered
from difftap.recipe import Branch, Matcher, Recipe

ROOT = Path(__file__).parents[1]
DIFFTAP = (sys.executable, "-m", "difftap.cli")


def invoke(arguments: Sequence[object], command: click.Command | None = None, **settings) -> Result:
    """Run a command in this process, as its texts say: exit code, stdout, stderr, and the exception if there was one.

    Args:
        arguments: paths and numbers may stand as they are.
        command: one of ours; the whole of difftap by default.
        settings: ``env`` and ``catch_exceptions``, as click takes them.
    """
    from difftap.cli import cli

    return CliRunner().invoke(command or cli, [str(one) for one in arguments], **settings)


def child_environment(**more: str) -> dict[str, str]:
    """Give an environment in which a child process imports the difftap that is under test."""
    return {**os.environ, "PYTHONPATH": str(ROOT), **more}


def run_child(arguments: Sequence[object], **settings) -> subprocess.CompletedProcess:
    """Run difftap in a process of its own and wait for it; ``settings`` as `subprocess.run` takes them."""
    given = {"capture_output": True, "text": True, "timeout": 300, "env": child_environment(), **settings}
    return subprocess.run([*DIFFTAP, *map(str, arguments)], check=False, **given)


def picture(seed: int, size: tuple[int, int] = (40, 30)) -> np.ndarray:
    """Make a smooth random picture, uint8 ``(H, W, 3)``."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), np.uint8)
    return np.asarray(PIL.fromarray(coarse).resize(size, PIL.Resampling.BICUBIC))


def write_picture(path: Path, size: tuple[int, int] = (40, 30), seed: int = 0, **saving) -> Path:
    """Write a `picture`, and the folders that it lies in; ``saving`` as Pillow takes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.fromarray(picture(seed, size)).save(path, **saving)
    return path


MINI_UNET = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (8, 16, 16),
    "layers_per_block": 1,
    "cross_attention_dim": 6,
    "attention_head_dim": 4,
    "norm_num_groups": 4,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
}
"""A UNet with three blocks, quick to trace."""
MINI_VAE = {
    "block_out_channels": (4, 8),
    "latent_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "scaling_factor": 0.5,
}
MINI_SCHEDULE = {
    "_class_name": "DDIMScheduler",
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "num_train_timesteps": 1000,
}
MINI_TAPS = ("up1", "down1.attn0")


def write_mini(
    folder: Path,
    seed: int = 0,
    *,
    half: bool = False,
    unet: Mapping[str, Any] = MINI_UNET,
    shard: str = "10GB",
) -> Path:
    """Write a checkpoint of random weights in diffusers format; its prompts come from seeded noise."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        modules = {"unet": UNet2DConditionModel(**unet), "vae": AutoencoderKL(**MINI_VAE)}
    for part, module in modules.items():
        (module.half() if half else module).save_pretrained(folder / part, max_shard_size=shard)
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(MINI_SCHEDULE))
    (folder / "model_index.json").write_text(json.dumps({"_difftap_random_weights": seed}))
    return folder


def compare(engine, reference, feeds) -> dict[str, TensorParity]:
    """Give the parity of every output of two open engines on the same feeds."""
    wanted, got = reference.run(feeds), engine.run(feeds)
    return {name: TensorParity.of(got[name], wanted[name]) for name in wanted}


def fake_recipe(prompts: Sequence[str] = ("",), matcher: str = "dense", **more) -> Recipe:
    """Make a recipe for a `FakePipeline`, of one branch a prompt."""
    branches = tuple(Branch((f"up{k + 1}",), 261, prompt) for k, prompt in enumerate(prompts))
    return Recipe(branches, **{"model": "fake", "size": (32, 32), "ensemble": 2, "matcher": Matcher(matcher), **more})


def random_array(shape: tuple[int, ...], *of: bytes) -> np.ndarray:
    """Draw float32 numbers that follow from some bytes."""
    seed = np.frombuffer(hashlib.sha256(b"".join(of)).digest(), np.uint32)
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


class FakeEngine(Engine):
    """Gives random maps that follow from what it is fed, each image's from its own; takes ``seconds`` for an image."""

    def __init__(self, graph: Graph, profile: Profile, shape: tuple[int, int, int] = (0, 0, 0), seconds: float = 0.0):
        super().__init__(graph, profile, "cpu")
        self._shape = shape
        self._seconds = seconds

    def _run(self, feeds):
        if self._seconds:
            time.sleep(self._seconds * len(next(iter(feeds.values()))))
        if self.graph.component == "vae":
            pixels = feeds["image"]  # (B, 3, H, W)
            mean = pixels[:, np.arange(int(self.outputs[0].shape[1])) % 3, ::8, ::8]  # (B, C, h, w)
            return {"mean": np.ascontiguousarray(mean), "std": np.full_like(mean, 0.1)}
        parts = zip(feeds["mean"], feeds["noise"], feeds["prompt"], strict=True)  # of each image
        maps = np.stack([random_array(self._shape, *map(bytes, part)) for part in parts])  # (B, C, h, w)
        return {spec.name: maps for spec in self.outputs}


class FakeBook(PromptBook):
    """Chooses prompts as the real one does, and makes numbers of them without an encoder; knows every image."""

    def embedding(self, prompt):
        of = repr((prompt, self.conditions))
        return random_array((1, self._model.prompt_width), of.encode())  # (T, D)

    def any(self):
        learned = [Prompt(branch=k) for k in range(len(self._recipe.branches))]
        return [self.embedding(one) for one in (learned if self._learned else self.choose(Subject()))]


@functools.cache
def _pocket() -> SDUNet:
    return SDUNet.read(pocket_folder(), "pocket")


class FakePipeline(Provider):
    """A pipeline whose engines are `FakeEngine`: everything but the networks is difftap's own.

    Args:
        recipe: what it is asked for.
        shapes: ``(C, h, w)`` of each branch's maps; one shape may stand for all.
        batch: images a run.
        seconds: that the engines take for an image.
        faults: by an image's file name, the error when its features are asked for.

    Attributes:
        opened: all that were opened, until a test clears the list.
        seen: how often each image's features were asked for, by path.
        asked: every image, tap and prompt that were computed, in order; not what extraction's stages compute.
        batches: how many images were given at once.
        engines: the encoder's, and each branch's.
    """

    opened: ClassVar[list[FakePipeline]] = []

    def __init__(
        self,
        recipe: Recipe | None = None,
        shapes: Sequence[tuple[int, int, int]] = ((16, 8, 8),),
        *,
        batch: int = 1,
        seconds: float = 0.0,
        faults: Mapping[str, Exception] | None = None,
    ) -> None:
        recipe = recipe or fake_recipe()
        learned = None if recipe.learned is None else remembered(recipe.learned.path)
        book = FakeBook(_pocket(), recipe, None, learned)
        conditions = {
            "difftap": "0",
            "recipe": recipe.to_dict(),
            "model": {"name": recipe.model.name, "key": "0" * 16},
            "backend": {"name": "fake", "version": "0", "device": "cpu", "precision": "fp32"},
            **book.conditions,
        }
        super().__init__(recipe, _pocket(), conditions, batch, book)
        self.faults = faults or {}
        self.seen: Counter[str] = Counter()
        self.asked: list[tuple[str, str, str]] = []
        self.batches: list[int] = []
        self.closed = False
        profile = Profile(recipe.size, recipe.ensemble, 1, batch)
        share = seconds / (1 + len(recipe.branches))
        encoder = FakeEngine(Graph(self.model, "vae"), replace(profile, ensemble=1), seconds=share)
        shapes = tuple(shapes) * len(recipe.branches) if len(shapes) == 1 else shapes
        self._branches = [
            BranchEngine(branch, FakeEngine(Graph(self.model, "unet", branch.taps), profile, shape, share), prompt)
            for branch, shape, prompt in zip(recipe.branches, shapes, book.any(), strict=True)
        ]
        self.engines = [encoder, *(branch.engine for branch in self._branches)]
        self._featurizer = Featurizer(self.model, recipe, encoder, self._branches, batch)
        FakePipeline.opened.append(self)

    def features(self, images, prompts=None):
        assert not self.closed
        prompts = self.prompts.choose(Subject()) if prompts is None else prompts
        wanted = [
            (replace(branch, prompt=self.prompts.embedding(prompt)), str(prompt.text or prompt))
            for branch, prompt in zip(self._branches, prompts, strict=True)
            if prompt is not None
        ]
        images = list(images)
        self.batches.append(len(images))
        for image in images:
            self.seen[image.path] += 1
            fault = self.faults.get(Path(image.path).name)
            if fault is not None:
                raise fault
            self.asked += [(image.digest, one.branch.taps[0], text) for one, text in wanted]
            yield from self._featurizer([image], [one for one, _ in wanted])

    @property
    def stages(self) -> Featurizer:
        self.prompts.check_one_map_an_image()
        return self._featurizer

    def close(self) -> None:
        self.closed = True


@dataclass(frozen=True)
class NumberedPicture:
    """A picture of 32 x 32 pixels that is made of its number; picklable."""

    number: int

    def load(self) -> Image:
        pixels = np.zeros((32, 32, 3), np.uint8)
        pixels.reshape(-1)[:8] = np.frombuffer(self.number.to_bytes(8, "little"), np.uint8)
        return Image(pixels, f"<{self.number}>")


def numbered_pictures(count: int) -> Source:
    """Give a source of so many pictures."""
    return Source("made pictures", [Item(f"{number:07d}", NumberedPicture(number)) for number in range(count)])
