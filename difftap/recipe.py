"""Recipes: everything that decides the numbers, as one frozen value.

A recipe is a preset's name (``dift``), a TOML file, or a `Recipe` built in Python. `Recipe.key` names every artifact
made with it, so that features with equal keys were made in the same way.

A TOML recipe::

    model = "sd21"                     # preset name, folder, or hub id
    size = 768                         # or [width, height]
    ensemble = 8

    [[branches]]
    taps = ["up1"]
    timestep = 261

    [matcher]
    name = "dense"
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from difftap.coords import Size
from difftap.errors import RecipeError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

__all__ = [
    "COMBINES",
    "FITS",
    "INTERPOLATIONS",
    "KINDS",
    "MATCHERS",
    "MODES",
    "NOISES",
    "POSTERIORS",
    "RESIZES",
    "Branch",
    "Learned",
    "Matcher",
    "ModelReference",
    "Recipe",
    "load_recipe",
    "presets",
]

_Built = TypeVar("_Built", bound="DataclassInstance")

MATCHERS = ("dense", "nn", "bilinear", "softargmax", "kernel-softargmax", "window-softargmax", "mutual")
INTERPOLATIONS = ("bilinear", "bicubic")
COMBINES = ("concat", "score-sum", "score-product")
FITS = ("stretch", "letterbox")
NOISES = ("independent", "antithetic", "none")
RESIZES = ("bicubic", "bilinear")
POSTERIORS = ("member", "image")
_ADDED = {"resize": "bicubic", "posterior": "member"}
"""Fields that 0.1.0 did not have, with the value that it worked with: they are written and hashed only if they differ,
so that everything that 0.1.0 made keeps its key and its conditions."""
KINDS = ("single", "class", "cpm")
MODES = ("pair", "class", "image")
MAX_SIDE = 4096
"""Longest side of the network's input, in pixels: a mistyped size is refused before it takes all memory."""


def _check(condition: bool, what: str, got: object, allowed: str) -> None:
    """Refuse a value unless a condition holds.

    Raises:
        RecipeError: it does not.
    """
    if not condition:
        raise RecipeError(f"{what} is {got!r}; allowed: {allowed}")


@dataclass(frozen=True)
class Matcher:
    """The rule that turns similarities into points.

    Attributes:
        name: one of `MATCHERS`.
        interpolation: how ``dense`` reads between cells, one of `INTERPOLATIONS`.
        temperature: the soft matchers divide cosines by it before the softmax (SD4Match: 0.04; GeoAware-SC: 0.02).
        sigma: standard deviation of the Gaussian of ``kernel-softargmax``, in cells (SD4Match: 7).
        window: side of the window of ``window-softargmax``, in cells, odd (GeoAware-SC, zero-shot: 11).
    """

    name: str = "dense"
    interpolation: str = "bilinear"
    temperature: float = 0.04
    sigma: float = 7.0
    window: int = 11

    def __post_init__(self) -> None:
        _check(self.name in MATCHERS, "matcher", self.name, ", ".join(MATCHERS))
        _check(self.interpolation in INTERPOLATIONS, "interpolation", self.interpolation, ", ".join(INTERPOLATIONS))
        _check(0 < self.temperature < float("inf"), "temperature", self.temperature, "a number above 0")
        _check(0 < self.sigma < float("inf"), "sigma", self.sigma, "a number of cells above 0")
        _check(self.window >= 1 and self.window % 2 == 1, "window", self.window, "an odd number of cells")


@dataclass(frozen=True)
class Branch:
    """One pass of the UNet.

    Attributes:
        taps: names of the taps to read; several are concatenated on the finest one's grid.
        timestep: 0 to 999, of the model's training schedule.
        prompt: text that conditions the UNet; empty for none.
        weight: share of this branch in the combined similarity; the shares are normalised to sum to 1.
        tuned_at: timestep at which ``difftap tune`` learns this branch's prompt; None for ``timestep``. It does not
            change the features.
    """

    taps: tuple[str, ...]
    timestep: int
    prompt: str = ""
    weight: float = 1.0
    tuned_at: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "taps", tuple(self.taps))
        _check(len(self.taps) > 0 and all(isinstance(t, str) and t for t in self.taps), "taps", self.taps, "names")
        _check(len(set(self.taps)) == len(self.taps), "taps", self.taps, "each tap once")
        _check(0 <= self.timestep < 1000, "timestep", self.timestep, "0 to 999")
        _check(0 < self.weight < float("inf"), "weight", self.weight, "a number above 0")
        whole = self.tuned_at is None or (isinstance(self.tuned_at, int) and 0 <= self.tuned_at < 1000)
        _check(whole, "tuned_at", self.tuned_at, "0 to 999")


