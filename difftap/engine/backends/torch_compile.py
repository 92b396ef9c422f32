"""Compiled PyTorch, tuned as one would by hand: the cut network traced whole, channels last, shapes fixed, compiled.

A rival to measure against. The network is exported first (`torch.export`), so that what feeds no tap is gone and the
compiler sees one graph without hooks; one program is compiled for each batch size when that is first run.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from difftap.engine.backend import Engine, Graph, Profile
from difftap.engine.backends.torch import TorchBackend, TorchEngine, on_device, to_precision
from difftap.errors import BackendError, first_line


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the compiler's notices off the user's terminal."""
    loggers = [logging.getLogger(name) for name in ("torch", "torch._inductor", "torch._dynamo")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


class TorchCompileEngine(TorchEngine):
    """One torch module, compiled for each batch size."""

    def __init__(self, graph: Graph, profile: Profile, module: Any, device: str, threads: int | None) -> None:
        super().__init__(graph, profile, module, device, threads)
        self._programs: dict[int, Any] = {}

    def _call(self, tensors: list[Any]) -> Any:
        batch = int(tensors[0].shape[0])
        if batch in self._programs:
            return self._programs[batch](*tensors)
        with _quiet():
            try:
                self._programs[batch] = self._compile(tensors)
                return self._programs[batch](*tensors)
            except Exception as error:  # the compilers' errors share no base class
                self._programs.pop(batch, None)
                if isinstance(error, BackendError):
                    raise
                raise BackendError(f"torch cannot compile {self.graph.name}: {first_line(error)}") from error

    def _compile(self, tensors: list[Any]) -> Any:
        import torch

        with torch.no_grad():  # what is exported in inference mode cannot be compiled
            examples = tuple(torch.empty_like(tensor).copy_(tensor) for tensor in tensors)
            program = torch.export.export(self._module, examples, strict=False).module()
        # Launching hundreds of small kernels one by one would be most of a small batch's time.
        mode = "reduce-overhead" if self.device == "cuda" else "default"
        return torch.compile(program, fullgraph=True, dynamic=False, mode=mode)

    def close(self) -> None:
        super().close()
        self._programs = {}


class TorchCompileBackend(TorchBackend):
    """PyTorch with its compiler."""

    name = "torch-compile"
    by_default = False

    def missing(self) -> str | None:
        lacking = super().missing()
        if lacking:
            return lacking
        if not any(shutil.which(name) for name in (os.environ.get("CXX", "c++"), "c++", "g++", "clang++")):
            return "backend 'torch-compile' needs a C++ compiler and finds none; install g++, or set CXX"
        return None

    def open(
        self, graph: Graph, profile: Profile, device: str, threads: int | None, built: Path | None = None
    ) -> Engine:
        import torch

        from difftap.engine.torch_model import build

        module = build(graph.model, graph.component, graph.taps)  # traced to the end; the tail goes with the export
        module = to_precision(module, profile.precision).to(memory_format=torch.channels_last)
        return TorchCompileEngine(graph, profile, on_device(graph, module, device), device, threads)
