"""The interface between difftap and a runtime: what a backend must do.

A backend is one small file. It says whether it can run here, and it opens a graph for one profile of shapes, as an
engine: a function from named arrays to named arrays. Every registered backend passes the same contract test.

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
    """Feeds made from real images, on which post-training quantisation measures the ranges of values.

    Attributes:
        chosen: whether the user named the images; if so, an engine calibrated on other images must not be used.
    """

    chosen: bool = False

    @property
    @abstractmethod
    def key(self) -> str:
        """16 hex digits that identify the images."""

    @abstractmethod
    def __call__(self, graph: Graph, profile: Profile) -> Iterator[Mapping[str, Array]]:
        """Yield feeds for a graph, one image at a time (B = 1), with all members of the profile."""


class DeviceArray(ABC):
    """A value in the memory of the device: the output of one engine, to be fed to another on the same device.

    So the encoder's posterior reaches the tapped network without a copy through the host.

    Attributes:
        shape: as of a numpy array.
        dtype: as of a numpy array.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @abstractmethod
    def numpy(self) -> Array:
        """Copy the value to the host."""


Value = Array | DeviceArray
"""One input of an engine."""


class Engine(ABC):
    """A graph made ready to run on one backend. Subclasses implement `_run`, and `close` if they hold resources.

    Attributes:
        graph: what it runs.
        profile: the shapes it takes.
        device: the device that it runs on, which may differ from the one asked for.
        inputs: name, dtype and shape of each input.
        outputs: name, dtype and shape of each output.
        chains: whether `run_on_device` leaves outputs in the device's memory, and `run` accepts such values.
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
        """Run once on feeds that have been checked: arrays, and for an engine that chains also its `DeviceArray`s."""

    def close(self) -> None:  # noqa: B027 - not every engine holds something
        """Release what the engine holds."""

    def run(self, feeds: Mapping[str, Value]) -> dict[str, Array]:
        """Run the network once.

        Args:
            feeds: one array for each input, with the input's dtype and shape; an axis letter has the same length in all
                of them. An engine that `chains` also takes outputs of another engine's `run_on_device`.

        Returns:
            one C-ordered float32 array for each output.

        Raises:
            BackendError: an input is missing, unknown, or of another dtype or shape; or the runtime failed.
            NonFiniteError: an output holds NaN or infinity.
        """
        outputs = self.compute(feeds)
        self.check_finite(outputs)
        return outputs

    def compute(self, feeds: Mapping[str, Value]) -> dict[str, Array]:
        """Run like `run`, but do not check whether the outputs are finite.

        The caller must call `check_finite`; so it can release its turn on the engine first.
        """
        self._check(feeds)
        if self.profile.precision in CALIBRATED:
            # Rounding to a few levels turns NaN into a number, so the outputs would not show it.
            self.check_finite({name: value for name, value in feeds.items() if not isinstance(value, DeviceArray)})
        return self._run(feeds if self.chains else {name: _on_host(value) for name, value in feeds.items()})

    def check_finite(self, arrays: Mapping[str, Array]) -> None:
        """Refuse outputs or inputs that hold NaN or infinity.

        Raises:
            NonFiniteError: an array is not finite.
        """
        given = {spec.name for spec in self.inputs}
        for name, value in arrays.items():
            with np.errstate(all="ignore"):
                # The sum is finite only if all values are, and it needs no array of booleans as large as a map.
                total = value.sum()
            if not np.isfinite(total) and not np.isfinite(value).all():
                bad = int(np.count_nonzero(~np.isfinite(value)))
                kind, advice = ("input", "") if name in given else ("output", "; use a precision with more range")
                raise NonFiniteError(
                    f"{kind} '{name}' of {self.graph.name} of model '{self.graph.model.name}' holds {bad} values "
                    f"that are not finite{advice}"
                )

    def run_on_device(self, feeds: Mapping[str, Value]) -> Mapping[str, Value]:
        """Run like `run`, but leave the outputs in the device's memory if the engine `chains`.

        They are not checked there. Values that are not finite show in the outputs of the engine that they are fed to.
        """
        if not self.chains:
            return self.run(feeds)
        self._check(feeds)
        return self._run_on_device(feeds)

    def _run_on_device(self, feeds: Mapping[str, Value]) -> Mapping[str, Value]:
        """Run once and leave the outputs on the device. Engines that chain implement it."""
        raise NotImplementedError

    def _check(self, feeds: Mapping[str, Value]) -> None:
        """Compare feeds with the inputs' names, dtypes and shapes.

        Raises:
            BackendError: they differ.
        """
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
        name: its name for ``--backend``.
        needs_graph: whether it runs the exported ONNX file; only the torch reference does not.
    """

    name: ClassVar[str]
    needs_graph: ClassVar[bool] = True

    def precisions(self, device: str) -> tuple[str, ...]:
        """List the precisions that it can compute in on a device, fp32 first."""
        return ("fp32",)

    def graph_precision(self, profile: Profile, device: str) -> str:
        """Name the variant of the graph that it opens for a profile (`difftap.export.variants`).

        ``fp32`` is the graph as exported. A runtime that computes in the types that the graph names needs ``fp16`` or
        ``bf16``. A suffix says what becomes of attention: ``-half`` leaves none of it in float32, ``-float`` leaves its
        logits and softmax in float32, ``-fused`` makes it one operator of onnxruntime's.
        """
        return "fp32"

    def builds(self, profile: Profile, device: str) -> bool:
        """Tell whether an engine of this profile has files, made by `build`; else `open` needs only the graph."""
        return False

    def build(
        self, graph: Graph, profile: Profile, device: str, folder: Path, calibration: Calibration | None = None
    ) -> Mapping[str, object]:
        """Write the engine's files into an empty folder; `difftap.engine.builds` keeps them and their manifest.

        Args:
            graph: what is built.
            profile: its shapes and precision.
            device: the device that the files are for.
            folder: the empty folder.
            calibration: feeds of real images, for precisions that need calibration.

        Returns:
            plain data for the manifest, beyond shapes, backend and versions.

        Raises:
            BackendError: the runtime cannot build the graph.
        """
        raise BackendError(f"backend '{self.name}' builds no files for {profile.label} on {device}")

    def identity(self, profile: Profile, device: str) -> Mapping[str, object]:
        """Give the further conditions that a built file must match to be used here: a compute capability, say."""
        return {}

    def fused_attention(self, device: str) -> bool:
        """Tell whether attention runs without its table (heads, cells, cells): then a whole ensemble fits one run."""
        return False

    @abstractmethod
    def missing(self) -> str | None:
        """Give one line on what is missing here and how to get it; None if engines can be opened or built here."""

    def cannot_run(self, device: str) -> str | None:
        """Give one line on why engines for a device can only be built here; None if they also run here."""
        return None

    @abstractmethod
    def devices(self) -> tuple[str, ...]:
        """List the devices that it can use here or build for, best first: ``cuda``, ``cpu``."""

    @abstractmethod
    def version(self) -> str:
        """Give the runtime's version, which is part of every engine's identity."""

    @abstractmethod
    def open(
        self, graph: Graph, profile: Profile, device: str, threads: int | None, built: Path | None = None
    ) -> Engine:
        """Open a graph as an engine, for a profile on a device.

        Args:
            graph: what is opened.
            profile: its shapes and precision.
            device: one of `devices`.
            threads: CPU threads to use; None for the runtime's own choice.
            built: folder of the files that `build` made, if `builds` says that the engine has files.

        Raises:
            BackendError: the runtime cannot open the graph.
        """
