"""Running a TensorRT plan: buffers on the GPU through torch, one stream, stripped weights, CUDA graphs.

Every input and output has one buffer on the GPU for the batch size in use, at a fixed address, as a captured CUDA graph
needs it. A feed that is on the GPU already is copied there without passing through the host.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from difftap.engine.backend import Array, DeviceArray, Engine, Graph, Profile, Value
from difftap.engine.trt.plans import TrtLog, shape_of
from difftap.errors import BackendError, first_line

if TYPE_CHECKING:
    from tensorrt import ICudaEngine, IExecutionContext
    from torch import Tensor

__all__ = ["GpuMemory", "TorchArray", "TrtEngine", "refit"]

_LOG = logging.getLogger("difftap")
GRAPH_BATCH = 4
"""Largest batch that runs as a captured CUDA graph; with larger ones, launching kernels takes a negligible share."""


def refit(log: TrtLog, engine: ICudaEngine, onnx: str) -> None:
    """Put the weights of an ONNX file into an engine whose plan was built without them.

    Raises:
        BackendError: the weights do not fit the engine.
    """
    trt = log.trt
    refitter = trt.Refitter(engine, log.logger)
    parser = trt.OnnxParserRefitter(refitter, log.logger)
    if not parser.refit_from_file(onnx) or not refitter.refit_cuda_engine():
        raise log.failure(f"cannot put the weights of '{onnx}' back into the engine; build it again")


class GpuMemory:
    """The GPU's memory and one stream, through torch."""

    def __init__(self) -> None:
        import torch

        self._torch = torch
        self._stream = torch.cuda.Stream()

    @property
    def stream(self) -> int:
        """The stream's handle."""
        return int(self._stream.cuda_stream)

    def empty(self, shape: tuple[int, ...], dtype: str) -> Tensor:
        """Make a new tensor on the GPU."""
        return self._torch.empty(shape, dtype=getattr(self._torch, dtype), device="cuda")

    def fill(self, target: Tensor, source: Tensor) -> None:
        """Copy a tensor of the host or the GPU into a buffer, on the stream."""
        # The work that computes the source may still be queued on the current stream.
        self._stream.wait_stream(self._torch.cuda.current_stream())
        with self._torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)

    def capture(self, launch: Callable[[], None]) -> Callable[[], None]:
        """Record the work that ``launch`` puts on the stream; give a function that repeats it."""
        recorded = self._torch.cuda.CUDAGraph()
        with self._torch.cuda.graph(recorded, stream=self._stream):
            launch()

        def replay() -> None:
            with self._torch.cuda.stream(self._stream):
                recorded.replay()

        return replay

    def publish(self) -> None:
        """Make the current stream wait for this one, so that work queued there next sees the results."""
        self._torch.cuda.current_stream().wait_stream(self._stream)


class TorchArray(DeviceArray):
    """A torch tensor on the GPU. Its value is overwritten when its engine runs again."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.shape = tuple(tensor.shape)
        self.dtype = np.dtype(str(tensor.dtype).removeprefix("torch."))

    def numpy(self) -> Array:
        # A copy even of a tensor on the host (in tests), because the next run overwrites the buffer.
        return np.array(self.tensor.cpu().numpy(), order="C")


class TrtEngine(Engine):
    """One deserialised engine with one execution context.

    Args:
        graph: what it runs.
        profile: the shapes it takes.
        device: the device that it was built for.
        engine: TensorRT's engine.
        context: its execution context.
        memory: makes and fills the buffers.
        log: collects TensorRT's errors.
        cuda_graphs: replay small batches as captured CUDA graphs (if the library does not do so itself).
        closing: called once when the engine is closed, while its context still exists.
    """

    chains = True

    def __init__(
        self,
        graph: Graph,
        profile: Profile,
        device: str,
        engine: ICudaEngine,
        context: IExecutionContext,
        memory: GpuMemory,
        log: TrtLog,
        cuda_graphs: bool = False,
        closing: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(graph, profile, device)
        self._engine, self._context, self._memory, self._log = engine, context, memory, log
        present = {engine.get_tensor_name(i) for i in range(engine.num_io_tensors)}
        # The exporter drops inputs that no tap depends on (a prompt, for a tap before the first attention).
        self._fed = [spec for spec in self.inputs if spec.name in present]
        self._cuda_graphs, self._closing = cuda_graphs, closing
        self._batch = 0
        self._buffers: dict[str, Tensor] = {}
        self._replay: Callable[[], None] | None = None

    def _run(self, feeds: Mapping[str, Value]) -> dict[str, Array]:
        return {name: value.numpy() for name, value in self._run_on_device(feeds).items()}

    def _run_on_device(self, feeds: Mapping[str, Value]) -> dict[str, TorchArray]:
        import torch

        tensors = {
            name: value.tensor if isinstance(value, TorchArray) else torch.from_numpy(np.ascontiguousarray(value))
            for name, value in feeds.items()
        }
        return {name: TorchArray(value) for name, value in self._launch(tensors).items()}

    def _launch(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Queue one run on the stream, with tensors on the host or the GPU; give the output buffers on the GPU.

        Raises:
            BackendError: the runtime failed.
        """
        if self._context is None:
            raise BackendError(f"the engine of {self.graph.name} is closed; open it again")
        batch = int(next(iter(feeds.values())).shape[0])
        try:
            if batch != self._batch:
                self._prepare(batch)
            for spec in self._fed:
                self._memory.fill(self._buffers[spec.name], feeds[spec.name])
            if self._replay is not None:
                self._replay()
            else:
                self._execute()  # uncaptured once, because TensorRT finishes setting up new shapes in it
                self._capture()
        except RuntimeError as error:  # torch's, mostly because the GPU's memory is full
            if isinstance(error, BackendError):
                raise
            raise BackendError(f"{self._log.trt.__name__} failed on {self.graph.name}: {first_line(error)}") from error
        self._memory.publish()
        return {spec.name: self._buffers[spec.name] for spec in self.outputs}

    def _prepare(self, batch: int) -> None:
        """Make buffers and set shapes for a batch size; drop a CUDA graph captured for another one."""
        self._replay, self._batch, self._buffers = None, 0, {}
        for spec in self._fed:
            shape = shape_of(spec, self.graph, self.profile, batch)
            self._buffers[spec.name] = self._memory.empty(shape, spec.dtype)
            if not self._context.set_input_shape(spec.name, shape):
                raise self._log.failure(f"refuses the shape {shape} for '{spec.name}' of {self.graph.name}")
        for spec in self.outputs:
            self._buffers[spec.name] = self._memory.empty(tuple(self._context.get_tensor_shape(spec.name)), spec.dtype)
        for name, buffer in self._buffers.items():
            self._context.set_tensor_address(name, buffer.data_ptr())
        self._batch = batch

    def _execute(self) -> None:
        if not self._context.execute_async_v3(self._memory.stream):
            raise self._log.failure(f"failed on {self.graph.name}")

    def _capture(self) -> None:
        """Capture a run as a CUDA graph for the next runs of this batch size; if that fails, never try again."""
        if not self._cuda_graphs or self._batch > GRAPH_BATCH:
            return
        try:
            self._replay = self._memory.capture(self._execute)
        except RuntimeError as error:
            _LOG.debug("no CUDA graph of %s: %s", self.graph.name, first_line(error))
            self._cuda_graphs = False

    def close(self) -> None:
        if self._context is not None:
            self._closing()
        self._replay, self._buffers, self._batch = None, {}, 0
        self._context = self._engine = None
