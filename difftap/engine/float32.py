"""Keeping parts of a network in float32 that OpenVINO compiles in bf16: their marks, and what came of them."""

from __future__ import annotations

import tempfile
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np

from difftap.artifacts.files import output_errors
from difftap.errors import BackendError

__all__ = ["ROUNDED", "check_kept", "keep_float32"]

ROUNDED = "bf16x3 high"
"""How the names begin of the nodes that are meant to give bf16."""

_LARGE = 4096
"""Numbers in a constant from which on it is a weight, and never written to a file on the way."""


def keep_float32(core: Any, model: Any, products: set[str]) -> Any:
    """The model again, all nodes but the products marked to keep their types.

    Python cannot set the mark, but OpenVINO's files have it; so the model goes through one, its weights left out.

    Args:
        core: ``openvino.Core``.
        model: ``openvino.Model``; it is taken apart.
        products: names of the nodes that are not marked.

    Raises:
        BackendError: OpenVINO does not read what it wrote.
        OutputError: the temporary file cannot be written.
    """
    import openvino
    import openvino.opset13

    inputs = len(model.get_parameters())
    weights: dict[str, Any] = {}
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
        raise BackendError("this version of OpenVINO does not read its own files as they were; use --precision fp32")
    return made


def _through_file(core: Any, model: Any, products: set[str]) -> Any:
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


def check_kept(compiled: Any, name: str) -> None:
    """Make sure that no node gives bf16 but those that were meant to.

    What a product takes is not looked at: it is meant to be bf16.

    Args:
        compiled: ``openvino.CompiledModel`` of what `difftap.engine.bf16x3.split_products` gave.
        name: what the network is called.

    Raises:
        BackendError: it does not; another version may.
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
