"""bf16x3 for OpenVINO, on CPUs with bf16 matrix units: each float32 product is computed as three bf16 products.

A float32 is nearly the sum of two bf16 numbers, ``x = hi(x) + lo(x)``, and so

    x w = hi(x) hi(w) + lo(x) hi(w) + hi(x) lo(w) + lo(x) lo(w),

whose last term is below float32's own rounding error in a sum of many (Henry, Tang & Heinecke, "Leveraging the
bfloat16 Artificial Intelligence Datatype For Higher-Precision Computations", 2019; XLA calls it ``BF16_BF16_F32_X3``).
The three products are done as one: inputs ``[hi, lo, hi]`` and weights ``[hi, hi, lo]`` are concatenated along the axis
that is summed over, and the sum is in float32. Matrix units multiply bf16 six times as fast as vector units multiply
float32, so three such products take less time than one float32 product.

OpenVINO has no such mode. So the network is rewritten, with static shapes, and compiled in bf16, with everything but
the products marked to stay float32. A mark is lost when one of OpenVINO's own passes replaces the node. Therefore
`split_products` first does what those passes would do, and `check_kept` checks the result. Inside attention, which
OpenVINO fuses, only the softmax's weights are rounded to bf16: their errors, of 2^-9 at most, average out over the
keys.
"""

from __future__ import annotations

import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from difftap.artifacts.files import output_errors
from difftap.errors import BackendError, first_line

if TYPE_CHECKING:
    from openvino import CompiledModel, Core, Model, Node, Output

__all__ = ["ROUNDED", "check_kept", "keep_float32", "split_products"]


ROUNDED = "bf16x3 high"
"""Prefix of the names of the nodes that are meant to round to bf16."""

_LARGE = 4096
"""Constants with at least this many numbers are weights: they are not written to the temporary file."""


def keep_float32(core: Core, model: Model, products: set[str]) -> Model:
    """Mark all nodes of a model except its products, so that OpenVINO keeps their types.

    Args:
        core: reads the marked model.
        model: is changed, and must not be used afterwards.
        products: names of the nodes that are not marked.

    Raises:
        BackendError: OpenVINO does not read its own file back correctly.
        OutputError: the temporary file cannot be written.
    """
    import openvino
    import openvino.opset13

    # OpenVINO's Python API cannot set the mark, but its file format has it. So the model goes through a file. Its
    # weights, gigabytes, are replaced by inputs meanwhile.
    inputs = len(model.get_parameters())
    weights: dict[str, Node] = {}
    for node in model.get_ordered_ops():
        if node.get_type_name() == "Constant" and np.prod(node.get_output_shape(0), dtype=np.int64) >= _LARGE:
            name = f"weight {len(weights)}"
            place = openvino.opset13.parameter(list(node.get_output_shape(0)), node.get_element_type(), name=name)
            for target in node.output(0).get_target_inputs():
                target.replace_source_output(place.output(0))
            model.add_parameters([place])
            weights[name] = node
    made = _through_file(core, model, products)
    for place in list(made.get_parameters()):
        weight = weights.get(place.get_friendly_name())
        if weight is not None:
            for target in place.output(0).get_target_inputs():
                target.replace_source_output(weight.output(0))
            made.remove_parameter(place)
    if len(made.get_parameters()) != inputs:
        raise BackendError("this version of OpenVINO does not read back the file that it wrote; use --precision fp32")
    return made


def _through_file(core: Core, model: Model, products: set[str]) -> Model:
    """Write a model to a file, add the marks to it, and read it again."""
    import openvino

    with output_errors(Path(tempfile.gettempdir())), tempfile.TemporaryDirectory(prefix="difftap-") as folder:
        path = Path(folder) / "model.xml"
        openvino.save_model(model, path, compress_to_fp16=False)
        tree = ET.parse(path)  # noqa: S314 - written a line above
        for layer in tree.getroot().findall("layers/layer"):
            if layer.get("name") in products or layer.get("type") == "Result":
                continue
            notes = layer.find("rt_info")
            if notes is None:
                notes = ET.Element("rt_info")
                layer.insert(1 if layer.find("data") is not None else 0, notes)
            ET.SubElement(notes, "attribute", name="precise", version="0")
        tree.write(path)
        return core.read_model(path, config={"ENABLE_MMAP": False})  # the file is gone when this returns


