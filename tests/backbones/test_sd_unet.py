"""Taps against real diffusers modules with random weights: channels, stride and order are what the network does."""

from pathlib import Path

import pytest

from difftap.backbones.sd_unet import SDUNet, depth
from difftap.errors import RecipeError
from tests.harness import MINI_UNET

TINY_UNET = {  # four blocks, as Stable Diffusion has
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (16, 24, 32, 32),
    "layers_per_block": 1,
    "cross_attention_dim": 12,
    "attention_head_dim": 4,
    "norm_num_groups": 8,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
}
TINY_VAE = {
    "block_out_channels": (8, 8, 16, 16),
    "latent_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "scaling_factor": 0.5,
}
STRIDE = 8  # image pixels per latent cell of TINY_VAE
CONFIGS = {
    "tiny": TINY_UNET,
    "mini": MINI_UNET,
    "like-sd": {**TINY_UNET, "layers_per_block": 2, "block_out_channels": (8, 16, 32, 32)},
    "layers": {**TINY_UNET, "layers_per_block": (1, 2, 3, 1), "reverse_transformer_layers_per_block": None},
    "no-mid": {**MINI_UNET, "mid_block_type": None},
    "mixed": {
        **MINI_UNET, "block_out_channels": (8, 16),
        "down_block_types": ("AttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "AttnUpBlock2D"),
    },
}  # fmt: skip


def of(config) -> SDUNet:
    """A checkpoint without weights."""
    return SDUNet("test", Path(), config, TINY_VAE, {})


@pytest.fixture(scope="module", params=CONFIGS)
def watched(request):
    """A UNet's config and what hooks saw of one pass: module path -> (channels, cells), in the order they finished."""
    torch = pytest.importorskip("torch")
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(**CONFIGS[request.param]).eval()
    seen = {}

    def hook(path):
        def see(_module, _inputs, output):
            value = output[0] if isinstance(output, tuple) else getattr(output, "sample", output)
            seen[path] = (value.shape[1], tuple(value.shape[2:])) if getattr(value, "ndim", 0) == 4 else None

        return see

    for path, module in unet.named_modules():
        if path.startswith(("down_blocks", "up_blocks", "mid_block")):
            module.register_forward_hook(hook(path))
    with torch.inference_mode():
        unet(
            torch.zeros(1, 4, 16, 24),
            torch.tensor([5]),
            encoder_hidden_states=torch.zeros(1, 3, unet.config.cross_attention_dim),
        )
    return dict(unet.config), seen


def test_every_named_tap_is_what_a_hook_sees(watched):
    config, seen = watched
    taps = of(config).taps
    for tap in taps:
        assert seen[tap.module] == (tap.channels, (16 * STRIDE // tap.stride, 24 * STRIDE // tap.stride)), tap
    named = {tap.module for tap in taps}
    layers = {path for path in seen if path.split(".")[-2:-1] in (["resnets"], ["attentions"]) and path.count(".") == 3}
    assert layers <= named, "a layer of a block has no short name"


def test_taps_are_listed_in_the_order_of_execution(watched):
    config, seen = watched
    order = list(seen)
    places = [order.index(tap.module) for tap in of(config).taps]
    assert places == sorted(places)


def test_depth_sorts_as_the_network_runs(watched):
    config, seen = watched
    downs = len(config["down_block_types"])
    # Finer paths than a layer share the layer's place, so each path is held against the layer or block it belongs to.
    named = {tap.module for tap in of(config).taps}
    order = [
        path
        for path in seen
        if path in named or path.split(".")[-2:-1] == ["upsamplers"] or path.split(".")[-2:-1] == ["downsamplers"]
    ]
    depths = [depth(path, downs) for path in order]
    assert depths == sorted(depths)
    for path in seen:
        layer = ".".join(path.split(".")[:4]) if not path.startswith("mid") else path
        if layer in named and layer != path:
            assert depth(path, downs) <= depth(layer, downs)


def test_deepest_is_the_last_to_finish(watched):
    config, seen = watched
    order = list(seen)
    taps = of(config).taps
    for first in taps[::3]:
        for second in taps[::2]:
            want = max((first, second), key=lambda tap: order.index(tap.module))
            assert of(config).deepest([first, second]).module == want.module


def test_names_and_paths_resolve_to_the_same_module(watched):
    config, seen = watched
    for tap in of(config).taps:
        assert of(config).tap(tap.name) == tap
        by_path = of(config).tap(tap.module)
        assert (by_path.name, by_path.module, by_path.channels, by_path.stride) == (
            tap.module,
            tap.module,
            tap.channels,
            tap.stride,
        )
    inner = next((path for path in seen if path.endswith("transformer_blocks.0.attn1")), None)
    if inner:
        assert of(config).tap(inner).module == inner


@pytest.mark.parametrize(
    "name",
    [
        "",
        "up",
        "up9",
        "up-1",
        "down1.attn9",
        "up1.attn",
        "mid.res",
        "conv_in",
        "up_blocks.9",
        "up1 ",
        "up_blocks.1..x",
        "../up1",
    ],
)
def test_unknown_taps_list_what_exists(name):
    with pytest.raises(RecipeError) as caught:
        of(TINY_UNET).tap(name)
    assert f"no tap '{name}'" in str(caught.value)
    assert "down0, down1, down2, down3, mid, up0, up1, up2, up3" in str(caught.value)


def test_index_one_of_dift_in_stable_diffusion():
    import json
    from importlib import resources

    for name in ("sd15", "sd21"):
        config = json.loads(resources.files("difftap").joinpath("assets", "configs", f"{name}.json").read_text())[
            "unet"
        ]
        tap = of(config).tap("up1")
        assert (tap.module, tap.channels, tap.stride) == ("up_blocks.1", 1280, 16)


def test_the_middle_comes_after_the_last_encoder_block_and_before_the_decoder():
    assert depth("down_blocks.3", 4) < depth("mid_block.resnets.0", 4) < depth("mid_block", 4) < depth("up_blocks.0", 4)
    unet = of(TINY_UNET)
    for taps in (("down3", "mid"), ("mid", "down3")):
        assert unet.deepest([unet.tap(name) for name in taps]).name == "mid"
