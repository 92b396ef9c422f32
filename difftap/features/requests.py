"""Which maps a pair of images asks for, and where they come from: files that have them, else the network.

A request is an image under one prompt a branch. Each (image, branch, prompt) goes through the network once. A recipe
may prompt one branch by category and another not: the second's maps are then the same for all categories that an image
stands for, and lie in scratch files from the first such request to the last.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from difftap.errors import DifftapError, ImageError, InputError, NonFiniteError
from difftap.featuremap import FeatureMap
from difftap.features.branchfiles import BranchFiles
from difftap.features.keeper import Generators, ImageMaps, MapKeeper, View, load_view
from difftap.images import Image
from difftap.matching import MatchRule, PreparedImage
from difftap.pipeline.pipeline import Provider
from difftap.prompts import Prompt, Subject, choose_prompts
from difftap.recipe import Recipe

__all__ = ["MapRequest", "MapSource", "RequestedImage", "match_requested", "passes", "request_pair"]

Result = TypeVar("Result")

_Part = tuple[View, int, Prompt]  # one pass through the network: image, branch, prompt


@dataclass(frozen=True)
class MapRequest:
    """An image, and the prompt of each of the recipe's branches."""

    view: View
    prompts: tuple[Prompt, ...]

    @property
    def parts(self) -> list[_Part]:
        """The passes it takes: view, branch and prompt of each."""
        return [(self.view, branch, prompt) for branch, prompt in enumerate(self.prompts)]


def request_pair(recipe: Recipe, source: View, target: View, category: str | None) -> tuple[MapRequest, MapRequest]:
    """Make the requests of a pair's two images.

    Args:
        recipe: its branches' prompts.
        source: the image whose points are looked for.
        target: the image they are looked for in.
        category: what both show, where a prompt depends on it.

    Raises:
        InputError: learned prompts depend on a category, and it is None.
    """
    pair = (source, target)
    first, second = (MapRequest(one, choose_prompts(recipe, Subject(category, one, pair))) for one in pair)
    return first, second


def passes(wanted: Sequence[MapRequest]) -> set[_Part]:
    """Collect every (image, branch, prompt) that requests need, once."""
    return {part for request in wanted for part in request.parts}


