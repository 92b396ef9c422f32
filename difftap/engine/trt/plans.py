"""From a graph to a TensorRT plan: one resolution, a range of batch sizes, strongly typed.

Precisions are in the graph, not in the builder: newer TensorRTs know no precision flags. Height, width, members and
tokens are fixed, so that kernels are chosen for the very shapes; the batch alone is free, from one image to the
profile's batch, and kernels are chosen for the largest.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from difftap.engine.backend import Graph, Profile, TensorSpec
from difftap.errors import BackendError

__all__ = ["BuildSettings", "TrtLog", "build_plan", "make_log"]

_LOG = logging.getLogger("difftap")


@dataclass
class TrtLog:
    """What a TensorRT object has to say: errors are kept for our own message, the rest goes to the debug log.

    Attributes:
        trt: the TensorRT module.
        logger: what TensorRT's objects are given.
        errors: messages of errors, in order.
    """

    trt: Any
    logger: Any = None
    errors: list[str] = field(default_factory=list)

    def failure(self, what: str) -> BackendError:
        """Build the error to raise when something gave nothing: the first message names the cause."""
        cause = self.errors[0].strip().splitlines()[0][:300] if self.errors else "no reason given"
        return BackendError(f"{self.trt.__name__} {what}: {cause}")


def make_log(trt: Any) -> TrtLog:
    """Make a log of its own for one build or one engine."""
    log = TrtLog(trt)

    class Collector(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                log.errors.append(message)
            _LOG.debug("%s: %s", trt.__name__, message.strip().partition("\n")[0][:300])

    log.logger = Collector()
    return log


@dataclass(frozen=True)
class BuildSettings:
    """How a plan is built, beyond the graph and its shapes.

    Attributes:
        strip: leave the weights out of the plan; they are put back from the graph's own weight file when it is opened.
        configure: sets on the builder's configuration what only one of the two libraries has.
        finish: takes from it, after a build, what is worth keeping.
    """

    strip: bool = False
    configure: Callable[[Any], None] = lambda config: None
    finish: Callable[[Any], None] = lambda config: None


def shape_of(spec: TensorSpec, graph: Graph, profile: Profile, batch: int) -> tuple[int, ...]:
    """Give an input's shape with every letter filled in."""
    sides = {"B": batch, **profile.axes(graph.model)}
    return tuple(sides[axis] if isinstance(axis, str) else axis for axis in spec.shape)


def build_plan(trt: Any, graph: Graph, profile: Profile, path: Path, settings: BuildSettings) -> Any:
    """Build a plan from a graph's ONNX file.

    Args:
        trt: the TensorRT module.
        graph: what is built; names inputs and their axes.
        profile: the shapes.
        path: the ONNX file in the profile's precision.
        settings: the rest.

    Returns:
        The plan, as TensorRT's own buffer of bytes.

    Raises:
        BackendError: the graph cannot be read or built; the message holds TensorRT's first complaint.
    """
    log = make_log(trt)
    builder = trt.Builder(log.logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log.logger)
    if not parser.parse_from_file(str(path)):
        log.errors[:0] = [parser.get_error(i).desc() for i in range(parser.num_errors)]
        raise log.failure(f"cannot open '{path}'")
    config = builder.create_builder_config()
    _set_flags(trt, config, profile, settings)
    _set_shapes(builder, config, network, graph, profile)
    settings.configure(config)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise log.failure(f"cannot build {graph.name} for {profile.label}")
    settings.finish(config)
    return plan


def _set_flags(trt: Any, config: Any, profile: Profile, settings: BuildSettings) -> None:
    if profile.precision == "fp32":
        # TF32 would be fp32 in name only. Beside half-precision layers it is as exact as they are, and faster.
        config.clear_flag(trt.BuilderFlag.TF32)
    if settings.strip:
        # "Identical": the weights put back are those built with, so nothing has to be kept changeable for others.
        config.set_flag(trt.BuilderFlag.STRIP_PLAN)
        config.set_flag(trt.BuilderFlag.REFIT_IDENTICAL)


def _set_shapes(builder: Any, config: Any, network: Any, graph: Graph, profile: Profile) -> None:
    specs = {spec.name: spec for spec in graph.inputs}
    free: Sequence[int] = (1, profile.batch, profile.batch)  # smallest, chosen for, largest
    shapes = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        low, best, high = (shape_of(specs[tensor.name], graph, profile, batch) for batch in free)
        tensor.shape = high if profile.batch == 1 else (-1, *high[1:])
        if profile.batch > 1:
            shapes.set_shape(tensor.name, low, best, high)
    if profile.batch > 1:
        config.add_optimization_profile(shapes)
