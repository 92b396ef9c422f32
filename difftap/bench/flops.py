"""Count the multiply-adds of a graph's convolutions and matrix products from its ONNX file.

The free axes get their sizes, and shapes are inferred from node to node. The few integers that decide reshapes are
computed on the way. Weights are not read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from difftap.engine import Graph, Profile
from difftap.errors import ArtifactError, require

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto, TypeProto

__all__ = ["axes_of", "count_graph", "count_macs"]

_SMALL = 4096
"""Values with at most this many elements are computed; what decides a reshape is a handful of integers."""


def axes_of(graph: Graph, profile: Profile) -> dict[str, int]:
    """Give the sizes of a graph's free axes for one image, by the letters of `difftap.engine.backend`."""
    return {"B": 1, **profile.axes(graph.model)}


def count_graph(graph: Graph, profile: Profile) -> int:
    """Count the multiply-adds of one run of a graph on one image.

    Raises:
        MissingExtraError: onnx is not installed.
        ArtifactError: the graph has no file, or its shapes cannot be inferred.
    """
    if graph.path is None:
        raise ArtifactError(f"{graph.name} has no ONNX file to count; export it first")
    return count_macs(graph.path, axes_of(graph, profile))


def count_macs(path: Path, axes: Mapping[str, int]) -> int:
    """Count the multiply-adds of ``Conv``, ``MatMul``, ``Gemm`` and ``Attention`` nodes: one for each product added.

    Args:
        path: the ONNX file; its weights need not be there.
        axes: name -> size of each free axis.

    Raises:
        MissingExtraError: onnx is not installed.
        ArtifactError: a shape cannot be inferred.
    """
    onnx = require("onnx", "bench", "counting a graph's arithmetic")
    for part in ("onnx.reference", "onnx.shape_inference"):
        require(part, "bench", "counting a graph's arithmetic")
    model = onnx.load(str(path), load_external_data=False)
    walk = _Walk(onnx, model, axes)
    return sum(walk.step(node) for node in model.graph.node)


class _Walk:
    """A walk through a graph's nodes, in its own order, that infers shapes and computes small constants."""

    def __init__(self, onnx: ModuleType, model: ModelProto, axes: Mapping[str, int]) -> None:
        self._onnx = onnx
        self._opsets = {entry.domain: entry.version for entry in model.opset_import}
        self._imports = list(model.opset_import)
        self._ir = model.ir_version
        self.types: dict[str, TypeProto] = {}
        self.constants: dict[str, NDArray[Any]] = {}
        for value in model.graph.input:
            for dim in value.type.tensor_type.shape.dim:
                if dim.dim_param:
                    if dim.dim_param not in axes:
                        raise ArtifactError(f"the graph's axis '{dim.dim_param}' is free; known: {', '.join(axes)}")
                    dim.dim_value = axes[dim.dim_param]
            self.types[value.name] = value.type
        for tensor in model.graph.initializer:
            self.types[tensor.name] = onnx.helper.make_tensor_type_proto(tensor.data_type, list(tensor.dims))
            # External data are the weights, which are not loaded; what decides a reshape is inside the file.
            outside = tensor.data_location == onnx.TensorProto.EXTERNAL
            if not outside and math.prod(tensor.dims) <= _SMALL:
                self.constants[tensor.name] = onnx.numpy_helper.to_array(tensor)

    def shape(self, name: str) -> tuple[int, ...]:
        """Give the shape of a value.

        Raises:
            ArtifactError: it is not known.
        """
        kind = self.types.get(name)
        dims = None if kind is None else kind.tensor_type.shape.dim
        if dims is None or not all(dim.HasField("dim_value") for dim in dims):
            raise ArtifactError(f"the shape of '{name}' cannot be followed; export the graph again")
        return tuple(dim.dim_value for dim in dims)

    def step(self, node: NodeProto) -> int:
        """Infer the outputs of one node; return its multiply-adds."""
        self._infer(node)
        self._compute(node)
        if node.op_type == "Conv":
            output, kernel = self.shape(node.output[0]), self.shape(node.input[1])
            return math.prod(output) * math.prod(kernel[1:])  # (O, C / groups, kh, kw)
        if node.op_type == "MatMul":
            return math.prod(self.shape(node.output[0])) * self.shape(node.input[0])[-1]
        if node.op_type == "Gemm":
            across = any(a.name == "transA" and a.i for a in node.attribute)
            return math.prod(self.shape(node.output[0])) * self.shape(node.input[0])[0 if across else 1]
        if node.op_type == "Attention":
            queries, keys = self.shape(node.input[0]), self.shape(node.input[1])
            # Two products: queries with keys, and weights with values.
            return 2 * math.prod(queries) * keys[-2]
        return 0

    def _infer(self, node: NodeProto) -> None:
        schema = self._onnx.defs.get_schema(node.op_type, self._opsets.get(node.domain, 1), node.domain)
        known = {name: self.types[name] for name in node.input if name in self.types}
        data = {
            name: self._onnx.numpy_helper.from_array(self.constants[name], name)
            for name in node.input
            if name in self.constants
        }
        try:
            found = self._onnx.shape_inference.infer_node_outputs(
                schema, node, known, data, opset_imports=self._imports, ir_version=self._ir
            )
        except Exception as error:  # onnx raises errors of its own, which differ between its versions
            raise ArtifactError(f"the shapes of node '{node.name}' cannot be followed ({error})") from error
        self.types.update(found)

    def _compute(self, node: NodeProto) -> None:
        """Compute the node's outputs, if they are small and all its inputs are known."""
        if node.op_type == "Shape":
            first, last = (next((a.i for a in node.attribute if a.name == key), None) for key in ("start", "end"))
            self.constants[node.output[0]] = np.array(self.shape(node.input[0])[first:last], np.int64)
            return
        if any(name and name not in self.constants for name in node.input):
            return
        if any(math.prod(self.shape(name)) > _SMALL for name in node.output if name):
            return
        evaluator = self._onnx.reference.ReferenceEvaluator(node)
        values = evaluator.run(None, {name: self.constants[name] for name in node.input if name})
        self.constants.update(
            (name, np.asarray(value)) for name, value in zip(node.output, values, strict=True) if name
        )
