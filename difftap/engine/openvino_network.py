"""A graph as OpenVINO's model: read, given its shapes, and quantised to int8 with nncf on feeds of real images."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from difftap.engine.backend import Array, Graph, Profile
from difftap.errors import BackendError, first_line, require

__all__ = ["fix_shapes", "quantise", "read_network", "reason"]


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


def quantise(model: Any, feeds: Sequence[Mapping[str, Array]], graph: Graph) -> tuple[Any, dict[str, Any]]:
    """Quantise an OpenVINO model with static shapes; what nncf leaves alone stays float.

    A tapped network is treated as a transformer (SmoothQuant, Xiao et al. 2023, moves outliers of activations into
    weights), with asymmetric activations, since SiLU and GELU are not symmetric. Between the VAE's convolutions
    symmetric ones do.

    Returns:
        The quantised model, and what the engine's manifest should say of it.

    Raises:
        MissingExtraError: nncf is not installed.
        BackendError: it cannot quantise the model.
    """
    nncf = require("nncf", "openvino", "quantising to int8")
    nncf.set_log_level(logging.ERROR)
    tapped = bool(graph.taps)
    try:
        with contextlib.redirect_stdout(sys.stderr):  # its progress bars
            quantised = nncf.quantize(
                model,
                nncf.Dataset(list(feeds)),
                subset_size=len(feeds),
                preset=nncf.QuantizationPreset.MIXED if tapped else nncf.QuantizationPreset.PERFORMANCE,
                model_type=nncf.ModelType.TRANSFORMER if tapped else None,
            )
    except (RuntimeError, nncf.ValidationError, nncf.InternalError) as error:
        raise BackendError(f"nncf cannot quantise {graph.name}: {reason(error)}") from error
    return quantised, {"nncf": str(nncf.__version__)}


def reason(error: BaseException) -> str:
    """The line of OpenVINO's error that says what is wrong; the first ones say where in its source."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if not line.startswith(("Exception from", "Check '", "While validating"))]
    return first_line(RuntimeError(telling[0])) if telling else first_line(error)
