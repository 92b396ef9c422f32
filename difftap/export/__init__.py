"""torch -> ONNX: the VAE encoder and the UNet cut after its deepest tap, with a parity report."""

from difftap.backbones.find import open_model
from difftap.export.graphs import ensure_graph, export_graph

__all__ = ["ensure_graph", "export_graph", "open_model"]