def check_kept(compiled: CompiledModel, name: str) -> None:
    """Make sure that no node outputs bf16 except those that are meant to.

    The inputs of products are not checked: they are meant to be bf16.

    Args:
        compiled: the compiled result of `split_products`.
        name: the network's name, for the message.

    Raises:
        BackendError: this version of OpenVINO rounds another node to bf16.
    """
    for node in compiled.get_runtime_model().get_ordered_ops():
        about = node.get_rt_info()
        kind, precisions = (about[key].astype(str) for key in ("layerType", "outputPrecisions"))
        found = node.get_friendly_name()
        if "bf16" in precisions.split(",") and kind != "Reorder" and not found.startswith(ROUNDED):
            raise BackendError(
                f"this version of OpenVINO rounds '{found}' ({kind}) of {name} to bf16, which "
                "bf16x3 forbids; use --precision fp32, or another version of OpenVINO"
            )


def split_products(core: Core, model: Model) -> Model:
    """Rewrite a network so that, compiled in bf16, it computes nearly what it computes in float32.

    Args:
        core: reads the rewritten model.
        model: has static shapes; is changed, and must not be used afterwards.

    Returns:
        the rewritten model.

    Raises:
        BackendError: it holds attention of a kind that cannot be rewritten.
        OutputError: a temporary file cannot be written.
    """
    try:
        # Reshapes are joined again at the end: taking the factors out of attention brings further ones together.
        for rewrite in (_join_reshapes, _use_gathers, _drop_ones, _split_attention, _join_reshapes):
            rewrite(model)
        _fence_silu(model)
        products = _split_weighted(model)
        model.validate_nodes_and_infer_types()
    except BackendError:
        raise
    except Exception as error:  # a node of a form that is not known
        raise BackendError(f"bf16x3 cannot rewrite the network: {first_line(error)}; use --precision fp32") from error
    return keep_float32(core, model, products)


def _ops() -> ModuleType:
    import openvino.opset13

    ops: ModuleType = openvino.opset13
    return ops


def _floats(model: Model, *kinds: str) -> Iterable[Node]:
    """List the nodes of some kinds that output float32."""
    import openvino

    for node in model.get_ordered_ops():
        if node.get_type_name() in kinds and node.get_output_element_type(0) == openvino.Type.f32:
            yield node


def _indices(values: ArrayLike) -> Node:
    return _ops().constant(np.array(values, np.int64))


def _constant(value: Output) -> NDArray[np.generic] | None:
    """Give a value's numbers if it is a constant; else None."""
    node = value.get_node()
    return node.data if node.get_type_name() == "Constant" else None


def _fixed(value: Output) -> bool:
    """Tell whether a value is a weight: a constant, with only changes of type and layout after it."""
    node = value.get_node()
    while node.get_type_name() in ("Convert", "Reshape", "Transpose"):
        node = node.input_value(0).get_node()
    return bool(node.get_type_name() == "Constant")


def _split(value: Output, axis: int, parts: str) -> Node:
    """Concatenate the high and low parts of a value along an axis.

    Args:
        value: float32.
        axis: the axis that a product sums over.
        parts: the order of the parts: a text of ``h`` and ``l``.
    """
    import openvino

    ops = _ops()
    short = ops.convert(value, openvino.Type.bf16)
    short.set_friendly_name(f"{ROUNDED} {short.get_name()}")
    high = ops.convert(short, openvino.Type.f32)
    low = ops.subtract(value, high)
    return ops.concat([high if part == "h" else low for part in parts], axis)


def _fence(value: Output) -> Node:
    """Add an operation that changes no finite number: OpenVINO fuses it to a product, whose output then is float32.

    Values that are not finite stay so (NaN becomes minus infinity), so that they are still found in the outputs.
    """
    return _ops().clamp(value, -np.inf, np.inf)


def _until_done(step: Callable[[Model], bool], model: Model) -> None:
    """Repeat a step until it changes nothing."""
    while step(model):
        pass


def _join_reshapes(model: Model) -> None:
    """Replace chains of reshapes, and transpositions that move no data, by one reshape to a constant shape."""
    _until_done(_join_some, model)


def _join_some(model: Model) -> bool:
    """Join a reshape with the one before it, wherever that can be done; tell whether anything was changed."""
    changed = False
    for node in _floats(model, "Reshape", "Unsqueeze", "Squeeze", "Transpose"):
        source, shape = node.input_value(0), list(node.get_output_shape(0))
        if _fixed(source):
            continue
        if node.get_type_name() == "Transpose":
            sizes, order = list(source.get_shape()), _constant(node.input_value(1))
            if order is None or order.size != len(sizes):
                continue
            moved = [int(axis) for axis in order if sizes[int(axis)] != 1]
            if moved != sorted(moved):  # axes longer than 1 change places, so numbers move
                continue
        follows = source.get_node().get_type_name() == "Reshape"
        plain = node.get_type_name() == "Reshape" and _constant(node.input_value(1)) is not None
        if plain and not follows:
            continue
        if follows:
            source = source.get_node().input_value(0)
        if list(source.get_shape()) != shape:
            source = _ops().reshape(source, _indices(shape), False).output(0)
        node.output(0).replace(source)
        changed = True
    return changed


