"""Tracing a network to ONNX, with its weights left where they are.

The graph holds no copy of the weights: its initializers point into the checkpoint's own safetensors file. (ONNX
external data is a file, an offset and a length, and safetensors files hold raw tensors.) So all graphs of a model share
one file on disk. A half-precision checkpoint's weights are cast to float32 inside the graph.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from difftap.artifacts.tensors import TensorLocation
from difftap.engine.backend import Graph
from difftap.errors import DifftapError, ModelError, first_line, require

if TYPE_CHECKING:
    import onnx
    import onnx_ir
    import torch

__all__ = ["trace"]

OPSET = 20
"""Version of ONNX's operators. Another one gives other graphs: then increase `graphfiles.GRAPH_VERSION` too."""


def _example(graph: Graph) -> tuple[tuple[torch.Tensor, ...], tuple[dict[int, torch.export.Dim], ...]]:
    """Make example inputs, and say which of their axes are free, in the order of ``graph.inputs``."""
    import torch

    dim = torch.export.Dim
    step = graph.model.size_step
    rule = graph.model.noise_rule
    cells = step if rule is None else step // rule.latent_stride  # latent cells per coarsest cell
    high, wide = dim("high", min=1, max=4096), dim("wide", min=1, max=4096)
    free: dict[str, torch.export.Dim] = {
        "B": dim("images", min=1, max=4096),
        "E": dim("members", min=1, max=1024),
        "T": dim("tokens", min=1, max=4096),
    }
    # Sides are declared as multiples of the size step: diffusers tests whether a side can be halved evenly, and a trace
    # follows only one branch of the test.
    free |= {"H": step * high, "W": step * wide, "h": cells * high, "w": cells * wide}
    # All different, and none is 1: the exporter would take equal lengths for one axis, and fix an axis of length 1.
    sides = {"B": 2, "E": 3, "T": 5, "H": 2 * step, "h": 2 * cells, "W": 3 * step, "w": 3 * cells}
    examples, axes = [], []
    for spec in graph.inputs:
        shape = [sides[axis] if isinstance(axis, str) else axis for axis in spec.shape]
        examples.append(torch.full(shape, 7) if spec.dtype == "int64" else torch.rand(shape))
        axes.append({i: free[axis] for i, axis in enumerate(spec.shape) if isinstance(axis, str)})
    return tuple(examples), tuple(axes)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's progress lines and warnings away from the user's terminal."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _free_axes(graph: Graph, model: onnx_ir.Model) -> None:
    """Name the free axes of inputs and outputs by their letters, so that a backend can fix them by name.

    Raises:
        ModelError: the network's own code has fixed an axis (``len(tensor)`` does so), so the graph would only work at
            one size.
    """
    import onnx_ir

    specs = {spec.name: spec for spec in (*graph.inputs, *graph.outputs)}
    for value in (*model.graph.inputs, *model.graph.outputs):
        spec = specs.get(value.name or "")
        if spec is None or value.shape is None:
            continue
        for i, axis in enumerate(spec.shape):
            if isinstance(axis, str) and not isinstance(value.shape[i], int):
                value.shape[i] = onnx_ir.SymbolicDim(axis)
            elif isinstance(axis, str) and value in model.graph.inputs:
                raise ModelError(
                    f"the {graph.component} of model '{graph.model.name}' cannot be traced: its code fixes axis {axis} "
                    f"of '{spec.name}' at {value.shape[i]}"
                )


def trace(
    graph: Graph, module: torch.nn.Module, weights: Mapping[str, TensorLocation], folder: Path
) -> onnx.ModelProto:
    """Trace a module to ONNX with free batch, ensemble, height, width and tokens.

    Args:
        graph: gives the names and axes of inputs and outputs.
        module: from `difftap.engine.torch_model.build`; its parameters are named ``<component>.<tensor>``.
        weights: locations of the checkpoint's tensors, by name.
        folder: the folder that the graph will be written to; locations are relative to it.

    Returns:
        the model, without the parts that no output depends on.

    Raises:
        RecipeError: a tapped module gives no map.
        ModelError: the network cannot be traced, or a weight has a dtype that cannot be read.
    """
    torch = require("torch", "export", "exporting a checkpoint")
    require("onnxscript", "export", "exporting a checkpoint")
    from onnx_ir import serde
    from onnxscript import optimizer

    examples, axes = _example(graph)
    with _quiet(), torch.no_grad():
        try:
            program = torch.onnx.export(
                module,
                examples,
                dynamo=True,
                input_names=[s.name for s in graph.inputs],
                output_names=[s.name for s in graph.outputs],
                dynamic_shapes=axes,
                opset_version=OPSET,
                optimize=False,  # done below, when the weights are safe from being folded
                verbose=False,
            )
        except Exception as error:  # whatever the network's own code raises while it is traced
            raise _root_cause(error, graph) from error
        traced = program.model
        parameters = _parameters_to_inputs(traced, weights, graph.component)
        optimizer.optimize(traced)
    _free_axes(graph, traced)
    proto: onnx.ModelProto = serde.serialize_model(traced)
    _strip(proto)
    _attach_weights(proto, parameters, weights, folder)
    return proto


