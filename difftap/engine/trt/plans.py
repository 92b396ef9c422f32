"""Building a TensorRT plan from a graph: one resolution, a range of batch sizes, strongly typed.

The graph says in which types to compute, not the builder: newer versions of TensorRT have no precision flags. Height,
width, members and tokens are fixed, so that TensorRT can choose kernels for exactly these shapes. Only the batch is
free, from one image to the profile's batch; kernels are chosen for the largest.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from difftap.engine.backend import Graph, Profile, TensorSpec
from difftap.errors import BackendError

if TYPE_CHECKING:
    from tensorrt import Builder, IBuilderConfig, IHostMemory, ILogger, INetworkDefinition

__all__ = ["BuildSettings", "TrtLog", "build_plan", "make_log"]

_LOG = logging.getLogger("difftap")


@dataclass
class TrtLog:
    """TensorRT's messages: errors are collected for difftap's own error text, and all go to the debug log.

    Attributes:
        trt: the TensorRT module.
        logger: the logger to pass to TensorRT's objects.
        errors: the error messages so far, in order.
    """

    trt: ModuleType
    logger: ILogger | None = None
    errors: list[str] = field(default_factory=list)

    def failure(self, what: str) -> BackendError:
        """Make the error to raise when a call of TensorRT returned nothing.

        Of TensorRT's messages the first one names the cause; later ones are its consequences.
        """
        cause = self.errors[0].strip().splitlines()[0][:300] if self.errors else "no reason given"
        return BackendError(f"{self.trt.__name__} {what}: {cause}")


def make_log(trt: ModuleType) -> TrtLog:
    """Make a log for one build or one engine."""
    log = TrtLog(trt)

    class Collector(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: object, message: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                log.errors.append(message)
            _LOG.debug("%s: %s", trt.__name__, message.strip().partition("\n")[0][:300])

    log.logger = Collector()
    return log


@dataclass(frozen=True)
class BuildSettings:
    """How a plan is built, beyond the graph and its shapes.

    Attributes:
        strip: leave the weights out of the plan; they are read from the graph's own weight file when it is opened.
        configure: changes the builder's configuration before a build; for settings of one library only.
        finish: reads the configuration after a build, to keep what makes later builds faster.
    """

    strip: bool = False
    configure: Callable[[IBuilderConfig], None] = lambda config: None
    finish: Callable[[IBuilderConfig], None] = lambda config: None


def shape_of(spec: TensorSpec, graph: Graph, profile: Profile, batch: int) -> tuple[int, ...]:
    """Give an input's shape, with a number for every axis letter."""
    sides = {"B": batch, **profile.axes(graph.model)}
    return tuple(sides[axis] if isinstance(axis, str) else axis for axis in spec.shape)


def build_plan(trt: ModuleType, graph: Graph, profile: Profile, path: Path, settings: BuildSettings) -> IHostMemory:
    """Build a plan from a graph's ONNX file.

    Args:
        trt: the TensorRT module.
        graph: what is built; gives the inputs' names and axes.
        profile: the shapes.
        path: the ONNX file, in the profile's precision.
        settings: everything else.

    Returns:
        the plan, in TensorRT's own buffer.

    Raises:
        BackendError: the graph cannot be read or built; the message holds TensorRT's first error.
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


def _set_flags(trt: ModuleType, config: IBuilderConfig, profile: Profile, settings: BuildSettings) -> None:
    if profile.precision == "fp32":
        # TF32 would be fp32 only by name. Under a half precision it stays on: it is as exact as the other layers.
        config.clear_flag(trt.BuilderFlag.TF32)
    if settings.strip:
        # REFIT_IDENTICAL promises that the weights put back are the same ones, so TensorRT may optimise with their
        # values; plain REFIT would have to allow for any other weights.
        config.set_flag(trt.BuilderFlag.STRIP_PLAN)
        config.set_flag(trt.BuilderFlag.REFIT_IDENTICAL)


def _set_shapes(
    builder: Builder, config: IBuilderConfig, network: INetworkDefinition, graph: Graph, profile: Profile
) -> None:
    specs = {spec.name: spec for spec in graph.inputs}
    free: Sequence[int] = (1, profile.batch, profile.batch)  # smallest, chosen for, largest
    shapes = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        low, best, high = (shape_of(specs[tensor.name], graph, profile, batch) for batch in free)
        tensor.shape = high if profile.batch == 1 else (-1, *high[1:])  # -1: the free axis
        if profile.batch > 1:
            shapes.set_shape(tensor.name, low, best, high)
    if profile.batch > 1:
        config.add_optimization_profile(shapes)
