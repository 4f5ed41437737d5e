"""The engine on a GPU makes the pictures that it makes on the CPU."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from realisid_trt import Control, Engine, Request
from realisid_trt.config import RealisIDConfig
from realisid_trt.errors import NumericsError, RealisIDWarning, RequestError
from realisid_trt.kernels.launch import Kernels
from realisid_trt.loop.denoise import loop_networks
from tests.gpu.conftest import REHEARSAL
from tests.gpu.support import STEPS, float32_only, person, relative_rms

LOOP_NETWORKS = loop_networks(RealisIDConfig(branch_pooled_text="zeros").table)

BOXES = ((5, 10, 69, 75), (40, 20, 120, 91), (70, 70, 88, 88))
needs_capture = pytest.mark.skipif(not REHEARSAL, reason="ONNX Runtime's CUDA sessions cannot be captured")


def persons(model: Any, count: int) -> list[Any]:
    return [person(model, seed, box) for seed, box in enumerate(BOXES[:count])]


def latents(engine: Engine, count: int, **options: Any) -> Any:
    options = {"seed": 3, "output": "latents", **STEPS, **options}
    return engine.generate("two friends", persons(engine.model, count), **options)


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_float32_is_the_cpu_s(cpu_engine: Engine, single: Engine, bounds: dict[str, float], count: int) -> None:
    expected, found = (latents(engine, count) for engine in (cpu_engine, single))
    assert single.backend.precision == "float32" and found.backend != expected.backend
    assert relative_rms(found.latents, expected.latents) < bounds["float32"]
    loop = [name for name in LOOP_NETWORKS if name in expected.rows]  # as the backends themselves counted them
    assert [found.rows[name] for name in loop] == [expected.rows[name] for name in loop]


@pytest.mark.parametrize("count", [0, 2])
def test_float16_is_close(cpu_engine: Engine, half: Engine, bounds: dict[str, float], count: int) -> None:
    expected, found = (latents(engine, count, output="np") for engine in (cpu_engine, half))
    assert half.backend.precision == "float16"
    assert bounds["float32"] < relative_rms(found.latents, expected.latents) < bounds["float16"]
    assert np.abs(found.images[0] - expected.images[0]).max() < 0.05


@pytest.mark.parametrize("size", [(128, 128), (96, 192)])
def test_a_replayed_step_is_the_step(half: Engine, half_replayed: Engine, size: tuple[int, int]) -> None:
    options = {"height": size[0], "width": size[1], "num_inference_steps": 6}
    plain, replayed = (latents(engine, 2, **options) for engine in (half, half_replayed))
    assert np.array_equal(plain.latents, replayed.latents)
    assert [replayed.rows[name] for name in LOOP_NETWORKS] == [plain.rows[name] for name in LOOP_NETWORKS]
    assert len(replayed.step_ms) == 6


def test_a_window_ends_a_pass(
    cpu_engine: Engine, half: Engine, half_replayed: Engine, bounds: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A branch that ends halfway: the steps after it are captured anew, and each step merges in one launch."""
    launched, launch = [], Kernels.relocate_merge
    monkeypatch.setattr(Kernels, "relocate_merge", lambda *given: (launched.append(1), launch(*given))[1])
    options = {"num_inference_steps": 8, "subject_conditioning_ratio": None}
    options["controls"] = {"global": Control(end=0.5)}
    plain, expected = (latents(engine, 2, **options) for engine in (half, cpu_engine))
    assert len(launched) == 8
    graphs = len(half_replayed.backend._steps.graphs)  # type: ignore[attr-defined]
    replayed = latents(half_replayed, 2, **options)
    assert np.array_equal(plain.latents, replayed.latents)
    assert relative_rms(plain.latents, expected.latents) < bounds["float16"]
    for found in (plain, replayed, expected):
        assert (found.rows["global_branch"], found.rows["local_branch"]) == (4 * 4, 8 * 4)
        assert found.rows["relocate_merge"] == 8 * 3
    if REHEARSAL:
        assert len(half_replayed.backend._steps.graphs) == graphs + 2  # type: ignore[attr-defined]