def _root_cause(error: BaseException, graph: Graph) -> DifftapError:
    """Find difftap's own error among an error's causes, or make one of the first cause's message."""
    while error.__cause__ is not None and not isinstance(error, DifftapError):
        error = error.__cause__
    if isinstance(error, DifftapError):
        return error
    return ModelError(f"the {graph.component} of model '{graph.model.name}' cannot be traced ({first_line(error)})")


def _parameters_to_inputs(
    model: onnx_ir.Model, weights: Mapping[str, TensorLocation], component: str
) -> dict[str, str]:
    """Turn the checkpoint's tensors into graph inputs while the graph is optimised.

    The optimizer folds constants into new constants (a transposed weight, for instance), which would copy the weights
    into the graph; it cannot fold inputs. A tensor that diffusers renames or reshapes on loading (in the attention of
    old VAE files) is not in the file in the form that the network needs, so it stays in the graph.

    Returns:
        the tensor's name in the checkpoint, for each initializer that was turned into an input.
    """
    parameters = {}
    for name in list(model.graph.initializers):
        tensor = name.removeprefix(f"{component}.")
        value = model.graph.initializers[name]
        if tensor not in weights or value.shape is None or tuple(value.shape) != weights[tensor].shape:
            continue
        del model.graph.initializers[name]
        value.const_value = None
        if value.uses():
            model.graph.inputs.append(value)
            parameters[name] = tensor
    return parameters


def _strip(proto: onnx.ModelProto) -> None:
    """Remove what only the exporter needs: inferred shapes, and stack traces, which hold paths of this machine."""
    for node in proto.graph.node:
        node.ClearField("metadata_props")
        node.ClearField("doc_string")
    for value in (*proto.graph.input, *proto.graph.output, *proto.graph.initializer):
        value.ClearField("metadata_props")
        value.ClearField("doc_string")
    proto.ClearField("metadata_props")
    proto.graph.ClearField("metadata_props")
    proto.graph.ClearField("value_info")
    proto.graph.ClearField("doc_string")


def _attach_weights(
    proto: onnx.ModelProto, parameters: Mapping[str, str], weights: Mapping[str, TensorLocation], folder: Path
) -> None:
    """Make each parameter an initializer that points into its safetensors file, with a cast to float32 if needed.

    Raises:
        ModelError: a tensor has a dtype that cannot be cast.
    """
    import onnx

    kinds = {"F32": onnx.TensorProto.FLOAT, "F16": onnx.TensorProto.FLOAT16, "BF16": onnx.TensorProto.BFLOAT16}
    kept = [value for value in proto.graph.input if value.name not in parameters]
    unused = {value.name for value in proto.graph.input} - {value.name for value in kept}
    used = {name for node in proto.graph.node for name in node.input}
    casts = []
    for name in sorted(unused & used):
        place = weights[parameters[name]]
        if place.dtype not in kinds:
            raise ModelError(
                f"tensor '{parameters[name]}' in '{place.path}' is {place.dtype}; allowed: {', '.join(kinds)}"
            )
        tensor = proto.graph.initializer.add()
        tensor.name = name if place.dtype == "F32" else f"{name}.{place.dtype.lower()}"
        tensor.data_type = kinds[place.dtype]
        tensor.dims.extend(place.shape)
        tensor.data_location = onnx.TensorProto.EXTERNAL
        location = Path(os.path.relpath(place.path, folder)).as_posix()
        for key, value in (("location", location), ("offset", place.offset), ("length", place.length)):
            entry = tensor.external_data.add()
            entry.key, entry.value = key, str(value)
        if tensor.name != name:
            casts.append(
                onnx.helper.make_node("Cast", [tensor.name], [name], to=onnx.TensorProto.FLOAT, name=f"{name}.cast")
            )
    nodes = [*casts, *proto.graph.node]
    del proto.graph.node[:], proto.graph.input[:]
    proto.graph.node.extend(nodes)
    proto.graph.input.extend(kept)
