"""Three bf16 products are nearly a float32 product; what would be rounded elsewhere is noticed."""

import numpy as np
import pytest

from difftap.engine.bf16x3 import check_kept, split_products
from difftap.errors import BackendError

openvino = pytest.importorskip("openvino")
ops = openvino.opset13
CORE = openvino.Core()

pytestmark = pytest.mark.skipif(
    "BF16" not in CORE.get_property("CPU", "OPTIMIZATION_CAPABILITIES"), reason="this CPU has no bf16"
)


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def give(model, data, hint):
    compiled = CORE.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": hint})
    return compiled, compiled.create_infer_request().infer([data])[0].astype(np.float64)


def error(got, want):
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def convolution(x, bias=True):
    made = ops.convolution(x, ops.constant(numbers(24, 16, 3, 3)), [1, 1], [1, 1], [1, 1], [1, 1])
    return ops.add(made, ops.constant(numbers(1, 24, 1, 1, seed=1))) if bias else made


def silu_and_linear(x):
    inner = ops.matmul(ops.reshape(x, ops.constant([2, 64, 16]), False), ops.constant(numbers(48, 16)), False, True)
    inner = ops.add(inner, ops.constant(numbers(48, seed=1)))
    inner = ops.multiply(inner, ops.sigmoid(inner))
    return ops.matmul(inner, ops.constant(numbers(48, 20)), False, False)


def turned(x):
    flat = ops.reshape(x, ops.constant([2, 16, 64]), False)
    return ops.matmul(flat, ops.constant(numbers(20, 16)), True, True)


def enlarged(x):
    large = ops.interpolate(
        x,
        ops.constant(np.float32([2, 2])),
        "nearest",
        "scales",
        pads_begin=[0],
        pads_end=[0],
        coordinate_transformation_mode="asymmetric",
        nearest_mode="floor",
        axes=ops.constant([2, 3]),
    )
    return convolution(large, bias=False)


def attention(x, mask=False):
    tokens = ops.transpose(ops.reshape(x, ops.constant([2, 16, 64]), False), ops.constant([0, 2, 1]))
    query, key, value = (
        ops.transpose(
            ops.reshape(ops.matmul(tokens, ops.constant(numbers(16, 16, seed=k)), False, False),
                        ops.constant([2, 64, 2, 8]), False),
            ops.constant([0, 2, 1, 3]),
        )
        for k in range(3)
    )  # fmt: skip
    scores = ops.matmul(ops.multiply(query, ops.constant(np.float32(0.35))), key, False, True)
    scores = ops.add(scores, ops.constant(numbers(64, 64))) if mask else scores
    found = ops.matmul(ops.softmax(scores, 3), value, False, False)
    return ops.reshape(ops.transpose(found, ops.constant([0, 2, 1, 3])), ops.constant([2, 64, 16]), False)


def model(build):
    x = ops.parameter([2, 16, 8, 8], np.float32)
    return openvino.Model([build(x)], [x])


@pytest.mark.parametrize(
    ("build", "bound"),
    [
        (convolution, 2e-5),
        (lambda x: convolution(x, bias=False), 2e-5),
        (silu_and_linear, 2e-5),
        (turned, 2e-5),
        (enlarged, 2e-5),
        (attention, 2e-3),  # the softmax's weights are rounded
    ],
    ids=["bias", "plain", "linear", "turned", "enlarged", "attention"],
)
def test_it_is_much_nearer_to_float32_than_bf16_is(build, bound):
    data = numbers(2, 16, 8, 8, seed=5)
    _, want = give(model(build), data, "f32")
    _, rounded = give(model(build), data, "bf16")
    compiled, got = give(split_products(CORE, model(build)), data, "bf16")
    check_kept(compiled, "it")
    assert error(got, want) < bound
    assert error(rounded, want) > max(1e-3, 2 * error(got, want))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_stays_so(value):
    data = numbers(2, 16, 8, 8)
    data[1, 3, 4, 4] = value
    _, got = give(split_products(CORE, model(convolution)), data, "bf16")
    assert not np.isfinite(got[1]).all()
    assert np.isfinite(got[0]).all()


def test_rounding_elsewhere_is_noticed():
    compiled, _ = give(model(silu_and_linear), numbers(2, 16, 8, 8), "bf16")
    with pytest.raises(BackendError, match=r"rounds '.*' \(.*\) of the net to bf16.*--precision fp32"):
        check_kept(compiled, "the net")


def test_unknown_attention_is_refused():
    with pytest.raises(BackendError, match=r"does not know the attention.*--precision fp32"):
        split_products(CORE, model(lambda x: attention(x, mask=True)))


def flipped(x):
    rows = ops.slice(x, ops.constant([7]), ops.constant([-9]), ops.constant([-1]), ops.constant([2]))
    return convolution(rows)


def shifted(x):
    rows = ops.slice(x, ops.constant([-3]), ops.constant([8]), ops.constant([1]), ops.constant([2]))
    return convolution(rows)


def shared_scale(x):
    """Queries and keys are one tensor, scaled once."""
    tokens = ops.transpose(ops.reshape(x, ops.constant([2, 16, 64]), False), ops.constant([0, 2, 1]))
    scaled = ops.multiply(tokens, ops.constant(np.float32(0.3)))
    return ops.matmul(ops.softmax(ops.matmul(scaled, scaled, False, True), 2), tokens, False, False)


def with_position(x):
    """An addend that is no bias."""
    return ops.add(convolution(x, bias=False), ops.constant(numbers(1, 24, 8, 8)))


@pytest.mark.parametrize("build", [flipped, shifted, shared_scale, with_position])
def test_the_rewritten_network_means_the_same(build):
    data = numbers(2, 16, 8, 8, seed=5)
    _, want = give(model(build), data, "f32")
    _, got = give(split_products(CORE, model(build)), data, "f32")
    assert error(got, want) < 2e-5
