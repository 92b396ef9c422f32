"""Calibration feeds are what the recipe feeds its networks; the bundled pictures are always the same."""

from __future__ import annotations

import dataclasses
import hashlib

import numpy as np
import pytest

from difftap.engine import Engine, Graph, Profile
from difftap.engine.calibration import MAX_IMAGES, RecipeCalibration, bundled_images, bundled_portraits
from difftap.engine.noise import draw
from difftap.errors import ImageError, InputError
from difftap.images import Image, to_input
from difftap.pipeline.environment import calibration_images
from difftap.recipe import Branch, Recipe
from tests.harness import picture

RECIPE = Recipe(size=(64, 32), ensemble=4, branches=(Branch(("up1",), 261), Branch(("up2",), 50), Branch(("up1",), 7)))


class Encoder(Engine):
    """Gives a posterior that tells which image it was made of."""

    def _run(self, feeds):
        level = feeds["image"].mean(dtype=np.float64)
        shape = (1, self.graph.model.latent_channels, 32 // 8, 64 // 8)
        return {"mean": np.full(shape, level, np.float32), "std": np.ones(shape, np.float32)}


def calibration_of(pocket, images, **changes) -> RecipeCalibration:
    prompts = [np.full((2, 128), i, np.float32) for i in range(3)]
    vae = Encoder(Graph(pocket, "vae"), Profile(RECIPE.size), "cpu")
    return RecipeCalibration(pocket, RECIPE, lambda: images, lambda: prompts, lambda: vae, **changes)


def test_unet_feeds_are_the_recipes(pocket):
    images = [Image(picture(seed)) for seed in range(5)]
    calibration = calibration_of(pocket, images)
    graph, profile = Graph(pocket, "unet", ("up1",)), Profile(RECIPE.size, ensemble=2, tokens=2)
    feeds = list(calibration(graph, profile))
    assert len(feeds) == 4  # the last image is kept to measure on
    for i, one in enumerate(feeds):
        assert {name: array.shape for name, array in one.items()} == {
            "mean": (1, pocket.latent_channels, 4, 8),
            "std": (1, pocket.latent_channels, 4, 8),
            "posterior_noise": (1, 2, pocket.latent_channels, 4, 8),
            "noise": (1, 2, pocket.latent_channels, 4, 8),
            "signal": (1,),
            "sigma": (1,),
            "timestep": (1,),
            "prompt": (1, 2, 128),
        }
        branch = (0, 2)[i % 2]  # the branches that read up1 take turns; the other one has a graph of its own
        assert one["timestep"] == RECIPE.branches[branch].timestep
        assert (one["prompt"] == branch).all()
        alpha = pocket.alphas_cumprod[RECIPE.branches[branch].timestep]
        assert one["signal"] == pytest.approx(alpha**0.5 * pocket.scaling_factor)
        assert one["sigma"] == pytest.approx((1 - alpha) ** 0.5)
        wanted = draw(RECIPE.seed, images[i].digest, 2, one["mean"].shape[1:])
        assert (one["posterior_noise"][0] == wanted[0]).all() and (one["noise"][0] == wanted[1]).all()
        assert one["mean"][0, 0, 0, 0] == pytest.approx(to_input(images[i], RECIPE.size)[0].mean(), abs=1e-6)
    probe = calibration.probe(graph, profile)
    assert probe["mean"][0, 0, 0, 0] == pytest.approx(to_input(images[4], RECIPE.size)[0].mean(), abs=1e-6)


def test_vae_feeds_are_the_images(pocket):
    images = [Image(picture(seed)) for seed in range(3)]
    feeds = list(calibration_of(pocket, images)(Graph(pocket, "vae"), Profile(RECIPE.size)))
    assert [one["image"].tobytes() for one in feeds] == [to_input(i, RECIPE.size)[0].tobytes() for i in images[:2]]


@pytest.mark.parametrize("count", [1, 2, 4])
def test_the_error_is_measured_on_images_that_are_not_calibrated_on(pocket, count):
    images = [Image(picture(seed)) for seed in range(count)]
    calibration = dataclasses.replace(calibration_of(pocket, images), chosen=True)
    graph, profile = Graph(pocket, "vae"), Profile(RECIPE.size)
    used = {one["image"].tobytes() for one in calibration(graph, profile)}
    assert len(used) == max(1, count - 1)
    probe = calibration.probe(graph, profile)["image"]
    assert len(probe) == 2 + (count > 1)  # the bundled portraits, and the last of several
    assert not used & {one[None].tobytes() for one in probe}


def test_a_bundled_portrait_that_is_calibrated_on_is_not_measured_on(pocket):
    calibration = dataclasses.replace(calibration_of(pocket, bundled_portraits()[:1]), chosen=True)
    assert [image.digest for image in calibration.measured_on] == [bundled_portraits()[1].digest]


def test_many_images_are_thinned_evenly_and_the_key_follows_them(pocket):
    images = [Image(np.full((2, 2, 3), i, np.uint8)) for i in range(100)]
    calibration = calibration_of(pocket, images)
    levels = [int(image.pixels[0, 0, 0]) for image in calibration.images]
    assert len(levels) == MAX_IMAGES and levels == sorted(set(levels))
    assert max(np.diff(levels)) - min(np.diff(levels)) <= 1 and levels[0] == 0
    assert calibration.key == calibration_of(pocket, images).key != calibration_of(pocket, images[1:]).key
    listing = "\n".join(image.digest for image in calibration.images)
    assert calibration.key == hashlib.sha256(listing.encode()).hexdigest()[:16]  # engines that exist go by it


def test_bundled_images_are_there_and_the_same_every_time():
    first, second = bundled_images(), bundled_images()
    assert [a.digest for a in first] == [b.digest for b in second]
    assert len({image.digest for image in first}) == len(first) == 7
    seen, left, right, kept = (first[k].pixels for k in (0, 1, 2, 6))
    height, width = seen.shape[:2]
    assert (left == seen[: height * 2 // 3, : width * 2 // 3][:, ::-1]).all()
    assert (right == seen[height // 3 :, width // 3 :][:, ::-1]).all()
    assert kept.shape[2] == 3 and not (kept.shape == seen.shape and (kept == seen).all())


@pytest.mark.parametrize("seed", range(3))
def test_bundled_discs_are_those_of_the_seed(seed):
    """At some places: the colour of the last disc that covers the place, from the same draws."""
    pixels = bundled_images()[3 + seed].pixels
    assert pixels.shape == (512, 512, 3)
    stream = np.random.default_rng([7, seed])
    # Of radii between 4 and 256 with density r^-3, 1/r^2 is uniform.
    radii = 1 / np.sqrt(1 / 16 - stream.random(3000) * (1 / 16 - 1 / 256**2))
    centres, colours = stream.random((3000, 2)) * 512, stream.integers(0, 256, (3000, 3))
    compared = 0
    for x, y in np.random.default_rng(0).integers(0, 512, (200, 2)):
        beyond = np.hypot(*(centres - (x, y)).T) - radii  # of each disc's edge
        last = max(np.flatnonzero(beyond < 0), default=None)
        if np.abs(beyond[last:]).min() > 2:  # at an edge it is Pillow's to decide
            assert pixels[y, x].tolist() == ([0, 0, 0] if last is None else colours[last].tolist())
            compared += 1
    assert compared > 100


def test_images_are_found_in_folders_and_named_where_they_cannot_be_read(tmp_path, photos):
    inner = tmp_path / "set" / "inner"
    inner.mkdir(parents=True)
    for path in photos:
        (inner / path.name).write_bytes(path.read_bytes())
    (inner / "notes.txt").write_text("no picture")
    assert [i.path for i in calibration_images((tmp_path / "set",))] == [str(inner / p.name) for p in photos]
    assert len(calibration_images((photos[0], tmp_path / "set"))) == 3
    with pytest.raises(InputError, match=r"no pictures in '.*empty' to calibrate on; allowed: .jpg"):
        (tmp_path / "empty").mkdir()
        calibration_images((tmp_path / "empty",))
    with pytest.raises(ImageError, match="no image at"):
        calibration_images((tmp_path / "gone.png",))
