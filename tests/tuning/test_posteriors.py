"""What is known of an image under each kind of noise, and that it is read again from its file."""

import numpy as np
import pytest

from difftap.engine import Graph, Profile
from difftap.engine.noise import draw
from difftap.errors import ImageError
from difftap.features.keeper import View
from difftap.images import load_image
from difftap.recipe import Branch, Recipe
from difftap.tuning.posteriors import ImageStore
from tests.engine.test_calibration import Encoder


@pytest.mark.parametrize("noise", ["independent", "antithetic", "none"])
def test_one_member_is_learned_on(pocket, photos, tmp_path, noise):
    recipe = Recipe((Branch(("up1",), 20),), size=(64, 32), ensemble=1 if noise == "none" else 4, seed=3, noise=noise)
    vae = Encoder(Graph(pocket, "vae"), Profile(recipe.size), "cpu")
    store = ImageStore(recipe, vae, None, tmp_path / "kept", {})
    known = store.get(View(photos[0]), (40, 30))
    shape = (pocket.latent_channels, 4, 8)
    assert known.mean.shape == known.std.shape == shape
    wanted = draw(3, load_image(photos[0]).digest, 1, shape)
    if noise == "none":
        wanted = np.zeros((2, 1, *shape), np.float32)
    assert known.posterior_noise.tobytes() == wanted[0].tobytes()
    assert known.noise.tobytes() == wanted[1].tobytes()
    again = ImageStore(recipe, vae, None, tmp_path / "kept", {})
    assert again.get(View(photos[0]), (40, 30)).noise.tobytes() == known.noise.tobytes()
    assert (store.made, again.made) == (1, 0)
    with pytest.raises(ImageError, match="has 40 x 30 pixels, its annotation says 30 x 40"):
        again.get(View(photos[0]), (30, 40))
