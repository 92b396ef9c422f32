"""OpenVINO: Intel's CPUs and GPUs, and any other x86-64 or ARM CPU; float32, half precisions, and int8 through nncf.

Shapes are static. On a CPU a network is compiled for one image, and runs a batch image by image; on a GPU it is
compiled for each batch size that occurs.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from difftap.engine.backend import Array, Backend, Calibration, Engine, Graph, Profile
from difftap.engine.bf16x3 import check_kept, split_products
from difftap.errors import BackendError, OutputError, first_line, require

if TYPE_CHECKING:
    from openvino import Core, InferRequest, Model

__all__ = ["OpenVinoBackend"]


def read_network(core: Core, path: Path | None) -> Model:
    """Read an ONNX file, or a file in OpenVINO's own format.

    Raises:
        BackendError: it cannot be read.
    """
    try:
        return core.read_model(path)
    except (RuntimeError, TypeError) as error:
        raise BackendError(f"openvino cannot open '{path}': {reason(error)}") from error


def fix_shapes(model: Model, graph: Graph, profile: Profile, batch: int) -> None:
    """Set a network's input shapes to those of a profile, for ``batch`` images."""
    letters = {"B": batch, **profile.axes(graph.model)}
    used = {value.get_any_name() for value in model.inputs}
    model.reshape({s.name: [letters.get(str(a), a) for a in s.shape] for s in graph.inputs if s.name in used})


