"""All pairs in blocks against one pair at a time, in plain float64."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from difftap.errors import InputError
from difftap.retrieval.distances import METRICS, _tile_side, _tiles, blocks, pairwise

LIMITS = {"euclidean": 1e-5, "manhattan": 2e-5, "cosine": 2e-7, "correlation": 2e-7, "dcor": 1e-5}
SMALL = 1 << 13  # bytes: tiles of a few vectors


def centred(x):
    """The double-centred matrix of distances, as the paper writes it."""
    a = np.abs(x[:, None] - x[None, :])
    return a - a.mean(axis=0) - a.mean(axis=1)[:, None] + a.mean()


def slow(x, y, metric):
    """One distance, from its definition."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if metric == "euclidean":
        return np.sqrt(np.sum((x - y) ** 2))
    if metric == "manhattan":
        return np.sum(np.abs(x - y))
    if metric == "dcor":
        a, b = centred(x), centred(y)
        variances = (a * a).mean() * (b * b).mean()
        return 1 - np.sqrt((a * b).mean() / np.sqrt(variances)) if variances > 0 else 1.0
    if metric == "correlation":
        x, y = x - x.mean(), y - y.mean()
    lengths = np.linalg.norm(x) * np.linalg.norm(y)
    return 1 - x @ y / lengths if lengths > 0 else 1.0


def slow_table(x, y, metric):
    return np.array([[slow(a, b, metric) for b in y] for a in x]).reshape(len(x), len(y))


def vectors(count, dimensions, seed=0):
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((count, dimensions)) + rng.standard_normal(dimensions)).astype(np.float32)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("room", [1, SMALL, 256 << 20])
def test_every_pair(metric, room):
    x, y = vectors(23, 17), vectors(9, 17, 1)
    limit = LIMITS[metric]
    between = pairwise(x, y, metric=metric, block_bytes=room)
    assert between.dtype == np.float32
    np.testing.assert_allclose(between, slow_table(x, y, metric), atol=limit, rtol=1e-6)
    within = pairwise(x, metric=metric, block_bytes=room)
    np.testing.assert_allclose(within, slow_table(x, x, metric), atol=limit, rtol=1e-6)
    assert (np.diag(within) == 0).all()
    np.testing.assert_array_equal(within, within.T)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("other", [None, 5])
def test_blocks_cover_the_table_once(metric, other):
    x = vectors(31, 6)
    y = None if other is None else vectors(other, 6, 1)
    seen = np.zeros((31, other or 31), int)
    for rows, columns, block in blocks(x, y, metric=metric, block_bytes=SMALL):
        assert block.shape == (rows.stop - rows.start, columns.stop - columns.start)
        assert block.dtype == np.float32
        seen[rows, columns] += 1
    assert (seen == 1).all()


@settings(max_examples=60, deadline=None)
@given(data=st.data(), metric=st.sampled_from(METRICS))
def test_laws(data, metric):
    count, dimensions = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 8))
    numbers = st.integers(-9, 9).map(lambda n: n / 4)
    rows = data.draw(st.lists(st.lists(numbers, min_size=dimensions, max_size=dimensions), min_size=1, max_size=count))
    x = np.array(rows, np.float32)
    table = pairwise(x, metric=metric, block_bytes=data.draw(st.sampled_from([1, 4096, 1 << 28])))
    assert (table >= 0).all()
    np.testing.assert_allclose(table, slow_table(x, x, metric), atol=1e-4)
    if metric in ("euclidean", "manhattan"):
        for i, j, k in itertools.product(range(len(x)), repeat=3):
            assert table[i, j] <= table[i, k] + table[k, j] + 1e-4
    if metric in ("correlation", "dcor"):  # neither shift nor scale matters
        np.testing.assert_allclose(pairwise(x * 3 + 7, metric=metric), table, atol=1e-4)


@pytest.mark.parametrize("metric", ["cosine", "correlation", "dcor"])
def test_vectors_without_direction_are_at_one_from_all(metric):
    x = vectors(4, 8)
    x[2] = 0.0 if metric == "cosine" else 0.1
    table = pairwise(x, metric=metric)
    assert (table[2] == 1).all()
    assert (table[:, 2] == 1).all()


def test_dcor_by_hand():
    # x = (0, 1): A = [[-1/2, 1/2], [1/2, -1/2]], so any two vectors of two channels have correlation 1.
    assert pairwise(np.array([[0.0, 1.0], [5.0, -2.0]]), metric="dcor")[0, 1] == pytest.approx(0, abs=1e-6)
    # A factorial design is independent: distance covariance 0, where float32 alone would leave 1e-4.
    design = np.array([[0.0, 0.0, 1.0, 1.0], [0.0, 1.0, 0.0, 1.0]])
    assert pairwise(design, metric="dcor")[0, 1] == pytest.approx(1, abs=1e-6)


