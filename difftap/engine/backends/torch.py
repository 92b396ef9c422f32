"""Eager PyTorch on the checkpoint itself: at fp32 it is the reference that other backends are compared with.

In half precision the networks compute in fp16 or bf16; the noisy latent is formed before, in float32. Attention's
logits and softmax stay in float32 too: diffusers uses torch's fused attention, which accumulates in float32, and whose
plain fallback casts up. (Stable Diffusion 2.1 overflows fp16 there and nowhere else.)
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from difftap.engine.backend import Array, Backend, Engine, Graph, Profile
from difftap.errors import BackendError, first_line

if TYPE_CHECKING:
    import torch

    from difftap.engine.torch_model import ComponentModule

_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


class TorchEngine(Engine):
    """One torch module in one precision."""

    def __init__(
        self, graph: Graph, profile: Profile, module: ComponentModule, device: str, threads: int | None
    ) -> None:
        super().__init__(graph, profile, device)
        self._module: ComponentModule | None = module
        self._threads = threads

    def _run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        import torch

        if self._module is None:
            raise BackendError(f"the engine of {self.graph.name} is closed; open it again")
        before = torch.get_num_threads()
        try:
            # The number of threads belongs to the whole process, so it is set only during our own call.
            if self._threads:
                torch.set_num_threads(self._threads)
            # TF32 has a mantissa of 10 bits: it would be fp32 only by name.
            with torch.inference_mode(), torch.backends.cudnn.flags(allow_tf32=False):
                tensors = [torch.from_numpy(np.ascontiguousarray(feeds[s.name])).to(self.device) for s in self.inputs]
                values = self._module(*tensors)
                # contiguous: some layers leave channels last in memory
                arrays = [value.float().contiguous().cpu().numpy() for value in values]
        except RuntimeError as error:
            raise BackendError(f"torch failed on {self.graph.name}: {first_line(error)}") from error
        finally:
            torch.set_num_threads(before)
        return {s.name: np.ascontiguousarray(v) for s, v in zip(self.outputs, arrays, strict=True)}

    def close(self) -> None:
        self._module = None


def to_precision(module: ComponentModule, precision: str) -> ComponentModule:
    """Convert a module's network to a precision, and cast its inputs where they enter it."""
    import torch

    if precision == "fp32":
        return module
    dtype = getattr(torch, _DTYPES[precision])

    def cast(value: object) -> object:
        return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    def enter(
        _module: torch.nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> tuple[tuple[object, ...], dict[str, object]]:
        return tuple(map(cast, args)), {name: cast(value) for name, value in kwargs.items()}

    module.entrance.register_forward_pre_hook(enter, with_kwargs=True)
    return module.to(dtype)


class TorchBackend(Backend):
    """PyTorch."""

    name = "torch"
    needs_graph = False

    def missing(self) -> str | None:
        try:
            import diffusers  # noqa: F401
            import torch  # noqa: F401
        except ImportError as error:
            return f"backend '{self.name}' needs torch and diffusers ({error}); pip install 'difftap[export]'"
        return None

    def precisions(self, device: str) -> tuple[str, ...]:
        return tuple(_DTYPES) if device == "cuda" else ("fp32", "bf16")  # few CPUs compute in fp16

    def devices(self) -> tuple[str, ...]:
        import torch

        return ("cuda", "cpu") if torch.cuda.is_available() else ("cpu",)

    def fused_attention(self, device: str) -> bool:
        return device == "cuda"

    def version(self) -> str:
        import torch

        return str(torch.__version__)

    def open(
        self, graph: Graph, profile: Profile, device: str, threads: int | None, built: Path | None = None
    ) -> Engine:
        from difftap.engine.torch_model import build

        module = build(graph.model, graph.component, graph.taps, stop_early=True)
        module = to_precision(module, profile.precision)
        return TorchEngine(graph, profile, on_device(graph, module, device), device, threads)


def on_device(graph: Graph, module: ComponentModule, device: str) -> ComponentModule:
    """Move a module to a device.

    Raises:
        BackendError: the device's memory cannot hold it.
    """
    try:
        return module.to(device)
    except RuntimeError as error:
        raise BackendError(f"torch cannot open {graph.name} on {device}: {first_line(error)}") from error