@dataclass(frozen=True)
class Learned:
    """Learned prompts, one per branch, that replace the branches' texts (docs/tuning.md).

    Attributes:
        path: the folder that ``difftap tune`` wrote, or the safetensors file in it.
        kind: the kind of prompts it must hold, one of `KINDS`; empty to accept any.
        mode: what a conditional prompt is made for, one of `MODES`: each ``pair`` (exact), each ``class`` (the mean
            over the class's training pairs), or each ``image`` (the image paired with itself). Empty for the kind's
            default, which is ``pair`` for cpm.
        sha256: hash of the file; empty to accept any. It is filled in when the recipe is opened
            (`difftap.prompts.learned.pinned`), so that features made with one file are never taken for those of
            another one that later lies in the same place.
    """

    path: str
    kind: str = ""
    mode: str = ""
    sha256: str = ""

    def __post_init__(self) -> None:
        _check(bool(self.path), "path of learned prompts", self.path, "a folder that 'difftap tune' wrote")
        _check(self.kind in ("", *KINDS), "kind of learned prompts", self.kind, ", ".join(KINDS))
        _check(self.mode in ("", *MODES), "mode of learned prompts", self.mode, ", ".join(MODES))
        whole = not self.sha256 or (len(self.sha256) == 64 and set(self.sha256) <= set("0123456789abcdef"))
        _check(whole, "sha256 of learned prompts", self.sha256, "64 hexadecimal digits, or none")


