"""What an index ranks by is what the distances say."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from difftap.errors import InputError
from difftap.retrieval.distances import pairwise
from difftap.retrieval.kinds import INDEXED, IndexMetric, IndexPlan, make


def raw(space, a, b):
    """What FAISS would compute from prepared vectors."""
    x, y = space.prepare(a), space.prepare(b)
    if space.product == "ip":
        return x @ y.T
    gaps = x[:, None] - y[None]
    return np.square(gaps).sum(axis=2) if space.product == "l2" else np.abs(gaps).sum(axis=2)


@settings(deadline=None)
@given(seed=st.integers(0, 1000), metric=st.sampled_from(INDEXED), wide=st.booleans())
def test_scores_are_distances(seed, metric, wide):
    rng = np.random.default_rng(seed)
    a, b = (rng.standard_normal((4, 9)) * 10.0 ** rng.integers(-3, 4) + rng.integers(-3, 4) for _ in range(2))
    if not wide:
        a, b = a.astype(np.float32), b.astype(np.float32)
    space = IndexMetric(metric)
    scores = space.score(raw(space, a, b).astype(np.float32))
    distances = pairwise(a, b, metric=metric)
    close = 1 - scores if space.higher_is_nearer else scores
    np.testing.assert_allclose(close, distances, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("metric", ["cosine", "correlation"])
def test_a_vector_without_direction_is_like_nothing(metric):
    flat = np.full((1, 7), 0.0 if metric == "cosine" else 0.1)
    assert not IndexMetric(metric).prepare(flat).any()


def test_tiny_and_huge_vectors_keep_their_direction():
    x = np.array([[1e-30, 2e-30, 3e-30], [1e30, 2e30, 3e30]], np.float32)
    np.testing.assert_allclose(np.linalg.norm(IndexMetric("cosine").prepare(x), axis=1), 1, rtol=1e-6)


def test_half_precision_is_read():
    x = np.random.default_rng(0).standard_normal((3, 8)).astype(np.float16)
    assert IndexMetric("cosine").prepare(x).dtype == np.float32


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: IndexMetric("dcor"), "which no index can hold"),
        (lambda: IndexMetric("hamming"), "metric is 'hamming'; allowed: correlation"),
        (lambda: IndexMetric().prepare(np.ones(3)), "allowed: floating point"),
        (lambda: IndexMetric().prepare(np.ones((2, 3), int)), "allowed: floating point"),
        (lambda: IndexMetric().prepare(np.array([[1.0, 2.0], [np.inf, 0.0]])), "vector 1 holds NaN"),
    ],
)
def test_what_cannot_be(call, words):
    with pytest.raises(InputError, match=words):
        call()


def test_product_codes_need_256_vectors():
    pytest.importorskip("faiss")
    vectors = np.random.default_rng(0).standard_normal((256, 16)).astype(np.float32)
    plan = IndexPlan("ivf-pq", IndexMetric())
    assert make(plan, 256, 16, lambda count: vectors).is_trained
    with pytest.raises(InputError, match="255 vectors cannot train ivf-pq, which takes 256 or more"):
        make(plan, 255, 16, lambda count: vectors[:255])
