"""The seam between difftap and a runtime: what a backend must do.

A backend is one small file: it says whether it can run here, opens a graph for one shape profile, and gives back an
engine that turns named arrays into named arrays. Every registered backend passes the same contract test.

Axis letters: B batch of images, E ensemble members, C channels, H W image pixels, h w cells, T prompt tokens, D width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from difftap.engine.graph import (
    CALIBRATED,
    PRECISIONS,
    Array,
    Graph,
    Profile,
)
from difftap.errors import BackendError, NonFiniteError
from difftap.tensorspec import TensorSpec

__all__ = [
    "CALIBRATED",
    "PRECISIONS",
    "Array",
    "Backend",
    "Calibration",
    "DeviceArray",
    "Engine",
    "Graph",
    "Profile",
    "TensorSpec",
    "Value",
]


class Calibration(ABC):
    """Feeds of real images: what post-training quantisation measures ranges on.

    Attributes:
        chosen: whether the user named the images; then an engine calibrated on others is not the one meant.
    """

    chosen: bool = False

    @property
    @abstractmethod
    def key(self) -> str:
        """16 hex digits that stand for the images."""

    @abstractmethod
    def __call__(self, graph: Graph, profile: Profile) -> Iterator[Mapping[str, Array]]:
        """Yield feeds of a graph, one image at a time (B = 1) with all members of the profile."""


class DeviceArray(ABC):
    """A value that lies where an engine runs: one engine's output, fed to another of the same backend and device.

    Attributes:
        shape: as of an array.
        dtype: as of an array.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @abstractmethod
    def numpy(self) -> Array:
        """Make a copy on the host."""


Value = Array | DeviceArray
"""What an engine is fed."""


class Engine(ABC):
    """A graph made ready to run. Subclasses implement `_run` and `close`.

    Attributes:
        graph: what it runs.
        profile: the shapes it takes.
        device: where it really runs, whatever was asked for.
        inputs: what it is fed.
        outputs: what it gives.
        chains: whether `run_on_device` leaves its outputs where it runs, and `run` takes such values.
    """

    chains: bool = False

    def __init__(self, graph: Graph, profile: Profile, device: str) -> None:
        self.graph = graph
        self.profile = profile
        self.device = device
        self.inputs = graph.inputs
        self.outputs = graph.outputs

    @abstractmethod
    def _run(self, feeds: Mapping[str, Any]) -> dict[str, Array]:
        """Run once; the feeds have been checked."""

    def close(self) -> None:  # noqa: B027 - not every engine holds something
        """Release what the engine holds."""

    def run(self, feeds: Mapping[str, Value]) -> dict[str, Array]:
        """Run the network once.

        Args:
            feeds: one array for every input, with its dtype and shape; letters agree across inputs. An engine that
                `chains` also takes what another one's `run_on_device` gave.

        Returns:
            One C-ordered float32 array for every output.

        Raises:
            BackendError: an input is missing, unknown, or of another dtype or shape; or the runtime failed.
            NonFiniteError: an output holds NaN or infinity.
        """
        outputs = self.compute(feeds)
        self.check_finite(outputs)
        return outputs

    def compute(self, feeds: Mapping[str, Value]) -> dict[str, Array]:
        """As `run`, but nobody has looked at the outputs yet: for who has `check_finite` do it while others compute."""
        self._check(feeds)
        if self.profile.precision in CALIBRATED:
            # Rounding to a few levels makes a number of everything, so nothing would show in the outputs.
            self.check_finite({name: value for name, value in feeds.items() if not isinstance(value, DeviceArray)})
        return self._run(feeds if self.chains else {name: _on_host(value) for name, value in feeds.items()})

    def check_finite(self, arrays: Mapping[str, Array]) -> None:
        """Refuse outputs, or inputs, that hold NaN or infinity.

        Raises:
            NonFiniteError: they do.
        """
        given = {spec.name for spec in self.inputs}
        for name, value in arrays.items():
            with np.errstate(all="ignore"):
                total = value.sum()  # finite only if all are; a table of which are would cost as much again to free
            if not np.isfinite(total) and not np.isfinite(value).all():
                bad = int(np.count_nonzero(~np.isfinite(value)))
                kind, advice = ("input", "") if name in given else ("output", "; use a precision with more range")
                raise NonFiniteError(
                    f"{kind} '{name}' of {self.graph.name} of model '{self.graph.model.name}' holds {bad} values "
                    f"that are not finite{advice}"
                )

    def run_on_device(self, feeds: Mapping[str, Value]) -> Mapping[str, Value]:
        """Like `run`, but an engine that `chains` leaves its outputs on its device.

        Nobody looks at values there: ones that are not finite show in the outputs of the engine that is fed them.
        """
        if not self.chains:
            return self.run(feeds)
        self._check(feeds)
        return self._run_on_device(feeds)

    def _run_on_device(self, feeds: Mapping[str, Value]) -> Mapping[str, Value]:
        """Run once and leave the outputs on the device; for engines that chain."""
        raise NotImplementedError

    def _check(self, feeds: Mapping[str, Value]) -> None:
        wanted = [spec.name for spec in self.inputs]
        if set(feeds) != set(wanted):
            raise BackendError(
                f"{self.graph.name} takes the inputs {', '.join(wanted)}; got {', '.join(feeds) or 'none'}"
            )
        letters = self.profile.axes(self.graph.model)  # the batch comes from the first array seen
        for spec in self.inputs:
            array = feeds[spec.name]
            letters.setdefault("B", array.shape[0] if array.ndim else 0)
            shape = tuple(letters[axis] if isinstance(axis, str) else axis for axis in spec.shape)
            if array.dtype != np.dtype(spec.dtype) or array.shape != shape:
                raise BackendError(
                    f"input '{spec.name}' of {self.graph.name} is {array.dtype} {array.shape}; "
                    f"wanted {spec.dtype} {shape} = ({', '.join(map(str, spec.shape))})"
                )
        if not 1 <= letters["B"] <= self.profile.batch:
            raise BackendError(f"a batch of {letters['B']} images; this engine takes 1 to {self.profile.batch}")

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _on_host(value: Value) -> Array:
    return value.numpy() if isinstance(value, DeviceArray) else value


