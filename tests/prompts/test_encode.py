"""Prompt embeddings: the embedded model's table, CLIP, and the seeded noise of random checkpoints."""

import json
import logging
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file

import difftap.prompts.encode as encode
from difftap.backbones.checkpoint import Checkpoint, pocket_folder
from difftap.engine import Cache
from difftap.errors import MissingExtraError, ModelError
from difftap.prompts import encode_prompt
from tests.harness import MINI_UNET, write_mini


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path / "cache")


def table(folder):
    config = json.loads((folder / "prompt_table" / "config.json").read_text())
    return config["words"], int(config["length"]), load_file(folder / "prompt_table" / "model.safetensors")["embedding"]


def test_the_table_gives_start_words_and_padding(pocket, cache):
    words, length, rows = table(pocket.folder)
    got = encode_prompt(pocket, f"{words[5]} {words[9]}", cache)
    assert got.dtype == np.float32
    assert got.shape == (length, pocket.unet["cross_attention_dim"])
    want = [0, 2 + 5, 2 + 9] + [1] * (length - 3)
    assert (got == rows[want].astype(np.float32)).all()
    assert (encode_prompt(pocket, "", cache) == rows[[0] + [1] * (length - 1)].astype(np.float32)).all()


def test_case_and_punctuation_do_not_count_and_order_does(pocket, cache):
    words = table(pocket.folder)[0]
    first, second = words[5], words[9]
    assert (
        encode_prompt(pocket, f"{first.upper()}, {second}!", cache) == encode_prompt(pocket, f"{first} {second}", cache)
    ).all()
    assert (
        encode_prompt(pocket, f"{second} {first}", cache) != encode_prompt(pocket, f"{first} {second}", cache)
    ).any()


def test_long_prompts_are_cut_and_unknown_words_are_named(pocket, cache, caplog):
    words, length, _ = table(pocket.folder)
    assert encode_prompt(pocket, " ".join(words[:100]), cache).shape[0] == length
    with caplog.at_level(logging.WARNING, "difftap"):
        got = encode_prompt(pocket, f"qwertz {words[5]} asdfgh", cache)
    assert "qwertz, asdfgh" in caplog.text
    assert (got == encode_prompt(pocket, words[5], cache)).all()


@pytest.mark.parametrize(
    "damage",
    [
        lambda t: (t / "config.json").write_text("{"),
        lambda t: (t / "config.json").write_text("[]"),
        lambda t: (t / "config.json").unlink(),
        lambda t: (t / "model.safetensors").write_bytes(b"abc"),
        lambda t: (t / "model.safetensors").unlink(),
    ],
)
def test_a_damaged_table(tmp_path, cache, damage):
    shutil.copytree(pocket_folder(), tmp_path / "model")
    damage(tmp_path / "model" / "prompt_table")
    with pytest.raises(ModelError, match="prompt table"):
        encode_prompt(Checkpoint.load(tmp_path / "model"), "a", cache)


def test_parts_that_do_not_belong_together(tmp_path, cache):
    shutil.copytree(pocket_folder(), tmp_path / "model")
    path = tmp_path / "model" / "unet" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "cross_attention_dim": 77}))
    with pytest.raises(ModelError, match="reads width 77; the checkpoint's parts do not belong together"):
        encode_prompt(Checkpoint.load(tmp_path / "model"), "a", cache)


def test_random_checkpoints_have_seeded_prompts(mini, cache, tmp_path):
    model = Checkpoint.load(mini)
    got = encode_prompt(model, "a cat", cache)
    assert got.shape == (77, MINI_UNET["cross_attention_dim"])
    assert (encode_prompt(model, "a cat", cache) == got).all()
    assert (encode_prompt(model, "a dog", cache) != got).any()
    assert abs(got.std() - 1) < 0.2
    shutil.copytree(mini, tmp_path / "other")
    (tmp_path / "other" / "model_index.json").write_text(json.dumps({"_difftap_random_weights": 9}))
    assert (encode_prompt(Checkpoint.load(tmp_path / "other"), "a cat", cache) != got).any()
    (tmp_path / "other" / "model_index.json").write_text("{}")
    with pytest.raises(ModelError, match="neither text_encoder/ nor prompt_table/"):
        encode_prompt(Checkpoint.load(tmp_path / "other"), "a cat", cache)


