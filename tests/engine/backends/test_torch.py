"""Torch in half precision and compiled."""

from __future__ import annotations

import dataclasses
import shutil

import numpy as np
import pytest

from difftap.backbones.checkpoint import Checkpoint
from difftap.engine import Graph, Profile, get_backend
from difftap.engine.noise import example_feeds
from difftap.export.parity import TensorParity
from tests.harness import MINI_TAPS

PROFILE = Profile(size=(24, 16), ensemble=2, tokens=5, batch=3)


@pytest.fixture(scope="module", params=["vae", "unet"])
def graph(request, mini) -> Graph:
    return Graph(Checkpoint.load(mini), request.param, MINI_TAPS if request.param == "unet" else ())


def run(name, graph, precision, batches=(3,)):
    profile = dataclasses.replace(PROFILE, precision=precision)
    with get_backend(name).open(graph, profile, "cpu", 1) as engine:
        feeds = example_feeds(graph, PROFILE)
        return [engine.run({key: value[:batch] for key, value in feeds.items()}) for batch in batches]


@pytest.mark.parametrize(("precision", "relative"), [("fp16", 4e-3), ("bf16", 3e-2)])
def test_half_precision_is_near_fp32_and_not_equal_to_it(graph, precision, relative):
    ((want,), (got,)) = run("torch", graph, "fp32"), run("torch", graph, precision)
    for name, value in got.items():
        assert value.dtype == np.float32 and value.flags.c_contiguous
        assert 1e-6 < TensorParity.of(value, want[name]).relative < relative, name


def test_logits_beyond_fp16_do_not_overflow(mini, tmp_path):
    """Queries and keys scaled up until their products leave fp16's range, as Stable Diffusion 2.1's do."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "loud"
    shutil.copytree(mini, folder)
    (path,) = (folder / "unet").glob("*.safetensors")
    weights = load_file(path)
    for name in weights:
        if "attn1.to_q" in name or "attn1.to_k" in name:
            weights[name] = weights[name] * 1000.0
    save_file(weights, path)
    graph = Graph(Checkpoint.load(folder), "unet", ("up1",))
    ((want,), (got,)) = run("torch", graph, "fp32"), run("torch", graph, "fp16")
    assert TensorParity.of(got["up1"], want["up1"]).cosine_mean > 0.99
