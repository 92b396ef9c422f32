"""Maps come back as near as their encoding promises, and the fidelity that is stored says how near."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from difftap.errors import InputError
from difftap.features.store import Encoding, Fidelity
from difftap.features.store.encoding import Moments

MAPS = arrays.arrays(
    np.float32, st.tuples(*[st.integers(1, 5)] * 3), elements=st.floats(-60000, 60000, width=32, allow_subnormal=False)
)


@settings(deadline=None)
@given(MAPS)
def test_float32_is_exact(data):
    encoding = Encoding("float32")
    assert (encoding.decode(encoding.encode(data)) == data).all()


@settings(deadline=None)
@given(MAPS)
def test_float16_is_within_half_a_step(data):
    encoding = Encoding()
    got = encoding.decode(encoding.encode(data))
    assert (np.abs(got - data) <= np.maximum(np.abs(data) * 2.0**-11, 2.0**-25)).all()


def test_a_large_map_is_rounded_as_numpy_rounds_it():
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
    halves = halves[np.abs(halves) < 65504]  # every number that half precision has, subnormal ones too
    between = (halves[:-1] + halves[1:]) / 2
    near = np.nextafter(between, np.inf)
    data = np.concatenate([halves, between, near, -near]).astype(np.float32)
    data = data[: len(data) // 8 * 8].reshape(8, -1, 1)
    with np.errstate(over="ignore"):
        want = data.astype(np.float16)
    stored = Encoding().encode(data)
    assert stored.values.dtype == np.float16
    assert (stored.values.view(np.uint16) == want.view(np.uint16)).all()


@pytest.mark.parametrize("shape", [(3, 2, 2), (64, 40, 40)])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_is_refused(shape, value):
    data = np.zeros(shape, np.float32)
    data[1, 1, 1] = value
    with pytest.raises(InputError, match="float16 holds up to"):
        Encoding().encode(data)


@settings(deadline=None)
@given(MAPS, st.sampled_from(["channel", "map"]))
def test_int8_is_within_half_a_scale(data, scale):
    encoding = Encoding("int8", scale)
    stored = encoding.encode(data)
    assert stored.values.dtype == np.int8
    assert stored.scale.shape == (len(data) if scale == "channel" else 1,)
    bound = 0.5001 * stored.scale.reshape(-1, 1, 1).astype(float) + 1e-37
    assert (np.abs(encoding.decode(stored).astype(float) - data) <= bound).all()


@pytest.mark.parametrize("value", [70000.0, -1e9])
def test_what_float16_cannot_hold_is_refused(value):
    data = np.zeros((2, 2, 2), np.float32)
    data[1, 0, 1] = value
    with pytest.raises(InputError, match=r"float16 holds up to 65504.*float32"):
        Encoding().encode(data)


@pytest.mark.parametrize("options", [{"dtype": "float64"}, {"scale": "row"}, {"pca": 0}])
def test_a_wrong_encoding_is_refused(options):
    with pytest.raises(InputError, match="allowed"):
        Encoding(**options)


def test_a_basis_is_that_of_a_plain_svd():
    stream = np.random.default_rng(0)
    maps = [
        (stream.standard_normal((6, 1, 1)) * np.arange(1, 7)[:, None, None]).astype(np.float32)
        + stream.standard_normal((6, 4, 5)).astype(np.float32)
        for _ in range(9)
    ]
    moments = Moments()
    for one in maps:
        moments.add(one)
    basis = moments.basis(3)
    cells = np.concatenate([one.reshape(6, -1) for one in maps], axis=1).astype(float)
    centred = cells - cells.mean(axis=1, keepdims=True)
    left, values, _ = np.linalg.svd(centred, full_matrices=False)
    assert np.allclose(np.abs(left[:, :3].T @ basis.components.T), np.eye(3), atol=1e-5)
    assert basis.share == pytest.approx((values[:3] ** 2).sum() / (values**2).sum())
    assert np.allclose(basis.components @ basis.components.T, np.eye(3), atol=1e-6)
    # Of the two signs of a component, the one that makes its largest entry positive.
    assert all(one[np.abs(one).argmax()] > 0 for one in basis.components)


def test_all_components_give_the_map_back():
    data = np.random.default_rng(1).standard_normal((5, 4, 6)).astype(np.float32)
    moments = Moments()
    moments.add(data)
    encoding = Encoding("float32", pca=5)
    basis = moments.basis(5)
    assert np.allclose(encoding.decode(encoding.encode(data, basis), basis), data, atol=1e-5)
    with pytest.raises(InputError, match="6 components"):
        moments.basis(6)


@settings(deadline=None)
@given(MAPS, MAPS)
def test_fidelity_against_a_loop_over_cells(first, second):
    if first.shape != second.shape:
        second = np.resize(second, first.shape)
    got = Fidelity.measure(first, second)
    cosines = []
    for a, b in zip(
        first.reshape(len(first), -1).T.astype(float), second.reshape(len(second), -1).T.astype(float), strict=True
    ):
        norm = np.sqrt((a * a).sum()) * np.sqrt((b * b).sum())
        cosines.append(1.0 if not a.any() and not b.any() else float(a @ b / norm) if norm else 0.0)
    assert got.cosine == pytest.approx(np.mean(cosines), abs=1e-9)
    assert got.lowest == pytest.approx(min(cosines), abs=1e-9)
    assert Fidelity.measure(first, first).error == 0
    assert got.cosine <= 1 and Fidelity.measure(first, first).lowest <= 1  # rounding has no say
    joined = Fidelity.join([got, Fidelity(1.0, 1.0, 0.0)])
    assert joined.cosine == pytest.approx((got.cosine + 1) / 2)
    assert (joined.lowest, joined.error, joined.maps) == (min(got.lowest, 1.0), got.error, 2)