def _use_gathers(model: Model) -> None:
    """Replace nodes that copy (nearest resize, broadcast, slice) by gathers.

    OpenVINO would replace those nodes by others, without the mark. It leaves gathers as they are.
    """
    ops = _ops()
    for node in _floats(model, "Interpolate", "Broadcast", "Slice"):
        value = node.input_value(0)
        have, want = list(value.get_shape()), list(node.get_output_shape(0))
        axes = [axis for axis, (old, new) in enumerate(zip(have, want, strict=False)) if old != new]
        if len(have) != len(want) or not axes:
            continue
        taken: dict[int, NDArray[np.int64] | None] = dict.fromkeys(axes)
        for axis in axes:
            if node.get_type_name() == "Slice":
                taken[axis] = _sliced(node, have[axis], want[axis]) if len(axes) == 1 else None
            elif node.get_type_name() == "Broadcast" or _nearest(node, have[axis], want[axis]):
                taken[axis] = np.arange(want[axis]) * have[axis] // want[axis]
        known = {axis: rows for axis, rows in taken.items() if rows is not None}
        if len(known) < len(taken):
            continue  # left as it is: `check_kept` finds out whether that loses precision
        for axis, rows in known.items():
            value = ops.gather(value, _indices(rows), _indices(axis)).output(0)
        node.output(0).replace(value)


def _sliced(node: Node, have: int, want: int) -> NDArray[np.int64] | None:
    """List the rows that a slice along one axis takes; None if its step is not 1 or it is not constant."""
    start, step = _constant(node.input_value(1)), _constant(node.input_value(3))
    if start is None or step is None or start.size != 1 or step.size != 1 or int(step.reshape(-1)[0]) != 1:
        return None
    first = int(start.reshape(-1)[0])
    return np.arange(want) + (max(first + have, 0) if first < 0 else first)


def _nearest(node: Node, have: int, want: int) -> bool:
    """Tell whether an interpolation repeats each cell a whole number of times."""
    about = node.get_attributes()
    return (
        want % have == 0
        and about["mode"] == "nearest"
        and (about["coordinate_transformation_mode"], about["nearest_mode"]) == ("asymmetric", "floor")
    )


def _drop_ones(model: Model) -> None:
    """Remove multiplications by one: between a product and its bias, they would hide the bias."""
    for node in _floats(model, "Multiply"):
        for number in (0, 1):
            factor = _constant(node.input_value(number))
            same = list(node.input_value(1 - number).get_shape()) == list(node.get_output_shape(0))
            if factor is not None and factor.size == 1 and factor.reshape(-1)[0] == 1 and same:
                node.output(0).replace(node.input_value(1 - number))
                break


def _split_attention(model: Model) -> None:
    """Split attention's two products, which OpenVINO fuses with the softmax between them and computes in bf16.

    Queries and keys are split in three parts, as weights are. The values are split in two and the results added, so
    only the softmax's weights are rounded.
    """
    ops = _ops()
    for softmax in list(_floats(model, "Softmax")):
        product = softmax.input_value(0).get_node()
        users = [target.get_node() for target in softmax.output(0).get_target_inputs()]
        if not _plain_attention(softmax, product, users):
            raise BackendError(
                f"bf16x3 does not know the attention around '{softmax.get_friendly_name()}'; use --precision fp32"
            )
        # Factors of queries and keys are applied after their product: OpenVINO would move them to where their result
        # is rounded.
        scale = np.float32(1)
        for number in (0, 1):
            scale *= _take_factor(product.input_value(number))
        query, key = product.input_value(0), product.input_value(1)
        last = len(query.get_shape()) - 1
        turned = product.get_attributes()["transpose_b"]
        scores = ops.matmul(_split(query, last, "hlh"), _split(key, last if turned else last - 1, "hhl"), False, turned)
        softmax.input(0).replace_source_output(ops.multiply(_fence(scores), ops.constant(scale)).output(0))
        values = users[0].input_value(1)
        width = values.get_shape()[last]
        both = ops.matmul(softmax.output(0), _split(values, last, "hl"), False, False)
        parts = ops.variadic_split(both, _indices(last), _indices([width, width]))
        users[0].output(0).replace(ops.add(parts.output(0), parts.output(1)).output(0))


