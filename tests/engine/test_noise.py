"""The noise depends on seed, image and member alone; its values are part of the recipe's meaning."""

import hashlib
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from difftap.backbones.checkpoint import NoiseRule
from difftap.engine.noise import draw, draw_noise, latent_feeds, scales
from difftap.errors import InputError
from difftap.recipe import Branch, Recipe

DIGEST = "ab" * 32
GOLDEN = (
    [2.73118091, -0.39705095, -0.55902064, -2.07923603],
    [-0.45774749, 0.30051965, -1.94595647, 0.07422428],
)
GOLDEN_BYTES = "ccdbd80609b6d571e6156b5f547175f6cb38e12089fb351007e83954e59a1c63"


def test_golden_values():
    posterior, diffusion = draw(3, DIGEST, 2, (2, 2, 3))
    assert posterior.dtype == diffusion.dtype == np.float32
    assert posterior.shape == diffusion.shape == (2, 2, 2, 3)
    assert posterior[0].ravel()[:4].tolist() == pytest.approx(GOLDEN[0], abs=1e-7)
    assert diffusion[1].ravel()[:4].tolist() == pytest.approx(GOLDEN[1], abs=1e-7)


def test_golden_bytes_at_full_size():
    posterior, diffusion = draw(0, "0" * 64, 8, (4, 96, 96))
    assert hashlib.sha256(posterior.tobytes() + diffusion.tobytes()).hexdigest() == GOLDEN_BYTES


def test_a_member_is_the_same_whatever_the_ensemble_and_the_order():
    one, eight = draw(0, DIGEST, 1, (4, 6, 5)), draw(0, DIGEST, 8, (4, 6, 5))
    draw(9, "cd" * 32, 3, (4, 6, 5))  # another image in between
    again = draw(0, DIGEST, 8, (4, 6, 5))
    for kind in range(2):
        assert (one[kind][0] == eight[kind][0]).all()
        assert (again[kind] == eight[kind]).all()


def test_seed_image_member_and_kind_all_matter():
    draws = [
        *draw(0, DIGEST, 3, (1, 4, 4))[0], *draw(0, DIGEST, 3, (1, 4, 4))[1], *draw(1, DIGEST, 3, (1, 4, 4))[0],
        *draw(0, "cd" * 32, 3, (1, 4, 4))[0], *draw(1, "1" + DIGEST, 1, (1, 4, 4))[0],
        *draw(11, DIGEST, 1, (1, 4, 4))[0],
    ]  # fmt: skip
    assert len({array.tobytes() for array in draws}) == len(draws)


def test_it_is_standard_normal_and_uncorrelated():
    posterior, diffusion = draw(5, DIGEST, 8, (4, 64, 64))
    values = (
        np.concatenate([posterior, diffusion]).reshape(16, -1).astype(np.float64)
    )  # (members of both kinds, values)
    count = values.size
    assert abs(values.mean()) < 5 / count**0.5
    assert abs(values.var() - 1) < 5 * (2 / count) ** 0.5
    assert abs((values**4).mean() - 3) < 5 * (96 / count) ** 0.5
    correlation = np.corrcoef(values)
    assert np.abs(correlation - np.eye(16)).max() < 5.5 / values.shape[1] ** 0.5
    assert 0.0024 < (np.abs(values) > 3).mean() < 0.0030  # 0.0027


@given(
    seed=st.integers(0, 2**63 - 1),
    digest=st.text("0123456789abcdef", min_size=64, max_size=64),
    pairs=st.integers(1, 5),
    more=st.integers(0, 3),
)
def test_antithetic_pairs_cancel_and_stay_keyed_by_member(seed, digest, pairs, more):
    shape = (2, 3, 4)
    turned = draw(seed, digest, 2 * pairs, shape, True)
    longer = draw(seed, digest, 2 * (pairs + more), shape, True)
    plain = draw(seed, digest, 2 * pairs, shape)
    for kind in range(2):
        assert (turned[kind][0::2] + turned[kind][1::2] == 0).all()  # exactly: the sum of a pair has no rounding
        assert (turned[kind].mean(axis=0, dtype=np.float64) == 0).all()
        assert (longer[kind][: 2 * pairs] == turned[kind]).all()
        assert (turned[kind][0::2] == plain[kind][0::2]).all()
        assert (np.abs(turned[kind][1::2]) == np.abs(turned[kind][0::2])).all()
        assert not (turned[kind][1::2] == plain[kind][1::2]).all()


def test_antithetic_members_are_standard_normal_one_by_one():
    members = np.concatenate(draw(5, DIGEST, 8, (4, 64, 64), True)).reshape(16, -1).astype(np.float64)
    count = members.shape[1]
    for values in members:
        assert abs(values.mean()) < 5 / count**0.5
        assert abs(values.var() - 1) < 5 * (2 / count) ** 0.5
        assert abs((values**3).mean()) < 5 * (15 / count) ** 0.5
        assert abs((values**4).mean() - 3) < 5 * (96 / count) ** 0.5
    correlation = np.corrcoef(members)
    for pair in range(8):
        block = correlation[2 * pair : 2 * pair + 2, 2 * pair : 2 * pair + 2]
        assert np.allclose(block, [[1, -1], [-1, 1]])
    heads = members[0::2]
    assert np.abs(np.corrcoef(heads) - np.eye(8)).max() < 5.5 / count**0.5


