"""A second kind of network, all in one file: a tiny vision transformer with random weights.

It has no encoder, no noise and no prompt; its patch tokens are its feature maps. Real kinds look the same and live in
`difftap.backbones`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from difftap.backbones.checkpoint import Checkpoint
from difftap.backbones.config import read_config
from difftap.backbones.weights import find_weights
from difftap.taps import Tap

CONFIG = {"model_type": "tiny-vit", "patch": 8, "width": 12, "depth": 3, "heads": 2}


@dataclass(frozen=True)
class TinyViT(Checkpoint):
    """A folder with ``config.json`` and ``model.safetensors``."""

    settings: Mapping[str, Any] = field(repr=False)

    components: ClassVar[tuple[str, ...]] = ("vit",)
    tapped: ClassVar[str] = "vit"

    @classmethod
    def recognises(cls, folder: Path) -> bool:
        path = folder / "config.json"
        return path.is_file() and read_config(path, "network").get("model_type") == "tiny-vit"

    @classmethod
    def read(cls, folder: Path, name: str) -> TinyViT:
        checkpoint = cls(name, folder, read_config(folder / "config.json", "network"))
        checkpoint.weight_files("vit")
        return checkpoint

    @property
    def size_step(self) -> int:
        return int(self.settings["patch"])

    @property
    def taps(self) -> tuple[Tap, ...]:
        width, patch = self.settings["width"], self.settings["patch"]
        return tuple(Tap(f"block{i}", f"blocks.{i}", width, patch) for i in range(self.settings["depth"]))

    def config(self, component: str) -> Mapping[str, Any]:
        return self.settings

    def weight_files(self, component: str) -> tuple[Path, ...]:
        return find_weights(self.folder, "model")

    def network(self, component: str) -> Any:
        from safetensors.torch import load_file

        network = make_vit(self.settings)
        network.load_state_dict(load_file(self.folder / "model.safetensors"))
        return network.eval().requires_grad_(False)

    def as_map(self, output: Any, given: Any) -> Any:
        """Tokens ``(B, 1 + h w, C)``, the class token first, to ``(B, C, h, w)``."""
        patch = self.settings["patch"]
        return output[:, 1:].transpose(1, 2).unflatten(2, (given.shape[2] // patch, given.shape[3] // patch))


def make_vit(settings: Mapping[str, Any]) -> Any:
    """The network itself, plain PyTorch: images ``(B, 3, H, W)`` to the last block's tokens."""
    import torch
    from torch import nn

    width, patch = settings["width"], settings["patch"]

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
            self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

        def forward(self, tokens):
            heads = self.qkv(self.norm1(tokens)).unflatten(2, (3, settings["heads"], -1)).permute(2, 0, 3, 1, 4)
            mixed = nn.functional.scaled_dot_product_attention(*heads)  # (B, heads, N, C / heads)
            tokens = tokens + self.out(mixed.transpose(1, 2).flatten(2))
            return tokens + self.mlp(self.norm2(tokens))

    class ViT(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches = nn.Conv2d(3, width, patch, patch)
            self.cls = nn.Parameter(torch.zeros(1, 1, width))
            self.blocks = nn.ModuleList(Block() for _ in range(settings["depth"]))

        def forward(self, image):
            tokens = self.patches(image).flatten(2).transpose(1, 2)  # (B, N, C)
            tokens = torch.cat([self.cls.expand(tokens.shape[0], -1, -1), tokens], dim=1)
            for block in self.blocks:
                tokens = block(tokens)
            return tokens

    return ViT()


def write_vit(folder: Path, seed: int = 0) -> Path:
    """Write a checkpoint with random weights."""
    import torch
    from safetensors.torch import save_file

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = make_vit(CONFIG)
        torch.nn.init.normal_(network.cls)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(network.state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder
