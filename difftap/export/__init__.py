"""Exporting torch networks to ONNX: a backbone's encoder, and its tapped network cut after the deepest tap."""

from difftap.backbones.find import open_model
from difftap.export.graphs import ensure_graph, export_graph

__all__ = ["ensure_graph", "export_graph", "open_model"]
