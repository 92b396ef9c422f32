"""The half-precision variant of an exported graph, for runtimes that compute in the types that the graph names.

Inputs and outputs stay float32, so an engine is used in the same way. Inside, convolutions, matrix products and what
lies between them are in the half type. Where half precision loses too much, float32 stays, between casts:

- normalisations, because their sums of squares leave fp16's range (65504) long before their results do;
- softmax, because it sums thousands of small numbers;
- the noisy latent, the timestep's sines, and the mean over the ensemble;
- with ``attention="float"``, the attention logits too. The exported graph multiplies queries and keys by the fourth
  root of 1/d each before their product. So logits in half precision overflow only if their true values do, whereas
  Stable Diffusion 2.1 overflows in implementations that scale after the product.

If values overflow nevertheless, the outputs are not finite, and `Engine.run` refuses them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from difftap.errors import BackendError, InputError

if TYPE_CHECKING:
    import onnx

__all__ = ["ATTENTIONS", "HALVES", "narrow", "to_half"]

HALVES = ("fp16", "bf16")
ATTENTIONS = ("half", "softmax", "float")
"""The part of attention that stays in float32: none (fused kernels sum in float32 anyway), softmax, or logits too."""

_ALWAYS_HALF = {"Conv", "ConvTranspose", "MatMul", "Gemm", "MultiHeadAttention"}
_ALWAYS_FLOAT = {"InstanceNormalization", "GroupNormalization", "LayerNormalization", "ReduceMean", "Sin", "Cos", "Exp"}
# The outputs of these are in half precision's range again, so they are cast to it at once.
_NARROWED = {"InstanceNormalization", "GroupNormalization", "LayerNormalization", "Softmax"}


def narrow(values: NDArray[np.float32], kind: str) -> NDArray[np.generic]:
    """Round float32 to a half type, to nearest even.

    Args:
        values: of any shape.
        kind: ``fp16`` or ``bf16``.

    Returns:
        float16; or uint16 with the bits of bf16, for which numpy has no type.
    """
    if kind == "fp16":
        with np.errstate(over="ignore"):  # an infinity is found when the engine runs
            return values.astype(np.float16)
    # bf16 is the upper half of float32's bits. Adding 0x7FFF, and 1 more if the result would be odd, rounds to nearest
    # even. NaN is set apart, since its bits could round to infinity.
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = ((bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    quiet = ((bits >> 16) | 0x40).astype(np.uint16)
    return np.where(np.isnan(values), quiet, rounded)


@dataclass
class _Halver:
    """One pass over the nodes, in their order. It tracks which tensors are in half precision and which casts exist.

    Attributes:
        kind: ONNX's code of the half type.
        floats: names of all float32 tensors of the graph.
        attention: one of `ATTENTIONS`.
        logits: names of the attention logits, and of scaled queries and keys.
        half: names of the tensors that are in half precision so far.
        nodes: the new nodes so far.
        casts: names of existing casts, by the tensor's name and whether they give the half type.
    """

    kind: int
    floats: set[str]
    attention: str
    logits: set[str]
    half: set[str] = field(default_factory=set)
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    casts: dict[tuple[str, bool], str] = field(default_factory=dict)

    def wants_half(self, node: onnx.NodeProto) -> bool:
        """Decide whether a node computes in half precision."""
        if node.op_type in _ALWAYS_FLOAT or (node.op_type == "Softmax" and self.attention != "half"):
            return False
        if self.attention == "float" and node.output[0] in self.logits:
            return False
        if node.op_type in _ALWAYS_HALF:
            return True
        # Other operators (sums, products, changes of layout) follow their inputs: half if one of these is half.
        return any(name in self.half for name in node.input)

    def read(self, name: str, as_half: bool) -> str:
        """Give the name under which a float tensor can be read in the wanted type; add a cast the first time."""
        import onnx

        if name not in self.floats or (name in self.half) == as_half:
            return name
        key = (name, as_half)
        if key not in self.casts:
            self.casts[key] = f"{name}.{'half' if as_half else 'float'}"
            to = self.kind if as_half else onnx.TensorProto.FLOAT
            self.nodes.append(onnx.helper.make_node("Cast", [name], [self.casts[key]], to=to, name=self.casts[key]))
        return self.casts[key]

    def add(self, node: onnx.NodeProto, outputs: set[str]) -> None:
        """Append a node, in the type that it computes in.

        Args:
            node: is changed.
            outputs: names of the graph's outputs, which stay float32.
        """
        import onnx

        as_half = self.wants_half(node)
        # The scales of a resize are float32 even if its map is not.
        data = 1 if node.op_type == "Resize" else len(node.input)
        given = [self.read(name, as_half) if i < data else name for i, name in enumerate(node.input)]
        del node.input[:]
        node.input.extend(given)
        self.nodes.append(node)
        if not as_half:
            if node.op_type in _NARROWED and not outputs & set(node.output):
                wide = f"{node.output[0]}.wide"
                cast = onnx.helper.make_node("Cast", [wide], [node.output[0]], to=self.kind, name=f"{wide}.cast")
                node.output[0] = wide
                self.nodes.append(cast)
                self.half.add(cast.output[0])
            return
        for i, name in enumerate(node.output):
            if name not in self.floats:
                continue
            if name in outputs:
                narrower = f"{name}.half"
                node.output[i] = narrower
                self.nodes.append(
                    onnx.helper.make_node("Cast", [narrower], [name], to=onnx.TensorProto.FLOAT, name=f"{name}.out")
                )
                # Other nodes read the value before this cast, which would only have to be undone.
                self.casts[name, True] = narrower
            else:
                self.half.add(name)


def to_half(proto: onnx.ModelProto, kind: str, attention: str = "softmax") -> tuple[onnx.ModelProto, dict[str, str]]:
    """Make the variant of a float32 graph that computes in a half type.

    Args:
        proto: a graph made by `difftap.export.trace.trace`; it is not changed.
        kind: ``fp16`` or ``bf16``.
        attention: the part of attention that stays in float32, one of `ATTENTIONS`.

    Returns:
        the new graph, and a mapping from the names of its half-precision weights to their names in ``proto``. These
        weights have the half type and the old shape, but still the old location: the caller writes their data and
        changes the location.

    Raises:
        InputError: ``kind`` or ``attention`` is not allowed.
    """
    import onnx

    if kind not in HALVES:
        raise InputError(f"half type is '{kind}'; allowed: {', '.join(HALVES)}")
    if attention not in ATTENTIONS:
        raise InputError(f"attention is '{attention}'; allowed: {', '.join(ATTENTIONS)}")
    new = onnx.ModelProto()
    new.CopyFrom(proto)
    code = onnx.TensorProto.FLOAT16 if kind == "fp16" else onnx.TensorProto.BFLOAT16
    widened = _drop_weight_casts(new)
    halver = _Halver(code, _float_names(proto), attention, _logits(proto))
    if kind == "bf16":
        # Opset 22 is the first whose convolutions take bf16. For the operators used here it changes nothing else.
        next(entry for entry in new.opset_import if entry.domain == "").version = 22
    outputs = {value.name for value in new.graph.output}
    nodes = list(new.graph.node)
    for node in nodes:
        halver.add(node, outputs)
    del new.graph.node[:]
    new.graph.node.extend(halver.nodes)
    return new, _narrow_initializers(new, widened, kind, code)


def _drop_weight_casts(graph: onnx.ModelProto) -> dict[str, str]:
    """Remove the casts of a half-precision checkpoint's weights; map each cast's output to its weight's name."""
    weights = {tensor.name for tensor in graph.graph.initializer}
    widened = {
        n.output[0]: n.input[0] for n in graph.graph.node if n.op_type == "Cast" and n.input and n.input[0] in weights
    }
    kept = [node for node in graph.graph.node if node.output[0] not in widened]
    del graph.graph.node[:]
    graph.graph.node.extend(kept)
    return widened


