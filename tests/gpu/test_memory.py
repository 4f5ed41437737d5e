"""The memory that is counted beforehand is the memory that a GPU's backend takes; and engines with memory="low"."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from realisid_trt import Engine, Request
from realisid_trt.backends.gpu_facts import gpu_bytes
from realisid_trt.commands.memory_table import present_card
from realisid_trt.loop.stages import networks_of_stages
from realisid_trt.manifest import Manifest
from realisid_trt.memory import Size, arena_bytes, needs
from tests.gpu.conftest import REHEARSAL
from tests.gpu.support import person
from tests.gpu.test_engine import latents

STEPS = 3


def counted(manifest: Manifest) -> Manifest:
    """The manifest, whose requests have few steps."""
    config = {**manifest.values["realisid_config"], "num_inference_steps": STEPS}
    return Manifest(manifest.path, {**manifest.values, "realisid_config": config})


def requests(model: Any, size: Size) -> list[Request]:
    """Every picture has texts and persons of its own."""
    box = (0, 0, size.resolution / 2, size.resolution / 2)
    return [
        Request(f"{2 * n}", [person(model, 8 * n + k, box) for k in range(size.persons)], f"{2 * n + 1}", seed=n)
        for n in range(size.batch)
    ]


def make(engine: Engine, size: Size) -> None:
    options = {"num_inference_steps": STEPS, "height": size.resolution, "width": size.resolution, "output": "np"}
    engine.generate_batch(requests(engine.model, size), **options)


SIZES = [Size(1, 1, 128), Size(1, 0, 128), Size(2, 3, 64), pytest.param(Size(3, 2, 192), marks=pytest.mark.slow)]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("precision", ["float16", "float32"])
def test_the_arena_is_counted_to_the_byte(
    half: Engine, single: Engine, size: Size, precision: str, pieces: Callable[[Any], tuple[list[int], list[int]]]
) -> None:
    """Every piece, in the order in which it is taken, ONNX Runtime's networks."""
    engine = half if precision == "float16" else single
    build = engine.manifest.build_for("onnxruntime", "cuda" if engine is half else "cpu")
    assert build.precision == precision
    make(engine, size)
    ours = pieces(engine.backend._gpu)  # type: ignore[attr-defined]
    arena_bytes(counted(engine.manifest), build, size)
    assert len(ours[1]) > 20 and pieces(None) == ours


def test_the_arena_of_plans_is_counted_to_the_byte(
    plans_engine: Path,
    flavour: str,
    pieces: Callable[[Any], tuple[list[int], list[int]]],
    device_bytes: Callable[[], int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And all that a fresh engine takes from the system beside its weights: arenas, kept arrays and scratch."""
    size = Size(2, 3, 256)
    with Engine.load(plans_engine, backend=flavour) as engine:
        backend: Any = engine.backend
        before, kept, keep = device_bytes(), list[int](), backend.keep
        monkeypatch.setattr(backend, "keep", lambda tensor: (kept.append(tensor.nbytes), keep(tensor))[1])
        make(engine, size)
        gpu, ours = backend._gpu, pieces(backend._gpu)
        expected = arena_bytes(counted(engine.manifest), engine.manifest.build_for(flavour, "cuda"), size)
        arenas = gpu.calls.nbytes + gpu.passes.nbytes
        assert pieces(None) == ours and expected == arenas + sum(kept) and arenas > 2**25 and len(kept) == 2 * 3
        assert not backend._kept
        if REHEARSAL:  # where weights are not on the device
            assert device_bytes() - before == arenas + backend._runner._scratch.size


def test_the_scratch_of_plans_is_bounded(plans: Engine) -> None:
    """By what every plan says beforehand, and what a build writes into the manifest."""
    latents(plans, 2)
    contexts: Any = plans.backend._runner  # type: ignore[attr-defined]
    said = contexts.scratch_bytes()
    for name, kept in contexts._bound.items():
        assert all(0 < bound.scratch_bytes <= said[name] for bound in kept.values())
    build = plans.manifest.build_for(plans.backend.name, "cuda")
    values = {**plans.manifest.values, "verified": {build.id: {"scratch_bytes": said}}}
    found = needs(Manifest(plans.manifest.path, values), build, Size(1, 1, 128))
    assert found.scratch == said and found.vae is not None
    assert found.normal == sum(found.weights.values()) + found.arena + max(found.vae, *said.values())


def test_an_unloading_gives_the_scratch_back(plans_engine: Path, flavour: str, device_bytes: Callable[[], int]) -> None:
    """Which may be the VAE's; the loop's weights must find room there."""
    with Engine.load(plans_engine, backend=flavour) as engine:
        expected = latents(engine, 1).latents
        contexts: Any = engine.backend._runner  # type: ignore[attr-defined]
        before, scratch = device_bytes(), contexts._scratch.size
        engine.unload()
        assert contexts._scratch is None
        if REHEARSAL:  # where weights are not on the device
            assert before - device_bytes() == scratch > 0
        assert np.array_equal(latents(engine, 1).latents, expected)


def test_the_size_of_the_gpu() -> None:
    from cuda.bindings import driver

    card = present_card()
    assert card is not None and card.name and card.nbytes == gpu_bytes() > 0
    if not REHEARSAL:  # whose device has no context here
        status, device = driver.cuDeviceGet(0)
        assert driver.cuDeviceTotalMem(device)[1] == card.nbytes


def watch(engine: Engine, monkeypatch: pytest.MonkeyPatch, opened: dict[str, Any]) -> list[set[str]]:
    """The networks that were open after each run."""
    found: list[set[str]] = []
    run = engine.backend.run

    def watched(network: str, inputs: Any) -> Any:
        outputs = run(network, inputs)
        found.append(set(opened))
        return outputs

    monkeypatch.setattr(engine.backend, "run", watched)
    return found


@pytest.mark.parametrize("cuda_graph", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_plans_of_one_stage_at_a_time(
    plans: Engine, plans_engine: Path, flavour: str, cuda_graph: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"num_inference_steps": 12, "output": "np"}
    expected = latents(plans, 2, **options)
    with Engine.load(plans_engine, backend=flavour, memory="low", cuda_graph=cuda_graph) as engine:
        engines: Any = engine.backend._runner._engines  # type: ignore[attr-defined]
        assert not engines
        found = watch(engine, monkeypatch, engines)
        for _ in range(3):
            ours = latents(engine, 2, **options)
            assert np.array_equal(ours.latents, expected.latents)
            assert np.array_equal(ours.images[0], expected.images[0])
        stages = [set(names) for names in networks_of_stages(engine.manifest).values()]
        assert all(any(names <= stage for stage in stages) for names in found)
        assert set(engines) == {"vae_decoder"}


def test_sessions_of_one_stage_at_a_time(half: Engine, engine_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = latents(half, 2, output="np")
    with Engine.load(engine_dir, "onnxruntime", "cuda", memory="low") as engine:
        sessions: Any = engine.backend._runner._sessions  # type: ignore[attr-defined]
        assert not sessions
        found = watch(engine, monkeypatch, sessions)
        for _ in range(2):
            ours = latents(engine, 2, output="np")
            assert np.array_equal(ours.latents, expected.latents)
            assert np.array_equal(ours.images[0], expected.images[0])
        stages = [set(names) for names in networks_of_stages(engine.manifest).values()]
        assert all(any(names <= stage for stage in stages) for names in found)
        large = latents(engine, 1, height=192, width=256, output="np", num_inference_steps=1)
        assert large.rows["vae_decoder"] == 6 and large.images[0].shape == (192, 256, 3)