def test_a_batch_of_different_requests(cpu_engine: Engine, single_replayed: Engine, bounds: dict[str, float]) -> None:
    model = cpu_engine.model
    requests = [
        Request("a beach", persons(model, 2), seed=1, subject_conditioning_ratio=None),
        Request("a street", [], seed=2, negative_prompt="blurry"),
        Request("a forest", persons(model, 1), seed=3, num_images=2, local_scale=0.5, id_guidance_scale=0.0),
    ]
    both = [
        engine.generate_batch(requests, num_inference_steps=4, output="latents")
        for engine in (cpu_engine, single_replayed)
    ]
    for expected, found in zip(*both, strict=True):
        assert relative_rms(found.latents, expected.latents) < bounds["float32"]


def test_an_identity_from_a_photo(cpu_engine: Engine, single: Engine, id_bounds: dict[str, float], photos: Any) -> None:
    expected, found = (engine.embed(photos.astronaut) for engine in (cpu_engine, single))
    assert relative_rms(found.id_tokens, expected.id_tokens) < id_bounds["float32"]
    assert found.box == expected.box


@pytest.mark.slow
def test_memory_does_not_grow(half: Engine, device_bytes: Callable[[], int]) -> None:
    """200 pictures of changing sizes and numbers of persons, in batches of four, of all the device's memory.

    Before them every size and number twice: in its second run ONNX Runtime takes the memory that it planned in the
    first, in one piece.
    """
    model, held, warm = half.model, [], 2 * 12
    for turn in range(warm + 50):
        side = (64, 80, 96, 128)[turn % 4]
        people = [person(model, turn, (0, 0, side / 2, side / 2))] * (turn % 3)
        request = Request("a beach", people, seed=turn, num_images=4)
        half.generate_batch([request], num_inference_steps=1, height=64, width=side, output="latents")
        held.append(device_bytes())
    assert max(held[warm:]) <= held[warm - 1]


@pytest.mark.slow
def test_engines_come_and_go(engine_dir: Path, half: Engine, device_bytes: Callable[[], int]) -> None:
    """An engine opened beside others in the same ONNX Runtime memory makes the same pictures, and frees its memory."""
    expected, before, held = latents(half, 2), device_bytes(), []
    for _ in range(3):
        with Engine.load(engine_dir, "onnxruntime", "cuda") as engine:
            assert engine.backend._runner._arena is half.backend._runner._arena  # type: ignore[attr-defined]
            assert np.array_equal(latents(engine, 2).latents, expected.latents)
        held.append(device_bytes())
    assert max(held) == held[0]
    if REHEARSAL:  # where nothing else, such as the code of a library's kernels, lies on the device
        assert held[0] == before
    assert np.array_equal(latents(half, 2).latents, expected.latents)


@pytest.mark.skipif(not REHEARSAL, reason="needs two GPUs; the stand-in takes any context for one")
def test_the_caller_s_device_stays_the_caller_s(engine_dir: Path, half: Engine) -> None:
    """torch on another GPU, or another engine in the progress callback: each finds its own device current."""
    from cuda.bindings import driver

    def current() -> int:
        return int(driver.cuCtxGetCurrent()[1])

    caller, other = driver.CUcontext(0xABC0), driver.CUcontext(0xDEF0)
    before, seen = driver.cuCtxGetCurrent()[1], list[int]()
    expected = latents(half, 1).latents

    def progress(done: int, of: int) -> None:
        seen.append(current())
        driver.cuCtxSetCurrent(other)

    try:
        driver.cuCtxSetCurrent(caller)
        found = latents(half, 1, progress=progress)
        assert set(seen) == {0xABC0} and len(seen) == STEPS["num_inference_steps"] and current() == 0xABC0
        assert np.array_equal(found.latents, expected)
        half.unload()
        assert current() == 0xABC0
        engine = Engine.load(engine_dir, "onnxruntime", "cuda")
        assert current() == 0xABC0
        with pytest.raises(RequestError):
            engine.generate("x", num_inference_steps=0)
        del engine  # it may be closed in any thread
        gc.collect()
        assert current() == 0xABC0
    finally:
        driver.cuCtxSetCurrent(before)


