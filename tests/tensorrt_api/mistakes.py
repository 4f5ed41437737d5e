"""Mistakes made on purpose, each beside the releases in which it is one, and beside each what is right in all.

Never run and never imported. A check that does not find exactly these lines has not seen TensorRT's signatures.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import tensorrt as trt
    import tensorrt_rtx as rtx


def made_with(logger: trt.ILogger, flavour: object) -> trt.IHostMemory:
    """The module is bound inside the function, as our code does."""
    if TYPE_CHECKING:
        import tensorrt as trt
    else:
        trt = flavour.module
    builder = trt.Builder(logger)
    trt.Builder(None)  # wrong in all
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH))  # wrong in 11.4, RTX 1.7
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(Path("core.onnx"))):
        print(parser.get_error(0).desc())
        print(parser.get_error(0).description())  # wrong in all
    parser.parse_from_file(Path("core.onnx"))  # wrong in all
    parser.supports_model(b"")  # wrong in 11.4, RTX 1.7
    tensor = network.get_input(0)
    tensor.dtype = trt.DataType.HALF  # wrong in 11.4, RTX 1.7
    print(sum(tensor.shape), tuple(tensor.shape)[0] + 1, tensor.shape[0] + 1, tensor.shape == (1, 4))
    print(tuple(tensor.shape)[0] + "")  # wrong in all
    plan = builder.build_serialized_network(network, builder.create_builder_config())
    print(plan.nbytes)  # wrong in all
    if plan is None:
        raise RuntimeError("None is how a build fails")
    print(len(plan))  # wrong in all
    print(plan.nbytes + len(bytes(plan)))
    return plan


def configured(config: trt.IBuilderConfig, profile: trt.IOptimizationProfile, cache: trt.ITimingCache) -> None:
    if TYPE_CHECKING:
        import tensorrt as trt
    config.set_flag(trt.BuilderFlag.TF32)
    config.set_flag(trt.BuilderFlag.FP16)  # wrong in 11.4, RTX 1.7
    config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)  # wrong in 10.16, 11.4
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, 1 << 30)
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, 1e9)  # wrong in all
    config.set_memory_pool_limit(pool=trt.MemoryPoolType.WORKSPACE, limit=1)  # wrong in all
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACES, 1)  # wrong in all
    config.set_timing_cache(cache, ignore_mismatch=True)
    config.set_timing_cache(cache)  # wrong in all
    config.num_compute_capabilities = 1  # wrong in 10.16, 11.4
    profile.set_shape("latents", (1, 4), min((2, 4), (3, 4)), trt.Dims([4, 4]))
    profile.set_shape("latents", np.ones(2), (2, 4), [4, 4])  # wrong in all


def only_of_rtx(config: rtx.IBuilderConfig, settings: rtx.IRuntimeConfig, runtime: rtx.Runtime) -> None:
    if TYPE_CHECKING:
        import tensorrt as trt
        import tensorrt_rtx as rtx
    config.set_compute_capability(rtx.ComputeCapability.SM89, 0)
    config.set_compute_capability(0, rtx.ComputeCapability.SM89)  # wrong in all
    print(rtx.ComputeCapability.SM90)  # wrong in all
    print(trt.ComputeCapability.SM89)  # wrong in 10.16, 11.4
    cache = settings.create_runtime_cache()
    print(cache.deserialize(b""), bytes(cache.serialize()), settings.set_runtime_cache(cache))
    cache.deserialize("cache")  # wrong in all
    settings.cuda_graph_strategy = rtx.CudaGraphStrategy.DISABLED
    settings.cuda_graph_strategy = False  # wrong in all
    print(runtime.get_engine_validity(b"")[0] == rtx.EngineValidity.VALID)


def executed(runtime: trt.Runtime, plan: trt.IHostMemory) -> str:
    if TYPE_CHECKING:
        import tensorrt as trt
    engine = runtime.deserialize_cuda_engine(memoryview(plan)) or runtime.deserialize_cuda_engine(plan)
    print(engine.num_layers)  # wrong in all
    assert engine is not None
    print(engine.device_memory_size_v2)
    print(engine.device_memory_size)  # wrong in 11.4, RTX 1.7
    print(engine.get_tensor_mode("latents") == trt.TensorIOMode.INPUT)
    settings = engine.create_runtime_config()
    print(settings.create_runtime_cache())  # wrong in 10.16, 11.4
    context = engine.create_execution_context(settings)
    context.infer_shapes()  # wrong in all
    assert context is not None
    context = engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
    engine.create_execution_context(strategy=settings)  # wrong in all
    engine.create_execution_context_without_device_memory()  # wrong in 11.4, RTX 1.7
    assert context is not None
    context.set_device_memory(0, size=1 << 20)
    context.set_device_memory(0)  # wrong in all
    done: bool = context.set_input_shape("latents", (1, 4)) and context.execute_async_v3(stream_handle=0)
    missing: bool = context.infer_shapes()  # wrong in all
    context.execute_async_v3(stream=0)  # wrong in all
    context.set_tensor_address("latents", None)  # wrong in all
    failed: str = context.set_tensor_address("latents", 0)  # wrong in all
    print(context.is_stream_capturable(0), done, missing, failed)  # wrong in 10.16, 11.4
    return engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)


def called_back() -> None:
    if TYPE_CHECKING:
        import tensorrt as trt

    class Logger(trt.ILogger):
        def log(self, severity: trt.ILogger.Severity, msg: str) -> None:
            print(severity <= trt.ILogger.ERROR, trt.Logger.WARNING, msg)

    class Writer(trt.IStreamWriter):
        def write(self, data: bytes) -> int:
            return len(data)

    class WriterOfTheHeader(trt.IStreamWriter):
        def write(self, data: bytes, size: int) -> int:  # wrong in all
            return size

    class Monitor(trt.IProgressMonitor):
        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None: ...

        def step_complete(self, phase_name: str, step: int) -> bool:
            return True

    class MonitorOfTheHeader(trt.IProgressMonitor):
        def phase_start(self, phase_name: str, parent_phase: str, num_steps: int) -> None: ...  # wrong in all

        def step_complete(self, phase_name: str, step: int) -> None: ...  # wrong in all

    made_with(Logger(), Writer())
    made_with(Writer(), Monitor())  # wrong in all