def _plain_attention(softmax: Node, product: Node, users: Sequence[Node]) -> bool:
    """Tell whether this is softmax(Q K^T) V over the last axis, without a mask."""
    if [node.get_type_name() for node in (product, *users)] != ["MatMul", "MatMul"]:
        return False
    first, second = product.get_attributes(), users[0].get_attributes()
    last = len(softmax.get_output_shape(0)) - 1
    ranks = [len(value.get_shape()) for node in (product, users[0]) for value in node.input_values()]
    return (
        softmax.get_attributes()["axis"] in (-1, last)
        and users[0].input_value(0).get_node() == softmax
        and not (first["transpose_a"] or second["transpose_a"] or second["transpose_b"])
        and ranks == [last + 1] * 4
        and len(product.output(0).get_target_inputs()) == 1
    )


def _take_factor(value: Output) -> np.float32:
    """Remove the scalar factor of a value, looking through changes of layout; give the factor, 1 if there is none.

    A factor stays if other nodes read the multiplied value too.
    """
    while value.get_node().get_type_name() in ("Transpose", "Reshape") and len(value.get_target_inputs()) == 1:
        value = value.get_node().input_value(0)
    node = value.get_node()
    if node.get_type_name() != "Multiply" or len(value.get_target_inputs()) != 1:
        return np.float32(1)
    factor = _constant(node.input_value(1))
    if factor is None or factor.size != 1:
        return np.float32(1)
    node.output(0).replace(node.input_value(0))
    return np.float32(factor.reshape(-1)[0])


def _fence_silu(model: Model) -> None:
    """Put a fence after each SiLU (x sigmoid(x)) that follows a bias.

    OpenVINO may fuse a SiLU to the product before it, whose output would then be bf16.
    """
    for sigmoid in list(_floats(model, "Sigmoid")):
        if sigmoid.input_value(0).get_node().get_type_name() != "Add":
            continue
        for target in list(sigmoid.output(0).get_target_inputs()):
            node = target.get_node()
            if node.get_type_name() == "Multiply":
                users = list(node.output(0).get_target_inputs())  # before the fence becomes one of them
                fence = _fence(node.output(0))
                # A tap may be this very tensor: the output's name moves to the fence.
                names = node.output(0).get_names()
                node.output(0).set_names(set())
                fence.output(0).set_names(names)
                for user in users:
                    user.replace_source_output(fence.output(0))


def _split_weighted(model: Model) -> set[str]:
    """Split convolutions and matrix products with weights; give the names of the nodes that replace them."""
    ops = _ops()
    names = set()
    for node in list(_floats(model, "Convolution", "MatMul")):
        value, weight = node.input_value(0), node.input_value(1)
        if not _fixed(weight) or _fixed(value):
            continue
        about = node.get_attributes()
        if node.get_type_name() == "Convolution":
            geometry = (about[key] for key in ("strides", "pads_begin", "pads_end", "dilations"))
            made = ops.convolution(_split(value, 1, "hlh"), _split(weight, 1, "hhl"), *geometry)
        else:
            last = len(value.get_shape()) - 1
            if about["transpose_a"]:
                value = ops.transpose(value, _indices([*range(last - 1), last, last - 1])).output(0)
            summed = len(weight.get_shape()) - (1 if about["transpose_b"] else 2)  # the weight's axis of the sum
            made = ops.matmul(_split(value, last, "hlh"), _split(weight, summed, "hhl"), False, about["transpose_b"])
        made.set_friendly_name(f"{node.get_friendly_name()}.bf16x3")
        names.add(made.get_friendly_name())
        end, made = _with_bias(node, made)
        end.output(0).replace(_fence(made).output(0))
    return names


def _with_bias(node: Node, made: Node) -> tuple[Node, Node]:
    """Take along a product's bias, if it has one.

    Args:
        node: the old product.
        made: the new product.

    Returns:
        the node to replace (the old product, or the addition of its bias), and the new node in its place.
    """
    users = [target.get_node() for target in node.output(0).get_target_inputs()]
    if len(users) == 1 and users[0].get_type_name() == "Add":
        same = list(users[0].get_output_shape(0)) == list(node.get_output_shape(0))
        for number in (0, 1):
            if same and _fixed(users[0].input_value(number)) and _by_channel(node, users[0].input_value(number)):
                return users[0], _ops().add(made, users[0].input_value(number))
    return node, made


def _by_channel(node: Node, value: Output) -> bool:
    """Tell whether a value has one number for each output channel of a product."""
    have, want = list(value.get_shape()), list(node.get_output_shape(0))
    axis = 1 if node.get_type_name() == "Convolution" else len(want) - 1
    have = [1] * (len(want) - len(have)) + have
    return have == [size if number == axis else 1 for number, size in enumerate(want)]
