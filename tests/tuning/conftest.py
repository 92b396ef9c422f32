"""Trainings so small that they take a second: random networks, six pairs."""

from __future__ import annotations

import json

import pytest

from difftap.backbones.checkpoint import Checkpoint
from difftap.engine import Cache
from difftap.recipe import Branch, Matcher, Recipe
from difftap.tuning.settings import TuneSettings
from difftap.tuning.training_pairs import TrainingPairs
from tests.bench.pck_cases import samples
from tests.harness import MINI_UNET, write_mini

SIZE = (32, 32)


@pytest.fixture(scope="session")
def clip(tmp_path_factory):
    """A checkpoint folder with a tiny CLIP text encoder of 12 places."""
    transformers = pytest.importorskip("transformers")
    folder = write_mini(tmp_path_factory.mktemp("clip"), unet={**MINI_UNET, "cross_attention_dim": 8})
    words = ["a", "a</w>", "b", "b</w>", "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: k for k, word in enumerate(words)}
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "tokenizer" / "merges.txt").write_text("#version: 0.2\n")
    special = {
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
    }
    (folder / "tokenizer" / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": 12, **special})
    )
    config = transformers.CLIPTextConfig(
        vocab_size=6, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=12, bos_token_id=0, eos_token_id=2,
    )  # fmt: skip
    transformers.CLIPTextModel(config).save_pretrained(folder / "text_encoder")
    return folder


@pytest.fixture(scope="session")
def dino(tmp_path_factory):
    """A folder with a tiny DINOv2 network of 16 x 16 patches."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("dino")
    config = transformers.Dinov2Config(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, mlp_ratio=2, image_size=32, patch_size=2
    )
    transformers.Dinov2Model(config).save_pretrained(folder)
    return folder


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path / "cache")


@pytest.fixture
def pairs(tmp_path):
    """Four pairs to learn from and two to choose by, of two classes."""
    made = samples(tmp_path / "pictures")
    train, val = made[:2] + made[3:5], [made[2], made[5]]
    return TrainingPairs(train, val, {"name": "synthetic", "how": "by hand", "train_pairs": 4, "val_pairs": 2})


def recipe(model, branches=1, **more):
    taps = [Branch(("up1",), 20), Branch(("down1.attn0",), 40)][:branches]
    return Recipe(tuple(taps), str(model), SIZE, ensemble=1, matcher=Matcher("nn"), **more)


def settings(kind, **more):
    return TuneSettings(kind, **{"epochs": 2, "batch": 2, "tokens": 6, "image_tap": "up1", **more})


def learn(model, pairs, folder, kind="single", *, cache, branches=1, recipe_more=None, **more):
    """Learn on one thread; gives what `tune` gives."""
    from difftap.tuning.learn import tune

    given = {name: more.pop(name) for name in ("overwrite", "watcher", "threads") if name in more}
    one = recipe(model, branches, **(recipe_more or {}))
    return tune(
        Checkpoint.load(model), one, pairs, settings(kind, **more), folder, cache=cache, device="cpu",
        **{"threads": 1, **given},
    )  # fmt: skip
