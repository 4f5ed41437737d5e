"""TensorRT-RTX's runtime for tests without a GPU: plans that run as the graphs they were built from.

The builder runs anywhere; what loads a plan and runs it needs a GPU. Here it is ONNX Runtime on the CPU behind the same
classes, strict where the real ones are, or where they fail silently:

- a shape outside the profile, a missing address or one that is not aligned, too little scratch memory: an error;
- work is done when the stream comes to it, and again in every replay, at the addresses of the moment it was enqueued;
- a context must have run before it is captured, and a graph of it is stale once its addresses have changed;
- every run overwrites the scratch memory: nothing else may lie there.

test_plans_on_the_cpu.py holds these classes to the real ones, name by name.
"""

from __future__ import annotations

import ctypes
import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnxruntime as ort
import tensorrt_rtx as trt

from realisid_trt.manifest import Axis, Manifest, Network

CLASSES = ("Runtime", "ICudaEngine", "IRuntimeCache", "IRuntimeConfig", "IExecutionContext", "EngineInspector")
REAL = {name: getattr(trt, name) for name in CLASSES}  # before the first stand-in replaces it
HostFunction = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
ALIGNMENT, HEADER_BYTES = 256, 64
SCRATCH_PER_NUMBER = 3  # bytes of scratch memory per number of the inputs; any will do
DTYPES = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16", "int64": "INT64"}
failures: list[str] = []  # of work on the stream, which cannot raise
CAPTURABLE = True
invalid = 0  # a bit of EngineInvalidityDiagnostics to say of every plan
_plans: dict[str, tuple[Manifest, Network, str]] = {}  # by the plan's hash: whose it is, and its graph


def know(manifest: Manifest) -> None:
    """Makes the plans of an engine run as their graphs from now on."""
    for build in manifest.builds.values():
        if build.backend == "tensorrt-rtx":
            for name, network in manifest.networks(build).items():
                graph = manifest.values["networks"][name]["builds"][build.id]["onnx"]
                _plans[manifest.values["files"][network.file]["sha256"]] = manifest, network, graph


class Runtime:
    def __init__(self, logger: trt.ILogger) -> None:
        assert isinstance(logger, trt.ILogger)
        self.logger = logger

    @property
    def engine_header_size(self) -> int:
        return HEADER_BYTES

    def get_engine_validity(self, buffer: Any) -> tuple[Any, int]:
        assert len(buffer) == HEADER_BYTES
        well_formed = bytes(buffer[:4]) == b"vtrt"
        bits = invalid if well_formed else int(trt.EngineInvalidityDiagnostics.MALFORMED_ENGINE)
        return (trt.EngineValidity.INVALID if bits else trt.EngineValidity.VALID), bits

    def deserialize_cuda_engine(self, serialized_engine: Any) -> ICudaEngine | None:
        known = _plans.get(hashlib.sha256(serialized_engine).hexdigest())
        if known is None:
            self.logger.log(trt.ILogger.ERROR, "IRuntime::deserializeCudaEngine: Error Code 1: Serialization")
            return None
        return ICudaEngine(self.logger, *known)


class ICudaEngine:
    def __init__(self, logger: trt.ILogger, manifest: Manifest, network: Network, graph: str) -> None:
        self.logger, self.network = logger, network
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 3
        self.session = ort.InferenceSession(str(manifest.path / graph), options, providers=["CPUExecutionProvider"])
        self.ports = {port.name: port for port in (*network.inputs, *network.outputs)}

    @property
    def num_io_tensors(self) -> int:
        return len(self.ports)

    def get_tensor_name(self, index: int) -> str:
        return list(self.ports)[index]

    def get_tensor_dtype(self, name: str) -> trt.DataType:
        return getattr(trt.DataType, DTYPES[self.ports[name].dtype])

    @property
    def device_memory_size_v2(self) -> int:
        most = [[axis.max if isinstance(axis, Axis) else axis for axis in port.shape] for port in self.network.inputs]
        return SCRATCH_PER_NUMBER * sum(map(math.prod, most))

    def create_engine_inspector(self) -> EngineInspector:
        return EngineInspector()

    def create_runtime_config(self) -> IRuntimeConfig:
        return IRuntimeConfig()

    def create_execution_context(self, runtime_config: IRuntimeConfig) -> IExecutionContext:
        return IExecutionContext(self, runtime_config)


class EngineInspector:
    def get_engine_information(self, format: Any) -> str:
        assert format == trt.LayerInformationFormat.JSON
        return '{"Layers": [{"Name": "fused", "Outputs": [{"Name": "y", "Format/Datatype": "Half"}]}]}'


class IRuntimeCache:
    def __init__(self) -> None:
        self.content = b"compiled:"

    def serialize(self) -> bytes:
        return self.content

    def deserialize(self, blob: Any) -> bool:
        fits = bytes(blob[:9]) == b"compiled:"
        self.content = bytes(blob) if fits else self.content
        return fits


