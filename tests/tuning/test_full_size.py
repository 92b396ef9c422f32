"""One step of learning on a UNet of Stable Diffusion 2.1's size, at 768 pixels, in bounded memory."""

import os
import resource

import numpy as np
import pytest

from difftap.coords import Geometry
from difftap.engine import Cache
from difftap.recipe import ModelReference, load_recipe
from difftap.tuning.posteriors import ImagePosterior
from difftap.tuning.settings import TuneSettings
from difftap.tuning.training_pairs import TrainingPairs
from tests.bench.pck_cases import samples


class Given:
    """Seeded latents in the VAE's place: its memory is freed before the first step."""

    def __init__(self, side):
        self._side = side

    def get(self, view, size):
        rng = np.random.default_rng(len(str(view.path)))
        mean, std, first, second = (
            rng.standard_normal((4, self._side, self._side)).astype(np.float32) for _ in range(4)
        )
        geometry = Geometry.stretch(tuple(size), (8 * self._side, 8 * self._side))
        return ImagePosterior(mean, abs(std), first[None], second[None], np.zeros((0, 0), np.float32), geometry)


@pytest.mark.slow
def test_one_step_at_full_size_fits_into_24_gigabytes(tmp_path):
    import torch

    from difftap.backbones.find import open_model
    from difftap.prompts import encode_prompt
    from difftap.tuning.learner import Learner, open_space
    from difftap.tuning.loop import ProcessGroup, TrainingLoop
    from difftap.tuning.passes import TappedUNet

    torch.set_num_threads(2)
    cache = Cache(tmp_path) if "DIFFTAP_FULL_SIZE_CACHE" not in os.environ else Cache(_path("DIFFTAP_FULL_SIZE_CACHE"))
    model = open_model(ModelReference("sd21", random_weights=0), cache)
    recipe, settings = load_recipe("sd4match-single"), TuneSettings("single", epochs=1, batch=1, checkpointing=True)
    (pair, *_) = samples(tmp_path / "pictures")
    pairs = TrainingPairs([pair], [pair], {"name": "spair"})
    space = open_space(model, cache, "cpu")
    learner = Learner(settings, space, (), (0, 0), 0, "cpu")
    passes = TappedUNet(model, recipe, (261,), "cpu", checkpointing=True)
    empty = encode_prompt(model, "", cache)
    loop = TrainingLoop(recipe, settings, pairs, [learner], passes, Given(96), empty, ProcessGroup(), "cpu")
    before = learner.rows.detach().clone()
    loss = loop._step([pair])
    assert np.isfinite(loss)
    assert (learner.rows != before).any()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    assert peak < 24e9, f"{peak / 1e9:.1f} GB"


def _path(name):
    from pathlib import Path

    return Path(os.environ[name])