@dataclass(frozen=True)
class ModelReference:
    """Which checkpoint is meant: its name, and the revision or the seed of its weights.

    Attributes:
        name: preset name, local folder, or hub id; ``+FILE.safetensors`` behind any of them replaces the UNet's
            weights.
        revision: branch, tag or commit of a hub id; None for the default branch.
        random_weights: seed to build a preset's weights from, instead of loading them; None to load them.
    """

    name: str
    revision: str | None = None
    random_weights: int | None = None

    def __post_init__(self) -> None:
        _check(bool(self.name), "model", self.name, "a preset name, a folder, or a hub id")

    def __str__(self) -> str:
        """Name the checkpoint as people and error messages do."""
        if self.random_weights is not None:
            return f"{self.name} (random weights, seed {self.random_weights})"
        return self.name if self.revision is None else f"{self.name} at {self.revision}"

    def to_data(self) -> str | dict[str, str | int]:
        """Give plain data: a mapping of the fields that are set, or the name alone if no other is."""
        data = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        return self.name if len(data) == 1 else data


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the numbers.

    Attributes:
        branches: one or more passes; their maps are joined as in the poster's dual layer: each is L2-normalised per
            cell, resized to the finest grid by ``upsample``, and weighted, so that the cosine of the concatenated map
            is the weighted mean of the branches' cosines.
        model: the checkpoint; a name alone is enough.
        size: the network's input, ``(W, H)`` in pixels.
        fit: ``stretch`` (the aspect ratio is not kept; DIFT's way) or ``letterbox``.
        ensemble: noise samples averaged per image, E.
        noise: ``independent`` draws of posterior and diffusion noise for each member (as published); ``antithetic``
            pairs of members with the same noise and opposite sign, where ``ensemble`` must be even; or ``none`` for a
            clean latent (CleanDIFT), where ``ensemble`` must be 1.
        seed: of the noise.
        upsample: interpolation that resizes maps to a common grid.
        combine: how the branches' maps are matched as one. ``concat`` joins them into one map; ``score-sum`` gives the
            same scores without storing the joined map, which can save memory; ``score-product`` takes the geometric
            mean of the cosines, weighted by the branches' shares.
        matcher: the rule that turns similarities into points.
        learned: learned prompts that replace the branches' texts; None to use the texts.
        resize: how an image is resized to the input: ``bicubic`` (DIFT) or ``bilinear`` (SD4Match).
        posterior: the latent is sampled from its posterior once a ``member`` (DIFT), or once an ``image``, the same for
            all members (SD4Match).
    """

    branches: tuple[Branch, ...]
    model: ModelReference = ModelReference("pocket")
    size: Size = (768, 768)
    fit: str = "stretch"
    ensemble: int = 8
    noise: str = "independent"
    seed: int = 0
    upsample: str = "bicubic"
    combine: str = "concat"
    matcher: Matcher = field(default_factory=Matcher)
    learned: Learned | None = None
    resize: str = "bicubic"
    posterior: str = "member"

    def __post_init__(self) -> None:
        # Callers may pass lists and plain names, as TOML does. A frozen dataclass can only be set in this way.
        object.__setattr__(self, "branches", tuple(self.branches))
        if isinstance(self.model, str):
            object.__setattr__(self, "model", ModelReference(self.model))
        object.__setattr__(self, "size", tuple(self.size))
        _check(len(self.branches) > 0, "branches", len(self.branches), "at least one")
        _check(
            len(self.size) == 2 and all(isinstance(n, int) and 8 <= n <= MAX_SIDE for n in self.size),
            "size",
            self.size,
            f"one or two whole numbers of pixels, 8 to {MAX_SIDE}",
        )
        _check(self.fit in FITS, "fit", self.fit, ", ".join(FITS))
        _check(self.noise in NOISES, "noise", self.noise, ", ".join(NOISES))
        _check(self.resize in RESIZES, "resize", self.resize, ", ".join(RESIZES))
        _check(self.posterior in POSTERIORS, "posterior", self.posterior, ", ".join(POSTERIORS))
        _check(1 <= self.ensemble <= 1024, "ensemble", self.ensemble, "1 to 1024")
        _check(
            self.noise != "none" or self.ensemble == 1,
            "ensemble",
            self.ensemble,
            "1 when noise is 'none', since all members would be equal",
        )
        _check(
            self.noise != "antithetic" or self.ensemble % 2 == 0,
            "ensemble",
            self.ensemble,
            "an even number when noise is 'antithetic', since members come in pairs",
        )
        _check(0 <= self.seed < 2**63, "seed", self.seed, "0 to 2^63 - 1")  # what TOML and int64 can hold
        _check(self.combine in COMBINES, "combine", self.combine, ", ".join(COMBINES))
        _check(self.upsample in INTERPOLATIONS, "upsample", self.upsample, ", ".join(INTERPOLATIONS))

    def to_dict(self) -> dict[str, object]:
        """Give plain nested data, ready for JSON or TOML, without fields that are None; `from_dict` reads it back.

        Fields that were added after 0.1.0 are left out where they say what 0.1.0 did.
        """
        data = {**dataclasses.asdict(self), "model": self.model.to_data()}
        for name in [name for name, value in _ADDED.items() if data[name] == value]:
            del data[name]
        for table in (data, *data["branches"]):
            for name in [name for name, value in table.items() if value is None]:
                del table[name]
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Recipe:
        """Build a recipe from plain nested data.

        Raises:
            RecipeError: a field is unknown, missing or has a value that is not allowed.
        """
        values = dict(data)
        try:
            branches = [_build(Branch, branch, "branches") for branch in values.pop("branches", ())]
            matcher = _build(Matcher, values.pop("matcher", {}), "matcher")
            if values.get("learned") is not None:
                values["learned"] = _build(Learned, values["learned"], "learned")
            if not isinstance(values.get("model", ""), str):
                values["model"] = _build(ModelReference, values["model"], "model")
            if isinstance(values.get("size"), int):
                values["size"] = (values["size"], values["size"])
            return _build(cls, {**values, "branches": tuple(branches), "matcher": matcher}, "recipe")
        except TypeError as error:  # a list where a number belongs, for instance
            raise RecipeError(f"recipe has a value of the wrong type: {error}") from error

    def feature_fields(self) -> dict[str, Any]:
        """Give the part that decides the features: without the matcher and without how the branches are joined."""
        data = self._by_content()
        del data["matcher"], data["upsample"], data["combine"]
        for branch in data["branches"]:
            del branch["weight"]
            branch.pop("tuned_at", None)
        return data

    def key(self) -> str:
        """Hash all fields to 16 hex digits. Together with the model's key they name every artifact made with it."""
        return _digest(self._by_content())

    def feature_key(self) -> str:
        """Hash the `feature_fields` to 16 hex digits, for artifacts that hold features only."""
        return _digest(self.feature_fields())

    def _by_content(self) -> dict[str, Any]:
        """Give the plain data that keys are made of.

        Fields that were added after 0.1.0 are not in it while they say what 0.1.0 did (`_ADDED`).
        """
        # Of the model only the name counts here, because its weights have a key of their own.
        data = {**self.to_dict(), "model": self.model.name}
        if self.learned is not None and self.learned.sha256:
            # The file's content, not its path: moving the folder must not change the key.
            data["learned"] = {"sha256": self.learned.sha256, "mode": self.learned.mode}
        return data


def _digest(data: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True, ensure_ascii=True).encode()).hexdigest()[:16]


