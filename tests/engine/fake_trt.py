"""A TensorRT that runs on a CPU: it records what it is told, and onnxruntime does the arithmetic.

Only what difftap uses is here, with the real library's names, argument orders and return values. Tensors are read and
written at the addresses given, as the real one does; an engine whose weights were stripped computes NaN until they
are put back.
"""

from __future__ import annotations

import ctypes
import enum
import json
from types import SimpleNamespace

import numpy as np


class Flag(enum.IntEnum):
    TF32 = 0
    STRIP_PLAN = 1
    REFIT_IDENTICAL = 2


class Creation(enum.IntEnum):
    STRONGLY_TYPED = 1


class Severity(enum.Enum):
    INTERNAL_ERROR = 0
    ERROR = 1
    WARNING = 2


class ILogger:
    INTERNAL_ERROR, ERROR, WARNING = Severity.INTERNAL_ERROR, Severity.ERROR, Severity.WARNING


class Blob(bytes):
    def serialize(self):
        return self


class Tensor:
    def __init__(self, name, shape):
        self.name, self.shape = name, shape


class Config:
    def __init__(self, fake):
        self.fake, self.flags, self.profiles, self.capabilities = fake, {Flag.TF32}, [], {}
        self.hardware_compatibility_level, self.num_compute_capabilities = "unset", 0

    def set_flag(self, flag):
        self.flags.add(flag)

    def clear_flag(self, flag):
        self.flags.discard(flag)

    def add_optimization_profile(self, profile):
        self.profiles.append(profile)
        return 0

    def set_compute_capability(self, capability, index):
        self.capabilities[index] = capability
        return 0 <= index < self.num_compute_capabilities

    def create_timing_cache(self, content):
        return Blob(content)

    def set_timing_cache(self, cache, ignore_mismatch):
        self.timings = cache
        return not (cache and not cache.startswith(b"timed")) or ignore_mismatch

    def get_timing_cache(self):
        return Blob(b"timed" + self.timings.removeprefix(b"timed") + b".")


class Profile(dict):
    def set_shape(self, name, low, best, high):
        self[name] = (low, best, high)


class Network:
    def __init__(self, flags):
        self.flags, self.path, self.inputs = flags, None, []

    @property
    def num_inputs(self):
        return len(self.inputs)

    def get_input(self, index):
        return self.inputs[index]


class Fake:
    """The module; ``calls`` holds what happened, ``fails`` the steps that are to go wrong."""

    __version__ = "11.0-fake"
    BuilderFlag, NetworkDefinitionCreationFlag, ILogger = Flag, Creation, ILogger
    HardwareCompatibilityLevel = SimpleNamespace(NONE="none", SAME_COMPUTE_CAPABILITY="same", AMPERE_PLUS="ampere")
    ComputeCapability = SimpleNamespace(SM75=75, SM80=80, SM86=86, SM89=89, SM120=120, SM121=121)
    CudaGraphStrategy = SimpleNamespace(WHOLE_GRAPH_CAPTURE="whole")
    DynamicShapesKernelSpecializationStrategy = SimpleNamespace(EAGER="eager")

    def __init__(self, name="tensorrt"):
        self.__name__, self.calls, self.fails, self.configs = name, [], set(), []

    def Builder(self, logger):
        fake = self

        class Builder:
            def create_network(self, flags):
                return Network(flags)

            def create_builder_config(self):
                fake.configs.append(Config(fake))
                return fake.configs[-1]

            def create_optimization_profile(self):
                return Profile()

            def build_serialized_network(self, network, config):
                fake.calls.append("build")
                if "build" in fake.fails:
                    logger.log(Severity.ERROR, "no tactic\nfor this")
                    return None
                assert network.flags == 1 << Creation.STRONGLY_TYPED
                fixed = {tensor.name: list(tensor.shape) for tensor in network.inputs}
                ranges = dict(config.profiles[0]) if config.profiles else {}
                assert all((-1 in shape) == (name in ranges) for name, shape in fixed.items())
                plan = {"onnx": network.path, "stripped": Flag.STRIP_PLAN in config.flags, "fixed": fixed}
                return json.dumps({**plan, "ranges": ranges}).encode()

        return Builder()

    def OnnxParser(self, network, logger):
        fake = self

        class Parser:
            num_errors = 1

            def parse_from_file(self, path):
                import onnx

                if "parse" in fake.fails:
                    return False
                network.path = path
                network.inputs = [Tensor(v.name, ()) for v in onnx.load(path, load_external_data=False).graph.input]
                return True

            def get_error(self, index):
                return SimpleNamespace(desc=lambda: "not a graph")

        return Parser()

    def Runtime(self, logger):
        fake = self

        class Runtime:
            def deserialize_cuda_engine(self, content):
                fake.calls.append("deserialize")
                if "deserialize" in fake.fails:
                    logger.log(Severity.ERROR, "wrong version")
                    return None
                return Engine(fake, json.loads(content))

        return Runtime()

    def Refitter(self, engine, logger):
        return SimpleNamespace(engine=engine, refit_cuda_engine=lambda: "refit" not in self.fails)

    def OnnxParserRefitter(self, refitter, logger):
        def refit(path):
            self.calls.append("refit")
            refitter.engine.whole = "refit" not in self.fails and path == refitter.engine.plan["onnx"]
            return refitter.engine.whole

        return SimpleNamespace(refit_from_file=refit)


