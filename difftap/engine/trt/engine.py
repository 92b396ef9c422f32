"""A TensorRT plan at work: device buffers through torch, one stream, weights put back, CUDA graphs.

Every input and output has one buffer on the GPU per batch size in use, at a fixed address: what a captured CUDA graph
needs. A feed that is already on the GPU is copied there without passing through the host.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from difftap.engine.backend import Array, DeviceArray, Engine, Graph, Profile
from difftap.engine.trt.plans import TrtLog, shape_of
from difftap.errors import BackendError, first_line

__all__ = ["GpuMemory", "TorchArray", "TrtEngine", "refit"]

_LOG = logging.getLogger("difftap")
GRAPH_BATCH = 4
"""Largest batch that runs as a captured CUDA graph: beyond it, launching kernels takes no share that counts."""


def refit(log: TrtLog, engine: Any, onnx: str) -> None:
    """Put the weights of an ONNX file back into an engine whose plan was built without them.

    Raises:
        BackendError: they do not fit.
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

    def empty(self, shape: tuple[int, ...], dtype: str) -> Any:
        """Make a new tensor on the GPU."""
        return self._torch.empty(shape, dtype=getattr(self._torch, dtype), device="cuda")

    def fill(self, target: Any, source: Any) -> None:
        """Copy a tensor of the host or the GPU into a buffer, on the stream."""
        self._stream.wait_stream(self._torch.cuda.current_stream())  # whoever made the source may not be done with it
        with self._torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)

    def capture(self, launch: Any) -> Any:
        """Record what ``launch`` puts on the stream; gives a function that does it again."""
        recorded = self._torch.cuda.CUDAGraph()
        with self._torch.cuda.graph(recorded, stream=self._stream):
            launch()

        def replay() -> None:
            with self._torch.cuda.stream(self._stream):
                recorded.replay()

        return replay

    def publish(self) -> None:
        """Let whoever works on the current stream next see what this stream has done."""
        self._torch.cuda.current_stream().wait_stream(self._stream)


class TorchArray(DeviceArray):
    """A torch tensor on the GPU; it holds its value until its engine runs again."""

    def __init__(self, tensor: Any) -> None:
        self.tensor = tensor
        self.shape = tuple(tensor.shape)
        self.dtype = np.dtype(str(tensor.dtype).removeprefix("torch."))

    def numpy(self) -> Array:
        # A copy, where the tensor is the host's too: buffers are written again by the next run.
        return np.array(self.tensor.cpu().numpy(), order="C")


class TrtEngine(Engine):
    """One deserialised engine with one execution context.

    Args:
        graph: what it runs.
        profile: the shapes it takes.
        device: what it was built for.
        engine: TensorRT's engine.
        context: its execution context.
        memory: where buffers are.
        log: what TensorRT says.
        cuda_graphs: replay small batches as captured CUDA graphs (where the library does not do so itself).
        closing: called once when the engine is closed, while its context is still there.
    """

    chains = True

    def __init__(
        self,
        graph: Graph,
        profile: Profile,
        device: str,
        engine: Any,
        context: Any,
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
        self._buffers: dict[str, Any] = {}
        self._replay: Any = None

    def _run(self, feeds: Mapping[str, Any]) -> dict[str, Array]:
        return {name: value.numpy() for name, value in self._run_on_device(feeds).items()}

    def _run_on_device(self, feeds: Mapping[str, Any]) -> dict[str, TorchArray]:
        import torch

        tensors = {
            name: value.tensor if isinstance(value, TorchArray) else torch.from_numpy(np.ascontiguousarray(value))
            for name, value in feeds.items()
        }
        return {name: TorchArray(value) for name, value in self._launch(tensors).items()}

    def _launch(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        """Put one run on the stream, with torch tensors of the host or the GPU; gives the GPU's output buffers.

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
                self._execute()
                self._capture()
        except RuntimeError as error:  # torch's, for memory above all
            if isinstance(error, BackendError):
                raise
            raise BackendError(f"{self._log.trt.__name__} failed on {self.graph.name}: {first_line(error)}") from error
        self._memory.publish()
        return {spec.name: self._buffers[spec.name] for spec in self.outputs}

    def _prepare(self, batch: int) -> None:
        """Buffers and shapes for a batch size; a graph captured for another one goes."""
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
        """Record the run just made, for the next ones of this batch size; do without where that cannot be done."""
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
