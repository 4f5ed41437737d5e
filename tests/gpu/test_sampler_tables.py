"""Samplers with histories and noise on a GPU: replayed steps, other tables, other numbers of histories, and memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from realisid_trt import Engine
from realisid_trt.kernels.launch import Kernels
from realisid_trt.memory import Size, arena_bytes
from tests.gpu.conftest import REHEARSAL
from tests.gpu.support import captures, relative_rms
from tests.gpu.test_engine import latents
from tests.gpu.test_memory import STEPS, counted, make
from tests.realisid_trt.sampler_tables import use

OPTIONS = {"num_inference_steps": 8, "subject_conditioning_ratio": None}
STATES = pytest.mark.parametrize(("histories", "noise"), [(1, False), (0, True), (2, True)])
needs_capture = pytest.mark.skipif(not REHEARSAL, reason="ONNX Runtime's CUDA sessions cannot be captured")


def odd(step: int) -> bool:
    return step % 2 == 1


@STATES
def test_float32_is_the_cpu_s(
    cpu_engine: Engine, single: Engine, bounds: dict[str, float], histories: int, noise: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    use(monkeypatch, histories, odd if noise else None)
    expected, found = (latents(engine, 2, **OPTIONS) for engine in (cpu_engine, single))
    assert relative_rms(found.latents, expected.latents) < bounds["float32"]


@needs_capture
@STATES
def test_a_captured_step_is_replayed_with_another_table(
    engine_dir: Path, half: Engine, histories: int, noise: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the same number of histories; its noise is written between two replays."""
    from tests.kernels.stand_in import Counters

    def expected(seed: int) -> Any:
        use(monkeypatch, histories, odd if noise else None, seed)
        return latents(half, 2, **OPTIONS).latents

    with Engine.load(engine_dir, "onnxruntime", "cuda", cuda_graph=True) as engine:
        found = captures(engine, monkeypatch)
        first = expected(1)
        before = Counters().graph_launches
        assert np.array_equal(latents(engine, 2, **OPTIONS).latents, first)
        assert len(found) == 1 and Counters().graph_launches - before == OPTIONS["num_inference_steps"] - 2
        latents(engine, 2, **OPTIONS)  # until all addresses have settled
        settled = len(found)
        second = expected(2)
        before = Counters().graph_launches
        assert np.array_equal(latents(engine, 2, **OPTIONS).latents, second)
        assert len(found) == settled and Counters().graph_launches - before == OPTIONS["num_inference_steps"] - 1
        assert not np.array_equal(first, second)


@needs_capture
def test_another_number_of_histories_is_captured_anew(
    engine_dir: Path, half: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And replayed, when the first comes again, without a capture."""
    with Engine.load(engine_dir, "onnxruntime", "cuda", cuda_graph=True) as engine:
        found = captures(engine, monkeypatch)
        for histories in (1, 1, 2, 0):
            use(monkeypatch, histories)
            latents(engine, 2, **OPTIONS)
        settled = len(found)
        assert settled >= 3
        for histories in (2, 0, 1):
            use(monkeypatch, histories, seed=3)
            assert np.array_equal(latents(engine, 2, **OPTIONS).latents, latents(half, 2, **OPTIONS).latents)
        assert len(found) == settled


def test_a_step_is_one_launch(half: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    launched, launch = [], Kernels.guide_step
    monkeypatch.setattr(Kernels, "guide_step", lambda *given: (launched.append(given[3:]), launch(*given))[1])
    use(monkeypatch, 2, odd)
    latents(half, 1, **OPTIONS)
    assert len(launched) == OPTIONS["num_inference_steps"]
    assert {given[0].shape[1] for given in launched} == {2}


@STATES
def test_the_arena_is_counted_to_the_byte(
    half: Engine,
    pieces: Callable[[Any], tuple[list[int], list[int]]],
    histories: int,
    noise: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    use(monkeypatch, histories, odd if noise else None)
    size = Size(2, 3, 64)
    make(half, size)
    ours = pieces(half.backend._gpu)  # type: ignore[attr-defined]
    arena_bytes(counted(half.manifest), half.manifest.build_for("onnxruntime", "cuda"), size)
    assert STEPS > 1 and len(ours[1]) > 20 and pieces(None) == ours


def test_a_tensor_is_written_after_the_work_that_reads_it(half: Engine) -> None:
    """In the order of the calls, though nothing has run when the array changes."""
    backend: Any = half.backend
    with backend.turn():
        backend.start_request()
        tensor = backend.put(np.zeros((2, 3), np.float32))
        values = np.arange(6, dtype=np.float32).reshape(2, 3)
        before = backend.take(tensor, np.array([1, 0, 0], np.int32))
        backend.write(tensor, values)
        values += 1
        after = backend.take(tensor, np.array([1, 0], np.int32))
        found = backend.get(before), backend.get(after)
        for wrong in (np.zeros((1, 3), np.float32), np.zeros((2, 3))):
            with pytest.raises(AssertionError):
                backend.write(tensor, wrong)
    assert not found[0].any()
    np.testing.assert_array_equal(found[1], [[3, 4, 5], [0, 1, 2]])
