"""The noise depends on seed, image and member alone; its values are part of the recipe's meaning."""

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from difftap.engine.noise import draw

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
