"""Training batches: photographs, their crops and their targets. A batch depends only on (seed, step)."""

from __future__ import annotations

import queue
import threading
from dataclasses import dataclass

import numpy as np
import torch

from training.data import Config, ImageCache, crop, is_held_out, jitter, random_box
from training.teacher import TargetCache, cut_target


@dataclass
class Batch:
    """The input of one step: pixels (B, 3, R, R) in [-1, 1]; target (B, K, R/8, R/8); texts, B captions."""

    step: int
    pixels: torch.Tensor
    target: torch.Tensor
    texts: list[str]


class Batches:
    """Make training batches; `Ahead` does so in a thread, because decoding and resizing release the GIL."""

    def __init__(self, images: ImageCache, targets: TargetCache, data: Config, train: Config) -> None:
        self.images, self.targets, self.data, self.train = images, targets, data, train
        held = data["held_out_one_in"]
        self.indices = np.array([i for i, item in enumerate(images.items) if not is_held_out(item, held)])
        classes: dict[str, list[int]] = {}
        for i in self.indices:
            classes.setdefault(images.items[i].words or str(i), []).append(i)
        self.mates = {i: np.array(members) for members in classes.values() for i in members}

    def make(self, step: int, final: bool) -> Batch:
        """Make the batch of `step`. With `final`, while the learning rate falls, images are larger."""
        rng = np.random.default_rng([self.train["seed"], step])
        weights = self.train["final_size_weights" if final else "size_weights"]
        size = int(rng.choice(self.train["sizes"], p=weights))
        # As many images as keep the number of pixels, and so the time of a step, the same at all sizes.
        count = max(8, self.train["pixels_per_step"] // (size * size) // 4 * 4)
        chosen = rng.choice(self.indices, count, replace=False)
        # Some images come with another of their class, so that the relation loss sees pairs like those matched later.
        for n in range(0, count - 1, 2):
            if rng.random() < self.train["mate_share"]:
                chosen[n + 1] = rng.choice(self.mates[chosen[n]])
        boxes = np.stack(
            [random_box(rng, self.data["min_area"], self.data["max_stretch"], self.data["whole_share"]) for _ in chosen]
        )
        mirrored = rng.random(count) < self.data["flip"]
        views = [
            crop(self.images.image(i)[:, ::-1] if m else self.images.image(i), box, size)
            for i, box, m in zip(chosen, boxes, mirrored, strict=True)
        ]
        pixels = jitter(rng, np.stack(views).astype(np.float32) / 127.5 - 1, self.data["jitter"])
        target = cut_target(self.targets.get(chosen, mirrored), torch.from_numpy(boxes), size // 8)
        texts = [
            "" if rng.random() < self.data["caption_dropout"] else "a photo of a " + self.images.items[i].words
            for i in chosen
        ]
        return Batch(step, torch.from_numpy(pixels).permute(0, 3, 1, 2), target, texts)


class Ahead:
    """Run `Batches.make` for consecutive steps in a thread. An error in the thread is raised by `next`."""

    def __init__(self, batches: Batches, first_step: int) -> None:
        self.final = False
        self._queue: queue.Queue[Batch | BaseException] = queue.Queue(maxsize=2)
        threading.Thread(target=self._work, args=(batches, first_step), daemon=True).start()

    def _work(self, batches: Batches, step: int) -> None:
        try:
            while True:
                self._queue.put(batches.make(step, self.final))
                step += 1
        except BaseException as error:  # raised in the training thread, by `next`
            self._queue.put(error)

    def next(self) -> Batch:
        """Give the next batch; wait for it."""
        item = self._queue.get()
        if isinstance(item, BaseException):
            raise item
        return item
