"""Tests of a GPU. `make gpu-test` runs them on a real one; `make test` rehearses them on the stand-in of tests/kernels:
the real cuda-python over a driver of our own, and ONNX Runtime's CPU sessions in the place of its CUDA sessions."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.gpu.support import float32_only

REHEARSAL = "STAND_IN_KERNELS" in os.environ
HostFunction = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.gpu)


def _enqueue_on_the_cpu(sessions: Any, session: Any, binding: Any) -> None:
    """A network that runs when the stream comes to it, and again in every replay: as on a GPU."""
    from cuda.bindings import driver

    function = HostFunction(lambda _: session.run_with_iobinding(binding))
    sessions.__dict__.setdefault("kept", []).append(function)
    address = ctypes.cast(function, ctypes.c_void_p).value
    (status,) = driver.cuLaunchHostFunc(sessions._gpu.stream.handle, driver.CUhostFn(address), 0)
    assert status == driver.CUresult.CUDA_SUCCESS, status


if REHEARSAL:
    from realisid_trt.backends import onnxruntime_cuda

    onnxruntime_cuda.CAPTURABLE = True  # which networks on the CPU are
    onnxruntime_cuda.PROVIDER, onnxruntime_cuda.MEMORY = "CPUExecutionProvider", "cpu"
    onnxruntime_cuda.provider_options = lambda gpu, precision: {}
    onnxruntime_cuda.Sessions._enqueue = _enqueue_on_the_cpu  # type: ignore[method-assign]


@pytest.fixture(scope="session")
def device_bytes() -> Callable[[], int]:
    """Device memory in use, by everybody."""
    if REHEARSAL:
        from tests.kernels.stand_in import Counters

        return lambda: Counters().device_bytes
    from cuda.bindings import driver

    def used() -> int:
        _, free, total = driver.cuMemGetInfo()
        return int(total) - int(free)

    return used


@pytest.fixture(scope="session")
def cpu_engine(engine_dir: Path) -> Any:
    from realisid_trt import Engine

    return Engine.load(engine_dir, device="cpu:1")


@pytest.fixture(scope="session")
def single(engine_dir: Path) -> Any:
    """The engine on the GPU in float32."""
    from realisid_trt import Engine

    with pytest.MonkeyPatch.context() as patch:
        float32_only(patch)
        return Engine.load(engine_dir, device="cuda")


@pytest.fixture(scope="session")
def single_replayed(engine_dir: Path) -> Any:
    """With steps replayed, where the networks allow it."""
    from realisid_trt import Engine

    with pytest.MonkeyPatch.context() as patch:
        float32_only(patch)
        return Engine.load(engine_dir, device="cuda", cuda_graph=REHEARSAL)


@pytest.fixture(scope="session")
def half(engine_dir: Path) -> Any:
    """The engine on the GPU as it was built for it: float16."""
    from realisid_trt import Engine

    return Engine.load(engine_dir, device="cuda")


@pytest.fixture(scope="session")
def half_replayed(engine_dir: Path) -> Any:
    from realisid_trt import Engine

    return Engine.load(engine_dir, device="cuda", cuda_graph=REHEARSAL)