@pytest.mark.slow  # importing the package compiles it
def test_dcor_is_that_of_the_dcor_package():
    dcor = pytest.importorskip("dcor")
    x = vectors(6, 1280).astype(np.float64)
    x[1] = x[0] ** 2
    x[2] = x[0] + 0.1 * x[3]
    options = {"method": "naive", "compile_mode": dcor.CompileMode.NO_COMPILE}
    theirs = [[1 - dcor.distance_correlation(a, b, **options) for b in x] for a in x]
    np.testing.assert_allclose(pairwise(x, metric="dcor"), theirs, atol=1e-6)


@pytest.mark.parametrize(
    ("metric", "name"),
    [("euclidean", "euclidean"), ("manhattan", "cityblock"), ("cosine", "cosine"), ("correlation", "correlation")],
)
def test_scipy_says_the_same(metric, name):
    spatial = pytest.importorskip("scipy.spatial.distance")
    x, y = vectors(40, 64), vectors(20, 64, 1)
    np.testing.assert_allclose(pairwise(x, y, metric=metric), spatial.cdist(x, y, name), rtol=1e-5, atol=1e-6)


def test_long_vectors_that_nearly_agree():
    x = 1e4 + vectors(3, 32) * 1e-2
    x[2] = x[1]
    far = np.concatenate([x, -x]).astype(np.float64)
    np.testing.assert_allclose(pairwise(far, metric="euclidean"), slow_table(far, far, "euclidean"), rtol=1e-5)


@pytest.mark.parametrize("metric", METRICS)
def test_torch_gives_the_same(metric):
    torch = pytest.importorskip("torch")
    x, y = vectors(23, 17), vectors(9, 17, 1)
    table = np.zeros((23, 9), np.float32)
    for rows, columns, block in _tiles(x, y, metric, SMALL, torch, "cpu"):
        table[rows, columns] = block
    np.testing.assert_allclose(table, pairwise(x, y, metric=metric), atol=1e-5)
    ((_, _, block),) = _tiles(x, None, metric, 1 << 28, torch, "cpu")
    np.testing.assert_allclose(block, pairwise(x, metric=metric), atol=1e-5)


@pytest.mark.parametrize("metric", METRICS)
def test_memory_stays_within_the_room(metric):
    import tracemalloc

    x, y = vectors(150, 64), vectors(150, 64, 1)
    room = 1 << 19
    for _ in blocks(x[:50], y[:50], metric=metric, block_bytes=room):
        pass
    tracemalloc.start()
    for _ in blocks(x, y, metric=metric, block_bytes=room):
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.1 * room


def test_the_side_of_a_tile():
    for metric in METRICS:
        assert _tile_side(1280, 1, metric) == 1
        assert _tile_side(8, 1 << 40, metric) == 4096


@pytest.mark.parametrize("metric", METRICS)
def test_memory_mapped_and_half_precision(metric, tmp_path):
    x = vectors(12, 16).astype(np.float16)
    np.save(tmp_path / "x.npy", x)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    np.testing.assert_allclose(
        pairwise(mapped, metric=metric), pairwise(x.astype(np.float64), metric=metric), atol=1e-4
    )


def test_nothing_in_nothing_out():
    empty = np.zeros((0, 4), np.float32)
    assert pairwise(empty, metric="cosine").shape == (0, 0)
    assert pairwise(empty, vectors(3, 4), metric="dcor").shape == (0, 3)
    assert pairwise(vectors(3, 4), empty, metric="euclidean").shape == (3, 0)


@pytest.mark.parametrize(
    ("x", "y", "options", "words"),
    [
        (np.ones((2, 3)), None, {"metric": "chebyshev"}, "metric is 'chebyshev'; allowed: euclidean"),
        (np.ones(3), None, {"metric": "cosine"}, "shape"),
        (np.ones((2, 0)), None, {"metric": "cosine"}, "shape"),
        (np.ones((2, 3)), np.ones((2, 4)), {"metric": "cosine"}, r"\(2, 3\) and \(2, 4\)"),
        (np.array([["a"]]), None, {"metric": "cosine"}, "real numbers"),
        (np.array([[1.0], [np.nan]]), None, {"metric": "manhattan"}, "vector 1 holds NaN"),
        (np.ones((2, 3)), None, {"metric": "dcor", "block_bytes": 0}, "block_bytes is 0"),
        (np.ones((2, 3)), None, {"metric": "dcor", "device": "tpu"}, "device is 'tpu'; allowed: cpu, cuda"),
    ],
)
def test_what_cannot_be_used(x, y, options, words):
    with pytest.raises(InputError, match=words):
        pairwise(x, y, **options)
