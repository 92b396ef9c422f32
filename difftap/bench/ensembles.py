"""What an ensemble's passes buy: fidelity to the mean of many members, for independent and for antithetic noise.

Per image and timestep, members are run one by one. Groups of ``n`` of them are averaged and held against the limit: the
mean of many members drawn with another seed, in antithetic pairs, whose expectation is the same and whose variance is
smaller. Three kinds of noise are compared:

``independent``
    every member draws its own posterior and diffusion noise.
``antithetic``
    pairs with both noises turned: what the recipe's ``noise = "antithetic"`` does.
``antithetic, posterior free``
    pairs with the diffusion noise turned and posterior noise drawn for each: to see which of the two matters.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from difftap.backbones.checkpoint import Checkpoint
from difftap.engine import Engine, Profile, model_key
from difftap.engine.noise import draw, network_feeds, scales
from difftap.errors import InputError
from difftap.export.parity import TensorParity
from difftap.images import Image, to_input
from difftap.pipeline.environment import Environment, RecipeEngines, Runtime
from difftap.recipe import Recipe

__all__ = ["KINDS", "Curve", "CurveCase", "Point", "run_curve", "worth"]

KINDS = ("independent", "antithetic", "antithetic, posterior free")
Noise = NDArray[np.float32]


@dataclass(frozen=True)
class CurveCase:
    """What is measured.

    Attributes:
        recipe: model, size, taps and prompt; of its first branch.
        timesteps: at which the curve is taken.
        passes: ensemble sizes, powers of two; the largest is the number of members run for each kind.
        limit: members of the mean that all are held against.
    """

    recipe: Recipe
    timesteps: tuple[int, ...] = (1, 50, 100, 261)
    passes: tuple[int, ...] = (1, 2, 4, 8, 16)
    limit: int = 64

    def __post_init__(self) -> None:
        most = max(self.passes, default=0)
        if most < 2 or any(n < 1 or most % n for n in self.passes):
            raise InputError(f"passes are {self.passes}; allowed: numbers that divide the largest, such as 1,2,4,8,16")
        if self.limit < 2 or self.limit % 2:
            raise InputError(f"the limit has {self.limit} members; allowed: an even number, such as 64")
        if not self.timesteps:
            raise InputError("no timesteps; give at least one")
        if self.recipe.learned is not None:
            raise InputError("the curve is of noise, under the recipe's texts; leave the learned prompts out")


@dataclass(frozen=True)
class Point:
    """One point of a curve: means over images of the mean over groups.

    Attributes:
        timestep: of the noise.
        kind: one of `KINDS`.
        passes: members averaged.
        relative: relative error to the limit, L2.
        cosine: mean over cells of the cosine to the limit.
        spread: standard deviation of `relative` over images.
        equals: how many independent members come as close, from the independent curve; None for that curve itself.
    """

    timestep: int
    kind: str
    passes: int
    relative: float
    cosine: float
    spread: float
    equals: float | None = None


@dataclass(frozen=True)
class Curve:
    """The result."""

    case: CurveCase
    points: tuple[Point, ...]
    images: tuple[str, ...]
    conditions: Mapping[str, Any]

    def at(self, timestep: int, kind: str) -> list[Point]:
        """One curve, by number of passes."""
        return [p for p in self.points if p.timestep == timestep and p.kind == kind]


def run_curve(
    case: CurveCase,
    images: Sequence[Image],
    runtime: Runtime | None = None,
    *,
    say: Callable[[str], None] = lambda text: None,
) -> Curve:
    """Measure the curves.

    Raises:
        InputError: no image, or the model or recipe does not fit.
        BackendError: an engine cannot be opened.
    """
    if not images:
        raise InputError("no images for the curve; give some by --image")
    runtime = runtime or Runtime()
    recipe, branch = case.recipe, case.recipe.branches[0]
    at = Environment.open(recipe, runtime)
    engines = RecipeEngines(at, recipe, 1, runtime.calibrate)
    model, cache, backend, device, threads = at.model, at.cache, at.backend, at.device, at.threads
    if model.noise_rule is None or model.encoder is None:
        raise InputError(f"model '{model.name}' is fed images, without noise, so there is no ensemble to measure")
    for timestep in case.timesteps:
        scales(model.noise_rule, timestep, "independent")
    prompt = engines.prompts()[0]

    errors: dict[tuple[int, str, int], list[TensorParity]] = {}
    unet_profile = Profile(recipe.size, 1, len(prompt), precision=runtime.precision)
    with (
        engines.open_engine(model.encoder, (), Profile(recipe.size, precision=runtime.precision)) as vae,
        engines.open_engine(model.tapped, branch.taps, unet_profile) as unet,
    ):
        for number, image in enumerate(images):
            pixels, _ = to_input(image, recipe.size, recipe.fit)
            posterior = vae.run({"image": pixels[None]})
            for timestep in case.timesteps:
                say(f"image {number + 1} of {len(images)}, timestep {timestep}")
                members = _Members(unet, model, posterior, prompt, timestep)
                for key, one in _fidelity(case, members, image.digest).items():
                    errors.setdefault((timestep, *key), []).append(one)
    return Curve(
        case,
        tuple(_points(errors)),
        tuple(image.path for image in images),
        {
            "model": {"name": model.name, "key": model_key(cache, model)},
            "backend": {"name": backend.name, "version": backend.version(), "device": device, "threads": threads},
            "precision": runtime.precision,
            "taps": list(branch.taps),
        },
    )


class _Members:
    """One image at one timestep: noise in, a member's map out."""

    def __init__(
        self, unet: Engine, model: Checkpoint, posterior: Mapping[str, Noise], prompt: Noise, timestep: int
    ) -> None:
        self._unet = unet
        self._pass = model, timestep
        self._posterior, self._prompt = posterior, prompt
        self.shape: tuple[int, int, int] = posterior["mean"].shape[1:]  # (C, h, w)

    def run(self, posterior: Noise, diffusion: Noise) -> NDArray[np.float64]:
        """A member's taps, as one vector of cells ``(C, N)``: grids one after another, channels padded with zeros."""
        model, timestep = self._pass
        noises = np.stack([posterior, diffusion])[:, None, None]  # (2, B, E, C, h, w)
        feeds = network_feeds(model, timestep, "independent", self._posterior, noises, self._prompt)
        maps = [value[0].reshape(value.shape[1], -1) for value in self._unet.run(feeds).values()]
        deepest = max(len(one) for one in maps)
        padded = [np.pad(one, ((0, deepest - len(one)), (0, 0))) for one in maps]
        return np.concatenate(padded, axis=1).astype(np.float64)


