"""Noise that depends on nothing but (seed, image, member).

Each ensemble member of each image has its own counter-based stream (Philox 4x64-10, Salmon et al., SC 2011), keyed by
a hash of the recipe's seed, the image's content and the member's number. So features do not depend on batch size,
order, the other images, or how many workers share the job.

Antithetic members come in pairs: the second of a pair has the first one's noise with the sign turned, posterior and
diffusion noise alike. Each member by itself is standard normal as before, so the expectation over members is the same;
whatever part of a feature is odd in the noise cancels within the pair (Hammersley and Morton, 1956).
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

__all__ = ["draw"]


def draw(
    seed: int, digest: str, members: int, shape: tuple[int, int, int], antithetic: bool = False
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Standard normal noise for every ensemble member of one image.

    Args:
        seed: the recipe's.
        digest: the image's identity, `difftap.images.Image.digest`.
        members: E.
        shape: ``(C, h, w)`` of the latent.
        antithetic: member 2k + 1 gets the negative of member 2k's noise, which itself is that of independent draws.

    Returns:
        The posterior's noise and the diffusion noise, each float32 ``(E, C, h, w)``. Member ``e`` is the same whatever
        E is.
    """
    both = np.empty((2, members, *shape), np.float32)
    for member in range(members):
        if antithetic and member % 2:
            np.negative(both[:, member - 1], out=both[:, member])
            continue
        key = hashlib.sha256(f"difftap-noise-1:{seed}:{digest}:{member}".encode()).digest()[:16]
        stream = np.random.Generator(np.random.Philox(key=np.frombuffer(key, "<u8")))
        both[0, member] = stream.standard_normal(shape, np.float32)
        both[1, member] = stream.standard_normal(shape, np.float32)
    return both[0], both[1]
