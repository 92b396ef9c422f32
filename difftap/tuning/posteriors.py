"""Compute what learning needs of each image, once: the posterior of its latent, its noise and its tokens.

They are kept in files beside the training's state, so that a resumed run finds them, and in bounded memory.
Axis letters: C channels; h w latent cells; N K image tokens and their channels; H W pixels.
"""

from __future__ import annotations

import hashlib
import logging
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from difftap.artifacts.files import atomic_path, output_errors
from difftap.artifacts.memory import MemoryCache
from difftap.coords import Geometry, Size
from difftap.engine import Engine
from difftap.engine.featurizer import encode, lay
from difftap.errors import ImageError
from difftap.features.keeper import View, load_view
from difftap.images import Image
from difftap.recipe import Recipe

__all__ = ["ImagePosterior", "ImageStore"]

_LOG = logging.getLogger("difftap")
_NAMES = ("mean", "std", "posterior_noise", "noise", "tokens", "size")


@dataclass(frozen=True)
class ImagePosterior:
    """What learning needs of one image.

    Attributes:
        mean: ``(C, h, w)``, mean of the latent's posterior.
        std: ``(C, h, w)``, its standard deviation.
        posterior_noise: ``(1, C, h, w)``, the noise that the posterior is sampled with.
        noise: ``(1, C, h, w)``, the noise that the timestep adds.
        tokens: ``(N, K)``; empty if no prompt depends on the image.
        geometry: how the image lies on the input.
    """

    mean: NDArray[np.float32]
    std: NDArray[np.float32]
    posterior_noise: NDArray[np.float32]
    noise: NDArray[np.float32]
    tokens: NDArray[np.float32]
    geometry: Geometry

    @property
    def nbytes(self) -> int:
        """Bytes of its arrays."""
        return sum(one.nbytes for one in (self.mean, self.std, self.posterior_noise, self.noise, self.tokens))


class ImageStore:
    """The posteriors of images; each image goes through the VAE and the token network once.

    Args:
        recipe: gives input size, fit, noise and seed.
        vae: the VAE encoder's engine.
        tokens: computes an image's tokens from the image and its posterior; None if none are needed.
        folder: where files are kept; made if it does not exist.
        generators: functions that write images which do not exist yet, by file.
        budget: bytes kept in memory.

    Attributes:
        made: number of images that went through the VAE.

    Raises:
        OutputError: the folder cannot be made.
    """

    def __init__(
        self,
        recipe: Recipe,
        vae: Engine,
        tokens: Callable[[Image, ImagePosterior], NDArray[np.float32]] | None,
        folder: Path,
        generators: Mapping[Path, Callable[[], None]],
        budget: int = 1 << 30,
    ) -> None:
        self._recipe = recipe
        self._vae = vae
        self._tokens = tokens
        self._folder = folder
        self._makers = generators
        self._kept: MemoryCache[View, ImagePosterior] = MemoryCache(budget, lambda one: one.nbytes)
        self.made = 0
        with output_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)

    def get(self, view: View, size: Size) -> ImagePosterior:
        """Give the posterior of a view; compute it if no file holds it.

        Args:
            view: the image.
            size: the size ``(W, H)`` that its annotation states.

        Raises:
            ImageError: the image cannot be read, or has another size than annotated.
        """
        if view in self._kept:
            known = self._kept[view]
            self._kept.touch(view)
        else:
            path = self._folder / f"{hashlib.sha256(f'{view.mirrored}:{view.path}'.encode()).hexdigest()[:32]}.npz"
            known = self._read(path) or self._make(view, path)
            self._kept.put(view, known)
        if known.geometry.image != tuple(size):
            width, height = known.geometry.image
            raise ImageError(
                f"'{view.path}' has {width} x {height} pixels, its annotation says {size[0]} x {size[1]}; "
                "get the data set's own images"
            )
        return known

    def _read(self, path: Path) -> ImagePosterior | None:
        if not path.is_file():
            return None
        try:
            with open(path, "rb") as handle, np.load(handle, allow_pickle=False) as data:
                mean, std, first, second, tokens, size = (data[name] for name in _NAMES)
            return ImagePosterior(mean, std, first, second, tokens, self._geometry((int(size[0]), int(size[1]))))
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:  # made again: nothing is lost
            _LOG.warning("'%s' is damaged (%s) and is made again", path, error)
            return None

    def _geometry(self, size: Size) -> Geometry:
        return Geometry.laid(self._recipe.fit, size, self._recipe.size)

    def _make(self, view: View, path: Path) -> ImagePosterior:
        if view.path in self._makers and not view.path.exists():
            self._makers[view.path]()
        image = load_view(view)
        # Learning uses one member of the ensemble. The first one's noise is the same for antithetic pairs and without.
        encoded = encode(self._recipe, self._vae, lay(self._recipe, [image]), 1)
        mean, std = (np.asarray(encoded.given[name])[0] for name in ("mean", "std"))
        draws = np.zeros((2, 1, *mean.shape), np.float32) if encoded.noises is None else encoded.noises[:, 0]
        known = ImagePosterior(mean, std, draws[0], draws[1], np.zeros((0, 0), np.float32), encoded.geometries[0])
        if self._tokens is not None:
            known = replace(known, tokens=self._tokens(image, known))
        self.made += 1
        arrays = (known.mean, known.std, known.posterior_noise, known.noise, known.tokens, np.array(image.size))
        with atomic_path(path) as scratch, open(scratch, "wb") as handle:
            named: Mapping[str, Any] = dict(zip(_NAMES, arrays, strict=True))
            np.savez(handle, **named)
        return known