class Engine:
    def __init__(self, fake, plan):
        import onnxruntime

        self.fake, self.plan, self.whole = fake, plan, not plan["stripped"]
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(plan["onnx"], options, providers=["CPUExecutionProvider"])
        self.names = [v.name for v in (*self.session.get_inputs(), *self.session.get_outputs())]

    @property
    def num_io_tensors(self):
        return len(self.names)

    def get_tensor_name(self, index):
        return self.names[index]

    def create_runtime_config(self):
        kernels = SimpleNamespace(content=b"")

        def deserialize(content):
            kernels.content = content
            return True

        kernels.deserialize, kernels.serialize = deserialize, lambda: kernels.content + b"k"
        return SimpleNamespace(create_runtime_cache=lambda: kernels, set_runtime_cache=lambda cache: True)

    def create_execution_context(self, config=None):
        return None if "context" in self.fake.fails else Context(self, config)


class Context:
    def __init__(self, engine, config):
        self.engine, self.config, self.shapes, self.addresses = engine, config, {}, {}

    def set_input_shape(self, name, shape):
        plan = self.engine.plan
        low, _, high = plan["ranges"].get(name, (plan["fixed"][name],) * 3)
        self.shapes[name] = tuple(shape)
        return all(a <= side <= b for a, side, b in zip(low, shape, high, strict=True))

    def get_tensor_shape(self, name):
        zeros = {v.name: np.zeros(self.shapes[v.name], self._dtype(v)) for v in self.engine.session.get_inputs()}
        return self.engine.session.run([name], zeros)[0].shape

    def set_tensor_address(self, name, address):
        self.addresses[name] = address
        return True

    def _dtype(self, value):
        return np.int64 if "int64" in value.type else np.float32

    def _at(self, name, shape, dtype):
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        memory = (ctypes.c_char * size).from_address(self.addresses[name])
        return np.frombuffer(memory, dtype).reshape(shape)

    def execute_async_v3(self, stream):
        self.engine.fake.calls.append("execute")
        if "execute" in self.engine.fake.fails:
            return False
        session = self.engine.session
        feeds = {v.name: self._at(v.name, self.shapes[v.name], self._dtype(v)) for v in session.get_inputs()}
        names = [v.name for v in session.get_outputs()]
        for name, value in zip(names, session.run(names, feeds), strict=True):
            self._at(name, value.shape, np.float32)[...] = value if self.engine.whole else np.nan
        return True


class HostMemory:
    """`difftap.engine.trt.engine.GpuMemory` with the host's memory for the GPU's, and calls for a captured graph."""

    stream = 7

    def __init__(self):
        self.captured = self.replayed = 0

    def empty(self, shape, dtype):
        import torch

        return torch.empty(shape, dtype=getattr(torch, dtype))

    def fill(self, target, source):
        target.copy_(source)

    def capture(self, launch):
        self.captured += 1

        def replay():
            self.replayed += 1
            launch()

        return replay

    def publish(self):
        pass