def _fidelity(case: CurveCase, members: _Members, digest: str) -> dict[tuple[str, int], TensorParity]:
    """By kind and passes: the mean over groups of their fidelity to the limit."""
    seed, most = case.recipe.seed, max(case.passes)
    far = draw(seed + 1, digest, case.limit, members.shape, True)
    limit = np.zeros(())
    for z, e in zip(*far, strict=True):
        limit = limit + members.run(z, e) / case.limit
    posterior, diffusion = draw(seed, digest, 2 * most, members.shape)
    plain = [members.run(posterior[k], diffusion[k]) for k in range(most)]
    heads = range(most // 2)
    turned = [members.run(-posterior[k], -diffusion[k]) for k in heads]
    free = [members.run(posterior[most + k], -diffusion[k]) for k in heads]
    pools = {
        KINDS[0]: plain,
        KINDS[1]: [one for k in heads for one in (plain[k], turned[k])],
        KINDS[2]: [one for k in heads for one in (plain[k], free[k])],
    }
    found = {}
    for kind, pool in pools.items():
        for passes in case.passes:
            if kind != KINDS[0] and passes % 2:
                continue
            groups = [np.mean(pool[i : i + passes], axis=0) for i in range(0, most, passes)]
            parities = [TensorParity.of(group[None, :, :, None], limit[None, :, :, None]) for group in groups]
            found[kind, passes] = _mean(parities)
    return found


def _mean(parities: Sequence[TensorParity]) -> TensorParity:
    names = asdict(parities[0])
    return TensorParity(**{name: statistics.fmean(getattr(one, name) for one in parities) for name in names})


def _points(errors: Mapping[tuple[int, str, int], Sequence[TensorParity]]) -> list[Point]:
    points = []
    for (timestep, kind, passes), seen in errors.items():
        relative = [one.relative for one in seen]
        points.append(
            Point(
                timestep,
                kind,
                passes,
                statistics.fmean(relative),
                statistics.fmean(one.cosine_mean for one in seen),
                statistics.pstdev(relative),
            )
        )
    made = []
    for point in points:
        plain = [(p.passes, p.relative) for p in points if p.timestep == point.timestep and p.kind == KINDS[0]]
        equals = None if point.kind == KINDS[0] else worth(point.relative, plain)
        made.append(Point(**{**asdict(point), "equals": equals}))
    return sorted(made, key=lambda p: (p.timestep, KINDS.index(p.kind), p.passes))


def worth(error: float, curve: Sequence[tuple[int, float]]) -> float:
    """The number of independent passes whose error is ``error``: straight lines between the points of a log-log plot.

    Beyond the last point the last line is carried on; an error that is as large as the first point's is worth 1 pass or
    less. Infinite where the curve is flat there.
    """
    steps = [(math.log(n), math.log(max(e, 1e-300))) for n, e in sorted(curve)]
    wanted = math.log(max(error, 1e-300))
    for (n1, e1), (n2, e2) in itertools.pairwise(steps):
        last = (n2, e2) == steps[-1]
        if e2 < e1 and (wanted >= e2 or last):
            return math.exp(n1 + (wanted - e1) / (e2 - e1) * (n2 - n1))
    return math.inf