RULE = NoiseRule(1, 8, 0.5, np.array([0.81, 0.36, 0.0]))
"""A schedule whose roots are whole tenths: signal 0.9, 0.6, 0 times 0.5; sigma the square root of 0.19, then 0.8, 1."""


@pytest.mark.parametrize(
    ("timestep", "noise", "want"),
    [
        (0, "independent", (0.45, 0.19**0.5)),  # the first step of the schedule counts, it is not "no timestep"
        (1, "independent", (0.3, 0.8)),
        (1, "antithetic", (0.3, 0.8)),
        (2, "independent", (0.0, 1.0)),  # zero terminal signal: pure noise
        (0, "none", (0.5, 0.0)),
        (2, "none", (0.5, 0.0)),  # a clean latent at any timestep
    ],
)
def test_signal_and_sigma_worked_out_by_hand(timestep, noise, want):
    assert scales(RULE, timestep, noise) == pytest.approx(want, abs=1e-12)


@pytest.mark.parametrize("timestep", [-1, 3])
def test_a_timestep_outside_the_schedule_is_refused(timestep):
    with pytest.raises(InputError, match=f"timestep is {timestep}; allowed: 0 to 2"):
        scales(RULE, timestep, "independent")


def test_feeds_of_two_cells_worked_out_by_hand():
    """The noisy latent of two images of two cells each, as the graph forms it: the posterior sampled once a member."""
    torch = pytest.importorskip("torch")
    from difftap.engine.torch_model import noisy_latent

    posterior = {
        "mean": np.array([[[[2.0, -4.0]]], [[[0.0, 10.0]]]], np.float32),  # (B, C, h, w) = (2, 1, 1, 2)
        "std": np.array([[[[1.0, 0.5]]], [[[2.0, 0.0]]]], np.float32),
    }
    first = [[[[[1.0, 2.0]]], [[[-1.0, -2.0]]]], [[[[3.0, 5.0]]], [[[3.0, 5.0]]]]]  # image 2: once for both members
    second = [[[[[10.0, 0.0]]], [[[-10.0, 0.0]]]], [[[[1.0, 1.0]]], [[[-1.0, -1.0]]]]]
    noises = np.array([first, second], np.float32)  # (2, B, E, C, h, w)
    feeds = latent_feeds(RULE, 1, "independent", posterior, noises)
    assert feeds["timestep"].tolist() == [1, 1] and feeds["timestep"].dtype == np.int64
    names = ("mean", "std", "posterior_noise", "noise", "signal", "sigma")
    found = noisy_latent(*(torch.from_numpy(feeds[name]) for name in names))
    # 0.3 (mean + std * first) + 0.8 * second
    want = [
        [[[[0.3 * 3 + 8, 0.3 * -3]]], [[[0.3 * 1 - 8, 0.3 * -5]]]],
        [[[[0.3 * 6 + 0.8, 0.3 * 10 + 0.8]]], [[[0.3 * 6 - 0.8, 0.3 * 10 - 0.8]]]],
    ]
    assert np.allclose(found.numpy(), want, atol=1e-6)
    clean = latent_feeds(RULE, 1, "none", posterior, np.zeros_like(noises))
    found = noisy_latent(*(torch.from_numpy(clean[name]) for name in names))
    assert np.allclose(found.numpy()[:, 0], 0.5 * posterior["mean"])  # neither noise has a say


def test_a_recipes_kind_decides_what_is_drawn():
    recipe = Recipe((Branch(("up1",), 0),), ensemble=4, seed=3)
    plain = draw_noise(recipe, [DIGEST, "cd" * 32], (2, 2, 3), 3)
    assert plain.shape == (2, 2, 3, 2, 2, 3)
    assert (plain[:, 0] == np.stack(draw(3, DIGEST, 3, (2, 2, 3)))).all()
    pairs = draw_noise(replace(recipe, noise="antithetic"), [DIGEST], (2, 2, 3), 4)
    assert (pairs[:, :, 1] == -pairs[:, :, 0]).all() and (pairs[:, :, 3] == -pairs[:, :, 2]).all()
    assert (pairs[:, 0, 0] == plain[:, 0, 0]).all()  # a pair's first member is that of independent draws
    assert not draw_noise(replace(recipe, noise="none", ensemble=1), [DIGEST], (2, 2, 3), 1).any()


def test_one_posterior_sample_an_image_is_the_first_members():
    recipe = Recipe((Branch(("up1",), 20),), ensemble=4, posterior="image")
    each = draw_noise(replace(recipe, posterior="member"), ["a", "b"], (2, 3, 4), 4)
    shared = draw_noise(recipe, ["a", "b"], (2, 3, 4), 4)
    for member in range(4):
        assert (shared[0, :, member] == each[0, :, 0]).all()
    assert (shared[1] == each[1]).all()  # the diffusion noise is each member's own