class MapSource:
    """Gives the maps of requests: read from files where they are there, computed otherwise.

    Args:
        pipeline: the open recipe.
        rule: how an image's maps are combined before they are kept.
        order: all requests that will be made, repeats included.
        scratch: an existing folder for maps that several requests share.
        files: where maps are kept for later runs; None to keep none.
        generators: images that have to be made first.

    Attributes:
        made: requests whose maps were given.
        passes: passes through the network, one per (image, branch, prompt).
    """

    def __init__(
        self,
        pipeline: Provider,
        rule: MatchRule,
        order: Sequence[MapRequest],
        scratch: Path,
        files: BranchFiles | None = None,
        generators: Generators | None = None,
    ) -> None:
        self._pipeline = pipeline
        self._rule = rule
        # Repeats of one request are served from memory (`MapKeeper`), so a part counts once a distinct request.
        self._uses = Counter(part for request in dict.fromkeys(order) for part in request.parts)
        self._lasting = files is not None
        self._files = files or BranchFiles(scratch / "branches", pipeline)
        self._shared: set[_Part] = set()
        self._generators = generators
        self.made = 0
        self.passes = 0

    def __call__(self, wanted: Sequence[MapRequest]) -> Iterator[ImageMaps | DifftapError]:
        """Give each request's maps, combined as the rule says, or what keeps its image from having any; in order."""
        images: dict[View, Image | ImageError] = {}
        for request in wanted:
            if request.view not in images:
                images[request.view] = self._load(request.view)
        faults = {request: fault for request in wanted if (fault := self._know(request, images)) is not None}
        whole = [request for request in wanted if request not in faults]
        good = {view: image for view, image in images.items() if isinstance(image, Image)}
        parts = {part for request in whole if request.view in good for part in request.parts}
        known = {part: self._read(part, good[part[0]]) for part in parts}
        fresh = self._extract(whole, good, {part for part, maps in known.items() if maps is None})
        for request in wanted:
            image = faults.get(request, images[request.view])
            if isinstance(image, ImageError):
                yield image
                continue
            maps = [one for part in request.parts for one in (known[part] or fresh[part])]
            self.made += 1
            yield ImageMaps(self._rule.fuse(maps), image.size, image.digest)
            for part in request.parts:
                self._share(part, image, known[part] or fresh[part])

    def _load(self, view: View) -> Image | ImageError:
        try:
            return load_view(view, self._generators)
        except ImageError as error:
            return error

    def _know(self, request: MapRequest, images: dict[View, Image | ImageError]) -> ImageError | None:
        """Make known the images that a request's prompts are made of; return what keeps one of them from it, if any."""
        book = self._pipeline.prompts
        for view in dict.fromkeys(name for prompt in request.prompts for name in prompt.pair or ()):
            if not isinstance(view, View) or book.knows(view):
                continue
            image = images.get(view) or self._load(view)
            if isinstance(image, ImageError):
                return image
            book.know(view, image)
        return None

    def _read(self, part: _Part, image: Image) -> tuple[FeatureMap, ...] | None:
        _, branch, prompt = part
        return self._files.get(image, branch, prompt) if self._lasting or part in self._shared else None

    def _extract(
        self, wanted: Sequence[MapRequest], images: dict[View, Image], missing: set[_Part]
    ) -> dict[_Part, tuple[FeatureMap, ...]]:
        """Run what is missing; images that lack the same branches under the same prompts go together."""
        batches: dict[tuple[Prompt | None, ...], dict[View, None]] = {}
        taken: set[_Part] = set()
        for request in wanted:
            lacking = tuple(p[2] if p in missing and p not in taken else None for p in request.parts)
            if request.view in images and any(lacking):
                batches.setdefault(lacking, {})[request.view] = None
                taken.update(part for part, prompt in zip(request.parts, lacking, strict=True) if prompt is not None)
        made: dict[_Part, tuple[FeatureMap, ...]] = {}
        for prompts, views in batches.items():
            run = [(branch, prompt) for branch, prompt in enumerate(prompts) if prompt is not None]
            stream = self._pipeline.features([images[view] for view in views], prompts)
            for view, features in zip(views, stream, strict=True):
                for (branch, prompt), taps in zip(run, features.branches, strict=True):
                    maps = made[view, branch, prompt] = tuple(taps.values())
                    self.passes += 1
                    if self._lasting:  # at once, so that a run that is killed here has it
                        self._files.put(images[view], branch, prompt, maps)
        return made

    def _share(self, part: _Part, image: Image, maps: Sequence[FeatureMap]) -> None:
        """Count one use of a part; between its first and its last it lies in files."""
        self._uses[part] -= 1
        if self._lasting:
            return
        _, branch, prompt = part
        if self._uses[part] <= 0:
            if part in self._shared:
                self._shared.remove(part)
                self._files.drop(image, branch, prompt)
        elif part not in self._shared:
            self._shared.add(part)
            self._files.put(image, branch, prompt, maps)


@dataclass(frozen=True)
class RequestedImage:
    """One image of a pair, as `match_requested` gives it to the function that matches.

    Attributes:
        prepared: the image, ready to be matched.
        maps: its maps, with the image's size and digest.
        view: the image's file.
    """

    prepared: PreparedImage
    maps: ImageMaps
    view: View


def match_requested(
    source: MapSource,
    rule: MatchRule,
    requested: Sequence[tuple[MapRequest, MapRequest]],
    match: Callable[[int, RequestedImage, RequestedImage], Result],
    *,
    scratch: Path,
    memory: int,
    batch: int = 1,
) -> Iterator[Result | str]:
    """Match pairs one after another, each image's maps made once and kept in bounded memory while a pair needs them.

    Args:
        source: gives the maps of requests.
        rule: prepares maps for matching.
        requested: each pair's two requests.
        match: matches one pair: its place in ``requested``, its source and its target.
        scratch: an existing folder for maps that do not fit into memory.
        memory: bytes of maps and of what is prepared of them.
        batch: images computed together.

    Yields:
        what ``match`` gave, or why the pair cannot be used: an image, a point or a value that is not finite.

    Raises:
        BackendError, OutputError: the machine's faults, which would fail every pair.
    """
    order = [request for both in requested for request in both]
    keeper = MapKeeper(source, rule.prepare, order, memory, scratch, max(1, batch))
    for place, both in enumerate(requested):
        try:
            first, second = (RequestedImage(keeper.prepared(one), keeper.get(one), one.view) for one in both)
            result: Result | str = match(place, first, second)
        except (InputError, NonFiniteError) as error:  # about this pair alone
            result = " ".join(str(error).split())
        keeper.done(*both)
        yield result