def quantise(model: Model, feeds: Sequence[Mapping[str, Array]], graph: Graph) -> tuple[Model, dict[str, str]]:
    """Quantise an OpenVINO model with static shapes to int8; layers that nncf does not quantise stay float.

    A tapped network is quantised as a transformer: SmoothQuant (Xiao et al. 2023) moves outliers of activations into
    weights, and activations are asymmetric, because SiLU and GELU are. For the VAE's convolutions symmetric activations
    are enough.

    Returns:
        the quantised model, and entries for the engine's manifest.

    Raises:
        MissingExtraError: nncf is not installed.
        BackendError: it cannot quantise the model.
    """
    nncf = require("nncf", "openvino", "quantising to int8")
    nncf.set_log_level(logging.ERROR)
    tapped = bool(graph.taps)
    try:
        with contextlib.redirect_stdout(sys.stderr):  # nncf prints progress bars, and stdout is for data
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
    """Pick the line of OpenVINO's error that says what is wrong; its first lines name places in OpenVINO's source."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if not line.startswith(("Exception from", "Check '", "While validating"))]
    return first_line(RuntimeError(telling[0])) if telling else first_line(error)


_DEVICES = {"cpu": "CPU", "intel-gpu": "GPU"}

# The hint is always given: without it OpenVINO computes in bf16 on CPUs that have it, and in f16 on GPUs.
_HINTS = {"fp32": "f32", "bf16x3": "bf16", "bf16": "bf16", "fp16": "f16"}

_CAPABILITIES = {"BF16": "bf16", "FP16": "fp16", "INT8": "int8"}

_MODEL = "model.xml"


class OpenVinoEngine(Engine):
    """One network, compiled once for each batch size that was run."""

    def __init__(
        self, graph: Graph, profile: Profile, device: str, core: Core, model: Model, config: dict[str, str | int]
    ):
        super().__init__(graph, profile, device)
        self._core = core
        self._model: Model | None = model
        self._config = config
        self._step = 1 if device == "cpu" else profile.batch
        self._requests: dict[int, InferRequest] = {}
        self._request(model, self._step)  # compiling fails here, and not at the first image

    def _request(self, model: Model, batch: int) -> InferRequest:
        if batch not in self._requests:
            model = model.clone()  # fixing shapes changes it
            fix_shapes(model, self.graph, self.profile, batch)
            if self.profile.precision == "bf16x3":
                model = split_products(self._core, model)
            compiled = self._core.compile_model(model, _DEVICES[self.device], self._config)
            if self.profile.precision == "bf16x3":
                check_kept(compiled, self.graph.name)
            self._requests[batch] = compiled.create_infer_request()
        return self._requests[batch]

    def _run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        model = self._model
        if model is None:
            raise BackendError(f"the engine of {self.graph.name} is closed; open it again")
        # The exporter drops inputs that no tap depends on (a prompt, for a tap before the first attention).
        used = {name: feeds[name] for name in (value.get_any_name() for value in model.inputs)}
        count = len(feeds[self.inputs[0].name])
        parts: dict[str, list[Array]] = {spec.name: [] for spec in self.outputs}
        try:
            for start in range(0, count, self._step):
                part = {k: np.ascontiguousarray(v[start : start + self._step]) for k, v in used.items()}
                result = self._request(model, min(self._step, count - start)).infer(part, share_inputs=True)
                for name, values in parts.items():
                    values.append(np.array(result[name], np.float32, order="C"))
        except RuntimeError as error:
            raise BackendError(f"openvino failed on {self.graph.name}: {reason(error)}") from error
        return {name: values[0] if len(values) == 1 else np.concatenate(values) for name, values in parts.items()}

    def close(self) -> None:
        self._model = None
        self._requests = {}


class OpenVinoBackend(Backend):
    """OpenVINO."""

    name = "openvino"

    def missing(self) -> str | None:
        try:
            import openvino  # noqa: F401
        except ImportError as error:
            return f"backend 'openvino' needs openvino ({error}); pip install 'difftap[openvino]'"
        return None

    def devices(self) -> tuple[str, ...]:
        import openvino

        present = {name.split(".")[0] for name in openvino.Core().available_devices}  # two GPUs are GPU.0 and GPU.1
        return tuple(device for device, name in _DEVICES.items() if name in present)

    def version(self) -> str:
        import openvino

        return str(openvino.__version__)

    def precisions(self, device: str) -> tuple[str, ...]:
        can = self._capabilities(device)
        split = ("bf16x3",) if device == "cpu" and "BF16" in can else ()
        return ("fp32", *split, *(precision for name, precision in _CAPABILITIES.items() if name in can))

    def _capabilities(self, device: str) -> tuple[str, ...]:
        import openvino

        return tuple(openvino.Core().get_property(_DEVICES[device], "OPTIMIZATION_CAPABILITIES"))

    def builds(self, profile: Profile, device: str) -> bool:
        return profile.precision == "int8"

    def build(
        self, graph: Graph, profile: Profile, device: str, folder: Path, calibration: Calibration | None = None
    ) -> Mapping[str, object]:
        """Quantise weights and activations to int8 on the calibration's feeds; see `quantise`."""
        import openvino

        require("nncf", "openvino", "quantising to int8")  # fail before anything slow starts
        if calibration is None:
            raise BackendError(f"quantising {graph.name} to int8 needs images to calibrate on; got none")
        model = read_network(openvino.Core(), graph.path)
        fix_shapes(model, graph, profile, 1)
        names = {value.get_any_name() for value in model.inputs}
        feeds = [{name: array for name, array in one.items() if name in names} for one in calibration(graph, profile)]
        quantised, details = quantise(model, feeds, graph)
        try:
            openvino.save_model(quantised, folder / _MODEL, compress_to_fp16=False)
        except RuntimeError as error:
            raise OutputError(f"cannot write '{folder}': {reason(error)}; is the disk full?") from error
        return {**details, "images": len(feeds), "calibration": calibration.key}

    def open(
        self, graph: Graph, profile: Profile, device: str, threads: int | None, built: Path | None = None
    ) -> Engine:
        import openvino

        core = openvino.Core()
        model = read_network(core, built / _MODEL if built else graph.path)
        hint = _HINTS.get(profile.precision)
        if hint is None:  # int8: layers that stayed float compute in bf16 where that is fast
            hint = "bf16" if "BF16" in self._capabilities(device) else "f32"
        # LATENCY: all cores work on one image. The hint for throughput would run several images at once.
        config: dict[str, str | int] = {"INFERENCE_PRECISION_HINT": hint, "PERFORMANCE_HINT": "LATENCY"}
        if device == "cpu" and threads:
            config["INFERENCE_NUM_THREADS"] = threads
        try:
            return OpenVinoEngine(graph, profile, device, core, model, config)
        except BackendError:
            raise
        except RuntimeError as error:
            raise BackendError(f"openvino cannot open '{graph.path}': {reason(error)}") from error