class Backend(ABC):
    """A runtime.

    Attributes:
        name: what ``--backend`` calls it.
        needs_graph: whether it runs the exported ONNX file (all do, but for the torch reference).
    """

    name: ClassVar[str]
    needs_graph: ClassVar[bool] = True

    def precisions(self, device: str) -> tuple[str, ...]:
        """List what it can compute in on a device, exact first."""
        return ("fp32",)

    def graph_precision(self, profile: Profile, device: str) -> str:
        """Name the types of the graph it opens for a profile: a half type, if it computes in what the graph says.

        ``fp16-half`` leaves nothing of attention in float32, ``fp16-float`` its logits too; ``fp32-fused`` and
        ``fp16-fused`` have attention as one operator of onnxruntime's (`difftap.export.variants`).
        """
        return "fp32"

    def builds(self, profile: Profile, device: str) -> bool:
        """Whether such an engine is files made beforehand by `build`; else `open` needs the graph alone."""
        return False

    def build(
        self, graph: Graph, profile: Profile, device: str, folder: Path, calibration: Calibration | None = None
    ) -> Mapping[str, Any]:
        """Make the engine's files in an empty folder; `difftap.engine.builds` keeps them and their manifest.

        Args:
            calibration: feeds of real images, for precisions that are calibrated.

        Returns:
            What the manifest should say beyond shapes, backend and versions: plain data.

        Raises:
            BackendError: the runtime cannot build the graph.
        """
        raise BackendError(f"backend '{self.name}' builds no files for {profile.label} on {device}")

    def identity(self, profile: Profile, device: str) -> Mapping[str, Any]:
        """Say what else a built file must have been made with to be used here (a GPU's compute capability, say)."""
        return {}

    def fused_attention(self, device: str) -> bool:
        """Whether attention never writes its table of (heads, cells, cells), so that a whole ensemble fits one run."""
        return False

    @abstractmethod
    def missing(self) -> str | None:
        """None if the backend can open or build engines here, else one line: what is missing, how to get it."""

    def cannot_run(self, device: str) -> str | None:
        """None if engines for a device run here, else one line that says why they can only be built here."""
        return None

    @abstractmethod
    def devices(self) -> tuple[str, ...]:
        """List the devices it can use here, or build for, best first: ``cpu``, ``cuda``."""

    @abstractmethod
    def version(self) -> str:
        """Say the runtime's version: part of every engine's identity."""

    @abstractmethod
    def open(
        self, graph: Graph, profile: Profile, device: str, threads: int | None, built: Path | None = None
    ) -> Engine:
        """Make a graph ready for a profile on a device.

        Args:
            threads: CPU threads to use; None for the runtime's own choice.
            built: folder of the files that `build` made, where `builds` says that there are some.

        Raises:
            BackendError: the runtime cannot open the graph.
        """
