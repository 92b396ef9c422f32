"""Eager PyTorch on the checkpoint itself: the reference that the other backends are held against."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from difftap.engine.backend import Array, Backend, Engine, Graph, Profile
from difftap.errors import BackendError, first_line


class TorchEngine(Engine):
    """One torch module in fp32."""

    def __init__(self, graph: Graph, profile: Profile, module: Any, device: str, threads: int | None) -> None:
        super().__init__(graph, profile, device)
        self._module: Any = module.to(device)
        self._device = device
        self._threads = threads

    def _run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        import torch

        if self._module is None:
            raise BackendError(f"the engine of {self.graph.name} is closed; open it again")
        before = torch.get_num_threads()
        try:
            # The count is the process's, so it is set for our own call alone.
            if self._threads:
                torch.set_num_threads(self._threads)
            with torch.inference_mode(), torch.backends.cudnn.flags(allow_tf32=False):
                tensors = [torch.from_numpy(np.ascontiguousarray(feeds[s.name])).to(self._device) for s in self.inputs]
                values = self._module(*tensors)
        except RuntimeError as error:
            raise BackendError(f"torch failed on {self.graph.name}: {first_line(error)}") from error
        finally:
            torch.set_num_threads(before)
        return {s.name: np.ascontiguousarray(v.cpu().numpy()) for s, v in zip(self.outputs, values, strict=True)}

    def close(self) -> None:
        self._module = None


class TorchBackend(Backend):
    """PyTorch."""

    name = "torch"
    needs_graph = False

    def missing(self) -> str | None:
        try:
            import diffusers  # noqa: F401
            import torch  # noqa: F401
        except ImportError as error:
            return f"backend 'torch' needs torch and diffusers ({error}); pip install 'difftap[export]'"
        return None

    def devices(self) -> tuple[str, ...]:
        import torch

        return ("cuda", "cpu") if torch.cuda.is_available() else ("cpu",)

    def version(self) -> str:
        import torch

        return str(torch.__version__)

    def open(
        self, graph: Graph, profile: Profile, device: str, threads: int | None, built: Path | None = None
    ) -> Engine:
        from difftap.engine.torch_model import build

        module = build(graph.model, graph.component, graph.taps, stop_early=True)
        return TorchEngine(graph, profile, module, device, threads)