def write_clip(folder, width, suffix="", projection=None):
    """Give a checkpoint a tiny CLIP text encoder, and a tokenizer that knows single letters."""
    transformers = pytest.importorskip("transformers")
    letters = [chr(i) for i in range(97, 123)]
    vocabulary = {
        token: i
        for i, token in enumerate([*letters, *(f"{x}</w>" for x in letters), "<|startoftext|>", "<|endoftext|>"])
    }
    tokenizer = folder / f"tokenizer{suffix}"
    tokenizer.mkdir()
    (tokenizer / "vocab.json").write_text(json.dumps(vocabulary))
    (tokenizer / "merges.txt").write_text("#version: 0.2\n")
    special = {
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
    }
    (tokenizer / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, **special})
    )
    config = transformers.CLIPTextConfig(
        vocab_size=len(vocabulary), hidden_size=width, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        bos_token_id=vocabulary["<|startoftext|>"], eos_token_id=vocabulary["<|endoftext|>"],
        projection_dim=projection or 512,
    )  # fmt: skip
    kind = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
    kind(config).save_pretrained(folder / f"text_encoder{suffix}")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A checkpoint with a text encoder."""
    pytest.importorskip("transformers")
    folder = write_mini(tmp_path_factory.mktemp("clip"), unet={**MINI_UNET, "cross_attention_dim": 8})
    write_clip(folder, width=8)
    return folder


def test_clip_is_run_as_the_pipelines_run_it(clip, cache):
    import torch
    from transformers import CLIPTextModel, CLIPTokenizer

    got = encode_prompt(Checkpoint.load(clip), "a cat", cache)
    tokens = CLIPTokenizer.from_pretrained(clip / "tokenizer")(
        "a cat", padding="max_length", max_length=77, truncation=True, return_tensors="pt"
    )
    with torch.inference_mode():
        want = CLIPTextModel.from_pretrained(clip / "text_encoder").eval()(tokens.input_ids).last_hidden_state[0]
    assert got.shape == (77, 8)
    assert np.allclose(got, want.numpy(), atol=1e-6)


def test_clip_runs_once_a_prompt(clip, cache, monkeypatch, caplog):
    model, asked, run = Checkpoint.load(clip), [], encode._clip
    monkeypatch.setattr(encode, "_clip", lambda model, prompt: asked.append(prompt) or run(model, prompt))
    first = encode_prompt(model, "a cat", cache)
    assert (encode_prompt(model, "a cat", cache) == first).all()
    assert asked == ["a cat"]
    encode_prompt(model, "a dog", cache)
    assert asked == ["a cat", "a dog"]
    for path in (cache.folder / "prompts").glob("*.npy"):
        path.write_bytes(path.read_bytes()[:40])
    with caplog.at_level(logging.WARNING, "difftap"):
        assert (encode_prompt(model, "a cat", cache) == first).all()
    assert "its manifest says" in caplog.text
    assert not list(cache.folder.rglob("*.part"))


def test_an_unwritable_cache_only_warns(clip, caplog):
    from pathlib import Path

    with caplog.at_level(logging.WARNING, "difftap"):
        assert encode_prompt(Checkpoint.load(clip), "a cat", Cache(Path("/dev/null/cache"))).shape == (77, 8)
    assert "could not be kept" in caplog.text


def test_pickled_and_damaged_text_encoders_are_refused(clip, cache, tmp_path):
    shutil.copytree(clip, tmp_path / "model")
    weights = tmp_path / "model" / "text_encoder" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:200])
    with pytest.raises(ModelError, match="not a whole safetensors file"):
        encode_prompt(Checkpoint.load(tmp_path / "model"), "a cat", cache)
    weights.rename(weights.with_name("pytorch_model.bin"))
    with pytest.raises(ModelError, match=r"pickled weights .* are refused"):
        encode_prompt(Checkpoint.load(tmp_path / "model"), "a cat", cache)


def test_without_transformers_the_pip_line(clip, cache, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'difftap\[export\]'"):
        encode_prompt(Checkpoint.load(clip), "never seen before", cache)
