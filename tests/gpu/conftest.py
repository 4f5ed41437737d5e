"""Tests of a GPU. `make gpu-test` runs them on a real one; `make test` rehearses them on the stand-in of tests/kernels:
the real cuda-python over a driver of our own, and ONNX Runtime's CPU sessions in the place of its CUDA sessions."""

from __future__ import annotations

import ctypes
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gpu.support import STEPS, float32_only, relative_rms

REHEARSAL = "STAND_IN_KERNELS" in os.environ
HostFunction = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.gpu)


def _enqueue_on_the_cpu(sessions: Any, session: Any, binding: Any, options: Any) -> None:
    """Enqueues a network: it runs when the stream comes to it, and again in every replay, as on a GPU."""
    from cuda.bindings import driver

    function = HostFunction(lambda _: session.run_with_iobinding(binding))
    sessions.__dict__.setdefault("kept", []).append(function)
    address = ctypes.cast(function, ctypes.c_void_p).value
    (status,) = driver.cuLaunchHostFunc(sessions._gpu.stream.handle, driver.CUhostFn(address), 0)
    assert status == driver.CUresult.CUDA_SUCCESS, status


if REHEARSAL:
    from realisid_trt.backends import onnxruntime_cuda

    onnxruntime_cuda.CAPTURABLE = True  # which networks on the CPU are
    onnxruntime_cuda.PROVIDER, onnxruntime_cuda.MEMORY, onnxruntime_cuda.ARENA = "CPUExecutionProvider", "cpu", "Cpu"
    onnxruntime_cuda.provider_options = lambda gpu, precision: {}
    onnxruntime_cuda.Sessions._enqueue = _enqueue_on_the_cpu  # type: ignore[method-assign]


@pytest.fixture(scope="session", params=["tensorrt", "tensorrt-rtx"])
def flavour(request: pytest.FixtureRequest, engine_dir: Path) -> str:
    """Each flavour of TensorRT whose plans this card runs."""
    from realisid_trt.backends import installed, tensorrt
    from realisid_trt.errors import RealisIDError
    from realisid_trt.manifest import Manifest

    manifest, name = Manifest.read(engine_dir), str(request.param)
    if not installed(name):
        pytest.skip(f"{name} is not installed")
    if name not in {build.backend for build in manifest.builds.values()}:
        pytest.skip(f"the engine holds no {name} plans")
    if REHEARSAL:
        import tensorrt_rtx

        from tests.gpu import plans_on_the_cpu

        plans_on_the_cpu.know(manifest)
        tensorrt_rtx.Runtime = plans_on_the_cpu.Runtime
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            problem = tensorrt.cannot_run(name, manifest, "cuda")
    except RealisIDError as error:
        problem = str(error)
    if problem:
        pytest.skip(problem)
    return name


@pytest.fixture(scope="session")
def plans_engine(engine_dir: Path, flavour: str) -> Path:
    return engine_dir


@pytest.fixture(scope="session")
def plans(plans_engine: Path, flavour: str) -> Any:
    from realisid_trt import Engine

    return Engine.load(plans_engine, backend=flavour)


@pytest.fixture(scope="session")
def plans_replayed(plans_engine: Path, flavour: str) -> Any:
    from realisid_trt import Engine

    return Engine.load(plans_engine, backend=flavour, cuda_graph=True)


@pytest.fixture(autouse=True)
def nothing_failed_on_the_stream() -> Iterator[None]:
    """Checks the failures that a plan's stand-in could not raise."""
    yield
    if plans := sys.modules.get("tests.gpu.plans_on_the_cpu"):
        assert plans.failures == []


@pytest.fixture(scope="session")
def device_bytes() -> Callable[[], int]:
    """A function that returns the bytes of device memory in use, by all processes."""
    if REHEARSAL:
        from tests.kernels.stand_in import Counters

        return lambda: Counters().device_bytes
    from cuda.bindings import driver

    def used() -> int:
        _, free, total = driver.cuMemGetInfo()
        return int(total) - int(free)

    return used