class IRuntimeConfig:
    def __init__(self) -> None:
        self.strategy = trt.ExecutionContextAllocationStrategy.STATIC
        self.cache: IRuntimeCache | None = None
        self.cuda_graph_strategy = trt.CudaGraphStrategy.DISABLED

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        assert isinstance(strategy, trt.ExecutionContextAllocationStrategy)
        self.strategy = strategy

    def create_runtime_cache(self) -> IRuntimeCache:
        return IRuntimeCache()

    def set_runtime_cache(self, cache: IRuntimeCache) -> bool:
        self.cache = cache
        return True


class IExecutionContext:
    def __init__(self, engine: ICudaEngine, config: IRuntimeConfig) -> None:
        assert config.strategy == trt.ExecutionContextAllocationStrategy.USER_MANAGED
        assert config.cache is not None and config.cuda_graph_strategy == trt.CudaGraphStrategy.DISABLED
        self.engine, self.cache = engine, config.cache
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.scratch = 0, 0
        self.ran = False
        self.generation, self.reached = 0, 0  # of addresses: as they were set, and as the stream has come to them
        self.kept: list[Any] = []  # host functions that graphs still point to

    def _error(self, line: str) -> bool:
        self.engine.logger.log(trt.ILogger.ERROR, f"IExecutionContext: Error Code 3: API Usage Error ({line})")
        return False

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert type(shape) in (tuple, list)
        port = self.engine.ports[name]
        admitted = len(shape) == len(port.shape) and all(
            size.min <= given <= size.max if isinstance(size, Axis) else size == given
            for given, size in zip(shape, port.shape, strict=True)
        )
        if not admitted:
            return self._error(f"{name} {shape} is outside of the profile")
        self.shapes[name] = tuple(shape)
        self.ran = False
        return True

    def infer_shapes(self) -> list[str]:
        return [port.name for port in self.engine.network.inputs if port.name not in self.shapes]

    def update_device_memory_size_for_shapes(self) -> int:
        assert not self.infer_shapes()
        return SCRATCH_PER_NUMBER * sum(map(math.prod, self.shapes.values()))

    def set_tensor_address(self, name: str, memory: int) -> bool:
        assert type(memory) is int
        if name not in self.engine.ports or memory % ALIGNMENT:
            return self._error(f"{name} at {memory:#x}")
        self._move(self.addresses.get(name) != memory)
        self.addresses[name] = memory
        return True

    def set_device_memory(self, memory: int, size: int) -> None:
        assert type(memory) is int and type(size) is int
        self._move(self.scratch != (memory, size))
        self.scratch = memory, size

    def _move(self, moved: bool) -> None:
        self.generation += moved

    def is_stream_capturable(self, stream: int) -> bool:
        assert type(stream) is int
        return CAPTURABLE

    def execute_async_v3(self, stream_handle: int) -> bool:
        from cuda.bindings import driver

        assert type(stream_handle) is int
        missing = set(self.engine.ports) - set(self.addresses)
        if self.infer_shapes() or missing:
            return self._error(f"no address of {', '.join(sorted(missing))}")
        memory, size = self.scratch
        if memory == 0 or memory % ALIGNMENT or size < self.update_device_memory_size_for_shapes():
            return self._error(f"{size} bytes of scratch memory")
        _, capturing, *_ = driver.cuStreamGetCaptureInfo(stream_handle)
        captured = capturing == driver.CUstreamCaptureStatus.CU_STREAM_CAPTURE_STATUS_ACTIVE
        if captured and not self.ran:
            return self._error("a first run cannot be captured")
        function = HostFunction(self._work(captured))
        self.kept.append(function)
        address = ctypes.cast(function, ctypes.c_void_p).value
        (status,) = driver.cuLaunchHostFunc(stream_handle, driver.CUhostFn(address), 0)
        assert status == driver.CUresult.CUDA_SUCCESS, status
        if not self.ran:
            self.cache.content += self.engine.network.name.encode() + b";"
        self.ran = True
        return True

    def _work(self, captured: bool) -> Callable[[Any], None]:
        """The work as the GPU would do it, with addresses and shapes of this moment."""
        network, session, generation = self.engine.network, self.engine.session, self.generation
        addresses, (scratch, size) = dict(self.addresses), self.scratch
        shapes = self.shapes | network.output_shapes(self.shapes)

        def work(_: Any) -> None:
            try:
                if not captured:
                    self.reached = generation
                elif self.reached != generation:
                    raise AssertionError(f"a stale graph of {network.name} was replayed")
                ctypes.memset(scratch, 0xA5, size)
                feed = {port.name: _at(addresses[port.name], shapes[port.name], port.dtype) for port in network.inputs}
                for port, output in zip(network.outputs, session.run(None, feed), strict=True):
                    _at(addresses[port.name], shapes[port.name], port.dtype)[...] = output
            except BaseException as error:  # no caller would get the exception
                failures.append(f"{network.name}: {error}")

        return work


def _at(address: int, shape: Sequence[int], dtype: str) -> Any:
    kind = np.dtype(dtype)
    count = math.prod(shape)
    content = (ctypes.c_char * (count * kind.itemsize)).from_address(address)
    return np.frombuffer(content, kind, count).reshape(shape)