def _build(kind: type[_Built], data: object, where: str) -> _Built:
    """Construct a dataclass from a mapping, after checking the fields' names and plain types.

    Raises:
        RecipeError: a field is unknown, missing or of another type.
    """
    if not isinstance(data, Mapping):
        raise RecipeError(f"{where} should be a table of fields, got {data!r}")
    fields = {f.name: f for f in dataclasses.fields(kind)}
    unknown = sorted(set(data) - set(fields))
    if unknown:
        raise RecipeError(f"unknown field '{unknown[0]}' in {where}; allowed: {', '.join(fields)}")
    required = [
        f.name
        for f in fields.values()
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING and f.name not in data
    ]
    if required:
        raise RecipeError(f"{where} lacks the field '{required[0]}'; it needs {', '.join(required)}")
    plain: dict[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "str": (str,)}
    values = dict(data)
    for name, value in values.items():
        wanted = plain.get(str(fields[name].type))
        if wanted and (not isinstance(value, wanted) or isinstance(value, bool)):  # in Python, True is an int
            raise RecipeError(f"{name} in {where} is {value!r}; allowed: a value of type {fields[name].type}")
        if wanted == plain["float"]:
            values[name] = float(value)  # 1 and 1.0 are one number, so they must give one key
    if isinstance(values.get("tuned_at"), bool):
        raise RecipeError(f"tuned_at in {where} is {values['tuned_at']!r}; allowed: a value of type int")
    taps = values.get("taps")
    if isinstance(taps, str):  # a text is a sequence too, and would be read as one tap a letter
        raise RecipeError(f'taps in {where} is {taps!r}; allowed: a list of names, such as ["{taps}"]')
    make: Callable[..., _Built] = kind  # its own checks judge the values
    return make(**values)


@cache
def presets() -> Mapping[str, Recipe]:
    """Load the recipes that come with difftap, by name."""
    text = resources.files("difftap").joinpath("presets.toml").read_text(encoding="utf-8")
    return {name: Recipe.from_dict(data) for name, data in tomllib.loads(text).items()}


def load_recipe(name: str | Path) -> Recipe:
    """Load a preset by name, or a recipe from a TOML file.

    Raises:
        RecipeError: it is neither a preset nor a readable, valid TOML file.
    """
    known = presets()
    if str(name) in known:
        return known[str(name)]
    path = Path(name)
    try:
        found = path.is_file()
    except OSError:  # too long a name for the file system
        found = False
    if not found:
        raise RecipeError(f"no recipe '{name}'; presets: {', '.join(known)}; or give the path of a TOML file")
    try:
        return Recipe.from_dict(tomllib.loads(path.read_text(encoding="utf-8")))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise RecipeError(f"recipe file '{path}' cannot be read as TOML: {error}") from error
    except RecipeError as error:
        raise RecipeError(f"recipe file '{path}': {error}") from error