@pytest.fixture
def pieces(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], tuple[list[int], list[int]]]:
    """pieces(gpu): what its arenas have handed out, piece by piece: that of calls since it was last reset, and that of
    passes in all passes. None: of the two arenas that were used last, the counted ones."""
    from realisid_trt.backends.cuda_memory import ALIGNMENT, Arena

    taken: dict[Arena, list[int]] = {}
    since_reset: dict[Arena, int] = {}
    take, reset = Arena.take, Arena.reset

    def taking(arena: Arena, nbytes: int) -> int:
        taken[arena] = [*taken.pop(arena, []), -(-max(nbytes, 1) // ALIGNMENT) * ALIGNMENT]  # the last used is the last
        return take(arena, nbytes)

    def resetting(arena: Arena) -> None:
        since_reset[arena] = len(taken.get(arena, []))
        reset(arena)

    def found(gpu: Any) -> tuple[list[int], list[int]]:
        passes, calls = list(taken)[-2:] if gpu is None else (gpu.passes, gpu.calls)
        return taken[calls][since_reset[calls] :], taken[passes]

    monkeypatch.setattr(Arena, "take", taking)
    monkeypatch.setattr(Arena, "reset", resetting)
    return found


@pytest.fixture(scope="session")
def cpu_engine(engine_dir: Path) -> Any:
    from realisid_trt import Engine

    return Engine.load(engine_dir, device="cpu:1")


@pytest.fixture(scope="session")
def bounds(plain_errors: dict[str, dict[str, float]]) -> dict[str, float]:
    """By precision, how far final latents may be from the CPU's in float32, relative to their RMS."""
    return _bounds(plain_errors["latents"])


@pytest.fixture(scope="session")
def id_bounds(plain_errors: dict[str, dict[str, float]]) -> dict[str, float]:
    """The same bounds for ID tokens."""
    return _bounds(plain_errors["id_tokens"])


def _bounds(errors: dict[str, float]) -> dict[str, float]:
    """An engine may err four times as much as plain torch in its precision. So may the CPU's engine, in float32."""
    return {precision: 4 * error + 4 * errors["float32"] for precision, error in errors.items()}


@pytest.fixture(scope="session")
def plain_errors(checkpoint_dir: Path, cpu_engine: Any) -> dict[str, dict[str, float]]:
    """Plain torch's own errors against float64, relative to the RMS, by precision: of two persons' final latents after
    five steps, and of their ID tokens."""
    pytest.importorskip("diffusers", reason="the bound is plain torch's own error", exc_type=ImportError)
    from export.checkpoint import Checkpoint
    from export.truth.half_reference import half_reference
    from export.truth.reference import Reference
    from tests.realisid_trt.truth import PROMPT, Scene

    checkpoint, side = Checkpoint.open(checkpoint_dir), cpu_engine.model.default_size
    scene = Scene.make(cpu_engine, "apart", side, side)

    def made(reference: Reference) -> dict[str, Any]:
        noise, id_pixels = torch.from_numpy(scene.latents), torch.from_numpy(scene.id_pixels)
        latents = reference.generate(PROMPT, scene.reference_persons(), noise, **STEPS)
        with torch.inference_mode():
            id_tokens = reference.encode_id(id_pixels)
        return {"latents": latents.double().numpy(), "id_tokens": id_tokens.double().numpy()}

    truth, single = (made(Reference(checkpoint, dtype)) for dtype in (torch.float64, torch.float32))
    with half_reference(checkpoint, torch.float16) as reference:
        half = made(reference)
    errors = {
        name: {"float32": relative_rms(single[name], exact), "float16": relative_rms(half[name], exact)}
        for name, exact in truth.items()
    }
    print(f"plain torch errs: {errors}")
    return errors


@pytest.fixture(scope="session")
def single(engine_dir: Path) -> Any:
    """The engine on the GPU in float32."""
    from realisid_trt import Engine

    with pytest.MonkeyPatch.context() as patch:
        float32_only(patch)
        return Engine.load(engine_dir, "onnxruntime", "cuda")


@pytest.fixture(scope="session")
def single_replayed(engine_dir: Path) -> Any:
    """The same with replayed steps, where the networks allow it."""
    from realisid_trt import Engine

    with pytest.MonkeyPatch.context() as patch:
        float32_only(patch)
        return Engine.load(engine_dir, "onnxruntime", "cuda", cuda_graph=REHEARSAL)


@pytest.fixture(scope="session")
def half(engine_dir: Path) -> Any:
    """The engine on the GPU as it was built for it: float16."""
    from realisid_trt import Engine

    return Engine.load(engine_dir, "onnxruntime", "cuda")


@pytest.fixture(scope="session")
def half_replayed(engine_dir: Path) -> Any:
    from realisid_trt import Engine

    return Engine.load(engine_dir, "onnxruntime", "cuda", cuda_graph=REHEARSAL)
