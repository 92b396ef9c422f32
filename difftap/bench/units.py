"""Units: an image under the prompts of a pair, and how their maps are made, each (image, branch, prompt) once.

A recipe may prompt one branch by category and another not. The second's maps then are the same for all categories that
an image stands for: they are remembered, in files, from the first such unit to the last.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from difftap.artifacts.files import output_errors
from difftap.bench.featurefiles import FeatureFiles
from difftap.coords import Geometry
from difftap.datasets.keypoints import Sample
from difftap.errors import DifftapError, ImageError
from difftap.featuremap import FeatureMap
from difftap.features.shelf import Made, Makers, View, load_view
from difftap.images import Image
from difftap.matching import Joining
from difftap.pipeline.pipeline import Provider
from difftap.prompts import Prompt, Subject, choose_prompts
from difftap.recipe import Recipe

__all__ = ["Maker", "Unit", "passes", "units"]

_Part = tuple[View, int, Prompt]


@dataclass(frozen=True)
class Unit:
    """What maps are made of.

    Attributes:
        view: the image.
        prompts: what conditions each of the recipe's branches.
    """

    view: View
    prompts: tuple[Prompt, ...]

    @property
    def parts(self) -> list[_Part]:
        """The passes it takes: view, branch and prompt of each."""
        return [(self.view, branch, prompt) for branch, prompt in enumerate(self.prompts)]


def units(sample: Sample, recipe: Recipe) -> tuple[Unit, Unit]:
    """Name a pair's source and target."""
    pair = View(sample.source), View(sample.target, sample.mirrored)
    first, second = (Unit(view, choose_prompts(recipe, Subject(sample.category, view, pair))) for view in pair)
    return first, second


def passes(wanted: Sequence[Unit]) -> set[_Part]:
    """Every (image, branch, prompt) that units need, once."""
    return {part for unit in wanted for part in unit.parts}


class Maker:
    """Makes units' maps.

    Args:
        pipeline: the open recipe.
        joining: how maps become one thing to match.
        order: all units that will be asked for, repeats included.
        scratch: an existing folder for maps that several units share.
        files: where maps are kept for later runs; None to keep none.
        makers: images that have to be made first.

    Attributes:
        extracted: passes through the UNet, one per (image, branch, prompt).
    """

    def __init__(
        self,
        pipeline: Provider,
        joining: Joining,
        order: Sequence[Unit],
        scratch: Path,
        files: FeatureFiles | None = None,
        makers: Makers | None = None,
    ) -> None:
        self._pipeline = pipeline
        self._joining = joining
        self._uses = Counter(part for unit in dict.fromkeys(order) for part in unit.parts)
        self._scratch = scratch
        self._files = files
        self._makers = makers
        self._shared: dict[_Part, list[tuple[Path, Geometry]]] = {}
        self._written = 0
        self.extracted = 0

    def __call__(self, wanted: Sequence[Unit]) -> Iterator[Made | DifftapError]:
        """Each unit's maps, joined or kept apart, or what keeps its image from having any; in order."""
        images: dict[View, Image | ImageError] = {}
        for unit in wanted:
            if unit.view not in images:
                try:
                    images[unit.view] = load_view(unit.view, self._makers)
                except ImageError as error:
                    images[unit.view] = error
        faults = {unit: fault for unit in wanted if (fault := self._know(unit, images)) is not None}
        whole = [unit for unit in wanted if unit not in faults]
        good = {view: image for view, image in images.items() if isinstance(image, Image)}
        known = {part: self._known(part, image) for view, image in good.items() for part in _of(whole, view)}
        fresh = self._extract(whole, good, {part for part, maps in known.items() if maps is None})
        for unit in wanted:
            image = faults.get(unit, images[unit.view])
            if isinstance(image, ImageError):
                yield image
                continue
            maps = [one for part in unit.parts for one in (known[part] or fresh[part])]
            yield Made(self._joining.kept(maps), image.size, image.digest)
            for part in unit.parts:
                self._share(part, known[part] or fresh[part])

    def _know(self, unit: Unit, images: dict[View, Image | ImageError]) -> ImageError | None:
        """Make the images known that a unit's prompts are made of; what keeps one of them from it, if anything does."""
        for view in dict.fromkeys(name for prompt in unit.prompts for name in prompt.pair or ()):
            book = self._pipeline.prompts
            if not isinstance(view, View) or book.knows(view):
                continue
            image = images.get(view)
            try:
                image = image or load_view(view, self._makers)
            except ImageError as error:
                return error
            if isinstance(image, ImageError):
                return image
            book.know(view, image)
        return None

    def _known(self, part: _Part, image: Image) -> tuple[FeatureMap, ...] | None:
        if part in self._shared:
            return tuple(
                FeatureMap(np.load(file, allow_pickle=False), geometry) for file, geometry in self._shared[part]
            )
        return self._files.get(image, part[1], part[2]) if self._files else None

    def _extract(
        self, wanted: Sequence[Unit], images: dict[View, Image], missing: set[_Part]
    ) -> dict[_Part, tuple[FeatureMap, ...]]:
        """Run what is missing; images that lack the same branches under the same prompts go together."""
        batches: dict[tuple[Prompt | None, ...], dict[View, None]] = {}
        taken: set[_Part] = set()
        for unit in wanted:
            lacking = tuple(p[2] if p in missing and p not in taken else None for p in unit.parts)
            if unit.view in images and any(lacking):
                batches.setdefault(lacking, {})[unit.view] = None
                taken.update(part for part, prompt in zip(unit.parts, lacking, strict=True) if prompt is not None)
        made: dict[_Part, tuple[FeatureMap, ...]] = {}
        for prompts, views in batches.items():
            branches = [k for k, prompt in enumerate(prompts) if prompt is not None]
            stream = self._pipeline.features([images[view] for view in views], prompts)
            for view, features in zip(views, stream, strict=True):
                for branch, taps in zip(branches, features.branches, strict=True):
                    prompt = prompts[branch]
                    assert prompt is not None  # noqa: S101 - branches are those that have one
                    maps = made[view, branch, prompt] = tuple(taps.values())
                    self.extracted += 1
                    if self._files:
                        self._files.put(images[view], branch, prompt, maps)
        return made

    def _share(self, part: _Part, maps: Sequence[FeatureMap]) -> None:
        """One use of a part is over: keep it in files while another unit needs it."""
        self._uses[part] -= 1
        if self._uses[part] <= 0:
            for file, _ in self._shared.pop(part, []):
                file.unlink()
        elif part not in self._shared and not self._files:
            kept = []
            for one in maps:
                file = self._scratch / f"shared-{self._written}.npy"
                self._written += 1
                with output_errors(file):
                    np.save(file, one.data)
                kept.append((file, one.geometry))
            self._shared[part] = kept


def _of(wanted: Sequence[Unit], view: View) -> set[_Part]:
    return {part for unit in wanted if unit.view == view for part in unit.parts}
