"""Attention as one operator, for onnxruntime: its MultiHeadAttention never writes the table (heads, cells, cells).

In the exported graph attention is many operators: queries and keys are each multiplied by the fourth root of 1/d, then
come their product, softmax, and the product with the values; heads are split before and joined after. Where exactly
this pattern is found it is replaced; any other is left as it is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import onnx

__all__ = ["MAX_HEAD", "fuse_attention"]

MAX_HEAD = 256
"""Largest width d of a head for which onnxruntime has fused kernels on a GPU. The VAE's one head, of 512, is wider."""
_DOMAIN = "com.microsoft"  # onnxruntime's own operators


def fuse_attention(proto: onnx.ModelProto) -> tuple[onnx.ModelProto, int, int]:
    """Replace every attention that is recognised by one operator.

    Args:
        proto: a graph made by `difftap.export.trace.trace`; it is not changed.

    Returns:
        the new graph, the number of attentions that were replaced, and the number of softmaxes.
    """
    import onnx

    new = onnx.ModelProto()
    new.CopyFrom(proto)
    made_by = {name: node for node in new.graph.node for name in node.output}
    softmaxes = [node for node in new.graph.node if node.op_type == "Softmax"]
    fused: dict[str, onnx.NodeProto] = {}
    for softmax in softmaxes:
        found = _recognise(new, softmax, made_by)
        if found is None:
            continue
        query, key, value, heads, joined = found
        fused[joined] = onnx.helper.make_node(
            "MultiHeadAttention",
            [query, key, value],
            [joined],
            name=f"{joined}.attention",
            domain=_DOMAIN,
            num_heads=heads,
        )
    # The new operator stands where the joining reshape stood, so its inputs come before it. The old operators of
    # attention then feed nothing, and go.
    nodes = [fused.get(node.output[0], node) for node in new.graph.node]
    del new.graph.node[:]
    new.graph.node.extend(_alive(nodes, {value.name for value in new.graph.output}))
    used = {name for node in new.graph.node for name in node.input}
    kept = [tensor for tensor in new.graph.initializer if tensor.name in used]
    del new.graph.initializer[:]
    new.graph.initializer.extend(kept)
    if fused:
        new.opset_import.append(onnx.helper.make_opsetid(_DOMAIN, 1))
    return new, len(fused), len(softmaxes)


def _recognise(
    proto: onnx.ModelProto, softmax: onnx.NodeProto, made_by: dict[str, onnx.NodeProto]
) -> tuple[str, str, str, int, str] | None:
    """Recognise the attention around a softmax.

    Returns:
        names of query, key and value, each ``(B, tokens, heads * d)``; number of heads; name of the joined result. None
        if the pattern is another.
    """

    def up(name: str, *kinds: str) -> str | None:
        """Follow first inputs up through operators of these kinds; None if an operator is of another kind."""
        for kind in kinds:
            node = made_by.get(name)
            if node is None or node.op_type != kind:
                return None
            name = node.input[0]
        return name

    logits = made_by.get(softmax.input[0])
    product = _only_reader(proto, softmax.output[0], "MatMul")
    if logits is None or logits.op_type != "MatMul" or product is None or product.input[0] != softmax.output[0]:
        return None
    query = up(logits.input[0], "Mul", "Transpose", "Reshape")
    key = up(logits.input[1], "Mul", "Reshape", "Transpose", "Reshape", "Transpose", "Reshape")
    value = up(product.input[1], "Transpose", "Reshape")
    turned = _only_reader(proto, product.output[0], "Transpose")
    joined = None if turned is None else _only_reader(proto, turned.output[0], "Reshape")
    if query is None or key is None or value is None or joined is None:
        return None
    # The operator scales queries and keys alike, so their factors must be one and the same.
    scale = _constant(proto, made_by[logits.input[0]].input[1])
    width = _width(proto, query, made_by)
    if scale is None or width is None or made_by[logits.input[1]].input[1] != made_by[logits.input[0]].input[1]:
        return None
    head = round(scale**-4)  # the scale is d^(-1/4)
    if head > MAX_HEAD or width % head or abs(head**-0.25 - scale) > 1e-5:
        return None
    return query, key, value, width // head, joined.output[0]


def _only_reader(proto: onnx.ModelProto, name: str, kind: str) -> onnx.NodeProto | None:
    """Find the node that reads a tensor; None if several do, or if it is of another kind."""
    found = [node for node in proto.graph.node if name in node.input]
    return found[0] if len(found) == 1 and found[0].op_type == kind else None


def _constant(proto: onnx.ModelProto, name: str) -> float | None:
    """Read a constant of one number; None if it is not one."""
    from onnx import numpy_helper

    for tensor in proto.graph.initializer:
        if tensor.name == name and not tensor.external_data:
            values = numpy_helper.to_array(tensor)
            return float(np.ravel(values)[0]) if values.size == 1 else None
    return None


def _width(proto: onnx.ModelProto, name: str, made_by: dict[str, onnx.NodeProto]) -> int | None:
    """Count the outputs of the linear layer that gives a tensor; None if it is no linear layer.

    The layer is a product with a weight ``(out, in)``, transposed, and perhaps cast; and perhaps a bias.
    """
    node = made_by.get(name)
    if node is not None and node.op_type == "Add":
        node = made_by.get(node.input[0])
    weight = made_by.get(node.input[1]) if node is not None and node.op_type == "MatMul" else None
    while weight is not None and weight.op_type in ("Transpose", "Cast"):
        name, weight = weight.input[0], made_by.get(weight.input[0])
    return next((int(t.dims[0]) for t in proto.graph.initializer if t.name == name and len(t.dims) == 2), None)


def _alive(nodes: list[onnx.NodeProto], wanted: set[str]) -> list[onnx.NodeProto]:
    """List the nodes that the outputs ``wanted`` depend on, in their order."""
    kept = []
    for node in reversed(nodes):
        if wanted & set(node.output):
            wanted |= set(node.input)
            kept.append(node)
    return kept[::-1]
