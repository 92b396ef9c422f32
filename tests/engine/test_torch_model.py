"""The reference network: loaded safely, hooked, never copied."""

import shutil

import numpy as np
import pytest

from difftap.backbones.checkpoint import Checkpoint
from difftap.engine import Graph, Profile, get_backend
from difftap.engine.noise import example_feeds
from difftap.errors import ModelError, RecipeError

torch = pytest.importorskip("torch")


@pytest.fixture
def copy(mini, tmp_path):
    shutil.copytree(mini, tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("size", [0, 4, 500, -100])
def test_damaged_weights_are_a_model_error(copy, size):
    path = copy / "unet" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ModelError, match="not a whole safetensors file") as caught:
        get_backend("torch").open(Graph(Checkpoint.load(copy), "unet", ("up1",)), Profile((16, 16)), "cpu", 1)
    assert "\n" not in str(caught.value)


def test_stopping_early_changes_no_number_and_leaves_no_hook(mini):
    from difftap.engine.torch_model import build

    model, taps = Checkpoint.load(mini), ("down1.attn0", "up0", "mid")
    feeds = example_feeds(Graph(model, "unet", taps), Profile((16, 24), 2, 3, 2))
    results = []
    for early in (True, False):
        module = build(model, "unet", taps, stop_early=early)
        with torch.inference_mode():
            results.append(
                [
                    value.numpy()
                    for value in module(
                        *(torch.from_numpy(feeds[spec.name]) for spec in Graph(model, "unet", taps).inputs)
                    )
                ]
            )
        assert not any(part._forward_hooks for part in module.unet.modules())
    for first, second in zip(*results, strict=True):
        assert (first == second).all()
    assert [value.shape for value in results[0]] == [(2, 16, 6, 4), (2, 16, 6, 4), (2, 16, 3, 2)]


def test_a_module_path_gives_what_the_short_name_gives(mini):
    model, profile = Checkpoint.load(mini), Profile((16, 16), 2, 3, 1)
    results = {}
    for name in ("up1.attn0", "up_blocks.1.attentions.0"):
        with get_backend("torch").open(Graph(model, "unet", (name,)), profile, "cpu", 1) as engine:
            results[name] = engine.run(example_feeds(engine.graph, profile))[name]
    assert np.array_equal(*results.values())


def test_the_number_of_threads_is_put_back(mini):
    before = torch.get_num_threads()
    profile = Profile((16, 16))
    with get_backend("torch").open(Graph(Checkpoint.load(mini), "vae"), profile, "cpu", before + 1) as engine:
        engine.run(example_feeds(engine.graph, profile))
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("path", ["up_blocks.1.resnets", "up_blocks.1.attentions.0.transformer_blocks.0.attn1"])
def test_a_module_that_gives_no_map_is_no_tap(mini, path):
    graph = Graph(Checkpoint.load(mini), "unet", (path,))
    profile = Profile((24, 16), tokens=3)
    with (
        get_backend("torch").open(graph, profile, "cpu", None) as engine,
        pytest.raises(RecipeError, match=r"cannot be read: module .* allowed: a module that gives a map"),
    ):
        engine.run(example_feeds(graph, profile))


def test_a_layer_and_its_part_are_both_read(mini):
    graph = Graph(Checkpoint.load(mini), "unet", ("up_blocks.1.resnets.0.conv1", "up1.res0"))
    profile = Profile((24, 16), tokens=3)
    with get_backend("torch").open(graph, profile, "cpu", None) as engine:
        assert set(engine.run(example_feeds(graph, profile))) == set(graph.taps)