def _float_names(proto: onnx.ModelProto) -> set[str]:
    """List the names of all float32 tensors.

    Raises:
        BackendError: a node reads a tensor that no earlier node gives.
    """
    import onnx

    wide = onnx.TensorProto.FLOAT
    known = {tensor.name: tensor.data_type for tensor in proto.graph.initializer}
    known |= {value.name: value.type.tensor_type.elem_type for value in proto.graph.input}
    for node in proto.graph.node:
        # Of the operators that difftap exports, only these give another type than that of their first input.
        if node.op_type == "Shape":
            kind = onnx.TensorProto.INT64
        elif node.op_type == "Cast":
            kind = next(a.i for a in node.attribute if a.name == "to")
        elif node.op_type == "Constant":
            kind = next(a.t.data_type for a in node.attribute if a.name == "value")
        else:
            kind = known.get(node.input[0], 0)
            if not kind:
                raise BackendError(f"the graph reads '{node.input[0]}', which nothing before gives; export it again")
        known |= dict.fromkeys(node.output, kind)
    return {name for name, kind in known.items() if kind == wide}


def _logits(proto: onnx.ModelProto) -> set[str]:
    """List the names of every softmax's input, and of the scaled queries and keys whose product it is."""
    made_by = {name: node for node in proto.graph.node for name in node.output}
    found: set[str] = set()
    for node in proto.graph.node:
        if node.op_type == "Softmax" and node.input[0] in made_by:
            product = made_by[node.input[0]]
            found.add(product.output[0])
            scaled = [made_by[name] for name in product.input if name in made_by]
            found |= {before.output[0] for before in scaled if before.op_type == "Mul"}
    return found


def _narrow_initializers(new: onnx.ModelProto, widened: dict[str, str], kind: str, code: int) -> dict[str, str]:
    """Replace each cast of a constant to the half type by a constant of that type; return as `to_half`."""
    import onnx
    from onnx import numpy_helper

    tensors = {tensor.name: tensor for tensor in new.graph.initializer}
    source = {name: name for name in tensors} | widened
    wanted: dict[str, str] = {}
    nodes, added, used = [], [], set()
    for node in new.graph.node:
        if node.op_type == "Cast" and node.input[0] in source and node.output[0].endswith(".half"):
            old, name = tensors[source[node.input[0]]], node.output[0]
            tensor = onnx.TensorProto()
            if old.data_location == onnx.TensorProto.EXTERNAL:
                tensor.CopyFrom(old)
                wanted[name] = old.name
            else:
                values = narrow(numpy_helper.to_array(old).astype(np.float32), kind)
                tensor.dims.extend(old.dims)
                tensor.raw_data = values.tobytes()
            tensor.name, tensor.data_type = name, code
            added.append(tensor)
            continue
        nodes.append(node)
    # A half-precision checkpoint's weights that are used in float32 (the normalisations') need their casts again.
    used = {name for node in nodes for name in node.input}
    casts = [
        onnx.helper.make_node("Cast", [narrower], [wide], to=onnx.TensorProto.FLOAT, name=f"{wide}.cast")
        for wide, narrower in widened.items()
        if wide in used
    ]
    used |= {cast.input[0] for cast in casts}
    kept = [tensor for tensor in new.graph.initializer if tensor.name in used]
    del new.graph.node[:], new.graph.initializer[:]
    new.graph.node.extend([*casts, *nodes])
    new.graph.initializer.extend([*kept, *added])
    return wanted
