"""Backbones: what every registered kind must say, and a second kind from one file and one line."""

import json

import numpy as np
import pytest

from difftap.backbones.checkpoint import BACKBONES, Checkpoint, backbones
from difftap.backbones.sd_unet import SDUNet
from difftap.errors import ModelError, RecipeError
from difftap.features.store import FeatureStore
from difftap.images import load_image, to_input
from difftap.pipeline.environment import Runtime
from difftap.pipeline.pipeline import Pipeline
from difftap.recipe import Branch, Recipe
from tests.backbones.tiny_vit import CONFIG, TinyViT, make_vit, write_vit
from tests.harness import invoke

SIZE = (48, 32)


@pytest.fixture
def vit(tmp_path, monkeypatch):
    """A tiny ViT's folder, its kind registered: one line."""
    pytest.importorskip("torch")
    monkeypatch.setitem(BACKBONES, "tiny-vit", "tests.backbones.tiny_vit:TinyViT")
    return write_vit(tmp_path / "vit")


def recipe_of(folder, **changes) -> Recipe:
    fields = {"size": SIZE, "ensemble": 1, "noise": "none", "branches": (Branch(("block1", "block2"), 0),)}
    return Recipe(model=str(folder), **(fields | changes))


def plain(folder, pixels) -> dict[str, np.ndarray]:
    """The maps in plain PyTorch, written from scratch."""
    import torch
    from safetensors.torch import load_file

    network = make_vit(CONFIG)
    network.load_state_dict(load_file(folder / "model.safetensors"))
    image = torch.from_numpy(pixels[None])
    with torch.inference_mode():
        tokens = network.patches(image)  # (1, C, h, w)
        shape = tokens.shape
        tokens = torch.cat([network.cls, tokens.flatten(2).transpose(1, 2)], dim=1)
        maps = {}
        for i, block in enumerate(network.blocks):
            tokens = block(tokens)
            maps[f"block{i}"] = tokens[0, 1:].T.reshape(shape[1:]).numpy()
    return maps


def test_every_kind_can_be_listed_and_says_what_it_is(vit):
    kinds = backbones()
    assert kinds == {"sd-unet": SDUNet, "tiny-vit": TinyViT}
    for kind in kinds.values():
        assert kind.tapped in kind.components and kind.encoder in (None, *kind.components)


@pytest.mark.parametrize("backend", ["ort", "torch"])
def test_features_of_another_kind_are_those_of_plain_pytorch(vit, photos, backend):
    images = [load_image(path) for path in photos]
    with Pipeline.open(recipe_of(vit), Runtime(backend=backend)) as pipeline:
        assert isinstance(pipeline.model, TinyViT)
        found = list(pipeline.features(images))
    for image, features in zip(images, found, strict=True):
        want = plain(vit, to_input(image, SIZE)[0])
        (maps,) = features.branches
        assert list(maps) == ["block1", "block2"]
        for name, one in maps.items():
            assert one.data.shape == want[name].shape == (12, 4, 6)
            assert np.abs(one.data - want[name]).max() <= 1e-5


@pytest.mark.parametrize("backend", ["ort", "torch"])
def test_another_kind_goes_through_the_commands(vit, photos, tmp_path, backend):
    toml = tmp_path / "vit.toml"
    toml.write_text(
        f'model = {json.dumps(str(vit))}\nsize = [48, 32]\nensemble = 1\nnoise = "none"\n'
        '[[branches]]\ntaps = ["block1"]\ntimestep = 0\n'
    )

    def run(*words):
        done = invoke([*map(str, words)])
        assert done.exit_code == 0, done.output
        return done.stdout

    assert "block2" in run("taps", "--model", vit)
    if backend == "ort":
        assert "cut after block1" in run("export", "--model", vit, "--tap", "block1", "--tap", "block0")
    common = ("--recipe", toml, "--backend", backend)
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for path in photos:
        (pictures / path.name).write_bytes(path.read_bytes())
    run("extract", pictures, "-o", tmp_path / "s.zarr", *common)
    image = load_image(photos[0])
    store = FeatureStore.open(tmp_path / "s.zarr")
    stored = store.read(store.find(image.digest)).branches[0]["block1"].data
    want = plain(vit, to_input(image, SIZE)[0])["block1"]
    assert np.abs(stored - want).max() <= 2e-3 * np.abs(want).max()  # float16
    found = json.loads(run("match", photos[0], photos[0], "--grid", 3, *common))
    assert len(found["matches"]) == 9
    for match in found["matches"]:
        assert match["target"] == pytest.approx(match["source"], abs=1)  # an image is found in itself


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"noise": "independent"},
            r"noise is 'independent'; allowed: none \(with ensemble 1\), since",
        ),
        ({"branches": (Branch(("block1",), 1),)}, r"timestep is 1; allowed: 0, since there is no schedule in '"),
        ({"branches": (Branch(("block1",), 0, "a cat"),)}, r"prompt is 'a cat'; allowed: none, since '.*' takes no"),
        ({"branches": (Branch(("up1",), 0),)}, r"no tap 'up1' in '.*'; allowed: block0, block1, block2"),
        ({"size": (48, 36)}, r"size 48 x 36 does not fit model '.*'; allowed: multiples of 8"),
    ],
)
def test_what_does_not_fit_a_kind_is_refused_in_its_words(vit, changes, message):
    with pytest.raises(RecipeError, match=message):
        Pipeline.open(recipe_of(vit, **changes))


def test_a_timestep_must_be_of_the_schedule(mini):
    last = Recipe((Branch(("up1",), 999),), str(mini), size=(16, 16))
    Checkpoint.load(mini).check(last)
    short = json.loads((mini / "scheduler" / "scheduler_config.json").read_text()) | {"num_train_timesteps": 999}
    model = SDUNet(*(getattr(Checkpoint.load(mini), name) for name in ("name", "folder", "unet", "vae")), short)
    with pytest.raises(RecipeError, match=r"timestep is 999; allowed: 0 to 998, the schedule of"):
        model.check(last)


def test_pickled_weights_of_another_kind_are_refused(vit):
    (vit / "model.safetensors").rename(vit / "pytorch_model.bin")
    with pytest.raises(ModelError, match="holds pickled weights"):
        Checkpoint.load(vit)
