"""Taps: the intermediate tensors of a network that difftap can read, by name.

A tap is data: a short name, the module whose output it is, how many channels that has, and how many image pixels one
of its cells spans. Which taps a network has, its backbone says (`difftap.backbones`).
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Tap"]


@dataclass(frozen=True)
class Tap:
    """One intermediate tensor of a network.

    Attributes:
        name: the name it was asked for by, also the name of the graph's output.
        module: path of the module whose output it is.
        channels: C of its ``(B, C, h, w)`` output; 0 where only running the network can tell.
        stride: image pixels per cell; 0 where only running the network can tell.
    """

    name: str
    module: str
    channels: int
    stride: int
