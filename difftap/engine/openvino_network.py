"""A graph as OpenVINO's model: read, and given its shapes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from difftap.engine.backend import Graph, Profile
from difftap.engine.quantise import reason
from difftap.errors import BackendError

__all__ = ["fix_shapes", "read_network"]


def read_network(core: Any, path: Path | None) -> Any:
    """Read a graph, or a model of OpenVINO's own.

    Raises:
        BackendError: it cannot be read.
    """
    try:
        return core.read_model(path)
    except (RuntimeError, TypeError) as error:
        raise BackendError(f"openvino cannot open '{path}': {reason(error)}") from error


def fix_shapes(model: Any, graph: Graph, profile: Profile, batch: int) -> None:
    """Give a network the shapes of a profile, for so many images."""
    letters = {"B": batch, **profile.axes(graph.model)}
    used = {value.get_any_name() for value in model.inputs}
    model.reshape({s.name: [letters.get(str(a), a) for a in s.shape] for s in graph.inputs if s.name in used})
