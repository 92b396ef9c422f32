"""Our own pipeline with a clock in it: how long each stage takes, and what is left around the two engine calls."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from difftap.engine import featurizer
from difftap.engine.noise import example_feeds
from difftap.featuremap import FeatureMap
from difftap.images import load_image
from difftap.pipeline.pipeline import Pipeline

__all__ = ["ENGINE_STAGES", "Ours"]

ENGINE_STAGES = ("vae", "unet")
"""What the runtime does; everything else in a call is our own."""


class Ours:
    """A pipeline, ready and clocked.

    The runtimes' own calls are timed where they are made, inside `difftap.engine.Engine.compute`: its checks of shapes
    are outside, and so are the look for values that are not finite, decoding, resizing, drawing noise, copies, joining.
    """

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline
        self._clock: dict[str, float] = {}
        self._within = False
        self._undo: list[Callable[[], None]] = []
        for engine in pipeline.engines:
            for name in ("_run", "_run_on_device"):
                self._time(engine, name, engine.graph.component)
        self._time(featurizer, "to_input", "resize")
        self._time(featurizer, "draw_noise", "noise")
        self.together = max(engine.profile.ensemble for engine in pipeline.engines)

    def _time(self, owner: Any, name: str, stage: str) -> None:
        plain = getattr(owner, name)
        own = name in vars(owner)

        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._within:  # one engine call may be made of another
                return plain(*args, **kwargs)
            self._within = True
            start = time.perf_counter()
            try:
                return plain(*args, **kwargs)
            finally:
                self._within = False
                self._clock[stage] = self._clock.get(stage, 0.0) + time.perf_counter() - start

        setattr(owner, name, timed)
        self._undo.append(lambda: setattr(owner, name, plain) if own else delattr(owner, name))

    def warm_up(self) -> None:
        """Run every engine once, on a full batch."""
        for engine in self._pipeline.engines:
            shapes = dataclasses.replace(engine.profile, batch=self._pipeline.batch)
            engine.run(example_feeds(engine.graph, shapes))

    def call(self, paths: Sequence[Path]) -> tuple[list[FeatureMap], dict[str, np.ndarray[Any, Any]], dict[str, float]]:
        """Files to joined maps, as every command does it.

        Returns:
            The joined maps; the first image's map of every branch and tap by ``branch.tap``; and seconds by stage:
            ``total``, ``decode``, ``resize``, ``noise``, ``vae``, ``unet``, ``join``, and ``rest`` (checks and copies).
        """
        self._clock = {}
        start = time.perf_counter()
        images = [load_image(path) for path in paths]
        decoded = time.perf_counter()
        features = list(self._pipeline.features(images))
        extracted = time.perf_counter()
        joined = [self._pipeline.join(one) for one in features]
        end = time.perf_counter()
        stages = {"decode": decoded - start, **self._clock, "join": end - extracted}
        rest = end - start - sum(stages.values())
        maps = {f"{i}.{tap}": one.data for i, taps in enumerate(features[0].branches) for tap, one in taps.items()}
        return joined, maps, {"total": end - start, **stages, "rest": rest}

    def close(self) -> None:
        """Take the clock out and close the engines."""
        for undo in reversed(self._undo):
            undo()
        self._pipeline.close()