def test_two_threads_take_turns(single: Engine) -> None:
    alone = [latents(single, 1, seed=seed).latents for seed in (1, 2)]
    found: dict[int, Any] = {}
    threads = [
        threading.Thread(target=lambda seed=seed: found.update({seed: latents(single, 1, seed=seed).latents}))
        for seed in (1, 2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(found[seed], expected) for seed, expected in zip((1, 2), alone, strict=True))


@pytest.mark.slow
def test_two_engines_take_turns(single: Engine, half: Engine) -> None:
    """Each on a stream of its own, in the same memory of ONNX Runtime."""
    engines = {"single": single, "half": half}
    alone = {name: latents(engine, 2).latents for name, engine in engines.items()}
    found: dict[str, list[Any]] = {name: [] for name in engines}

    def work(name: str) -> None:
        for _ in range(3):
            found[name].append(latents(engines[name], 2).latents)

    threads = [threading.Thread(target=work, args=(name,)) for name in engines]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name, expected in alone.items():
        assert len(found[name]) == 3 and all(np.array_equal(each, expected) for each in found[name])


def test_an_overflow_is_found_on_the_gpu(half: Engine) -> None:
    with pytest.raises(NumericsError, match="the final latents holds .* NaN or infinite"):
        latents(half, 1, local_scale=3e38)
    assert np.isfinite(latents(half, 1).latents).all()  # and none of its memory stays


@needs_capture
def test_a_refused_capture_is_said_and_harmless(
    engine_dir: Path, half: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine.load(engine_dir, "onnxruntime", "cuda", cuda_graph=True)
    gpu = engine.backend._gpu  # type: ignore[attr-defined]
    run = type(engine.backend._runner).run  # type: ignore[attr-defined]

    def refuse(runner: Any, *arguments: Any) -> None:
        if gpu.capturing:
            raise RuntimeError("this network allocates")
        run(runner, *arguments)

    monkeypatch.setattr(type(engine.backend._runner), "run", refuse)  # type: ignore[attr-defined]
    with pytest.warns(RealisIDWarning, match=r"could not be captured as a CUDA graph \(this network allocates\)"):
        found = latents(engine, 1)
    expected = latents(half, 1)
    assert np.array_equal(found.latents, expected.latents)
    assert [found.rows[name] for name in LOOP_NETWORKS] == [expected.rows[name] for name in LOOP_NETWORKS]


@needs_capture
def test_steps_are_replayed_at_all(engine_dir: Path) -> None:
    with Engine.load(engine_dir, "onnxruntime", "cuda", cuda_graph=True) as engine:
        latents(engine, 1, num_inference_steps=10, subject_conditioning_ratio=0.7)
        assert len(engine.backend._steps.graphs) == 2  # type: ignore[attr-defined]  # without the ID, and with it


def test_one_launch_of_each_kernel_per_step(half: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[str] = []
    launch = Kernels._launch

    def counted(kernels: Kernels, stream: Any, name: str, *arguments: Any) -> None:
        launched.append(name)
        launch(kernels, stream, name, *arguments)

    monkeypatch.setattr(Kernels, "_launch", counted)
    latents(half, 3, num_inference_steps=7)
    for kernel in ("crop_upsample", "relocate_merge", "guide_step"):
        assert sum(name.startswith(kernel) for name in launched) == 7
    # The other launches gather rows: latents for two networks, four embeddings, and a few arrays once per pass.
    assert len(launched) < 7 * (3 + 6) + 40


def test_float32_networks_serve_where_no_half_was_built(engine_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    float32_only(monkeypatch)
    assert Engine.load(engine_dir, "onnxruntime", "cuda:0", networks=()).backend.precision == "float32"


@pytest.mark.skipif(REHEARSAL, reason="ONNX Runtime's CPU sessions have nothing to copy")
@pytest.mark.parametrize("network", ["local_branch", "global_branch", "unet_encoder", "unet_decoder"])
def test_no_network_of_the_loop_goes_through_the_host(half: Engine, network: str, tmp_path: Path) -> None:
    """A node without a CUDA kernel runs on the CPU, between two copies that stop everything."""
    import onnx
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    manifest = half.manifest
    file = manifest.networks(manifest.build_for("onnxruntime", "cuda"))[network].file
    ort.InferenceSession(str(manifest.path / file), options, providers=["CUDAExecutionProvider"])
    nodes = onnx.load(options.optimized_model_filepath, load_external_data=False).graph.node
    assert [node.name for node in nodes if node.op_type.startswith("Memcpy")] == []
