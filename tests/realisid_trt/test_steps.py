"""The loop with a sampler that keeps histories and draws noise: the engine's latents are those of its table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from realisid_trt import Engine, Request
from realisid_trt.backends.cuda_memory import Arena
from realisid_trt.loop.noise import initial_noise, step_noise
from realisid_trt.manifest import Manifest
from realisid_trt.memory import Size, arena_bytes
from tests.realisid_trt.sampler_tables import TABLE_OF, use, with_state

STEPS = 5
DRAWS = [True, False, True, True, False]


@pytest.mark.parametrize("noise", [False, True])
@pytest.mark.parametrize("histories", [0, 1, 2])
def test_the_engine_steps_as_its_table_says(
    engine: Engine, histories: int, noise: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two pictures, restated in float64 from the predictions that the networks make; the noise is each picture's."""
    use(monkeypatch, histories, DRAWS.__getitem__ if noise else None)
    seen = list[tuple[Any, ...]]()
    backend: Any = engine.backend
    run = type(backend).guide_step

    def watched(self: Any, latents: Any, kept: Any, step: Any, predicted: Any, *rest: Any, **named: Any) -> None:
        seen.append((latents.copy(), step.copy(), predicted.copy(), *(array.copy() for array in rest[:2])))
        run(self, latents, kept, step, predicted, *rest, **named)

    monkeypatch.setattr(type(backend), "guide_step", watched)
    [result] = engine.generate_batch(
        [Request("a beach", num_images=2, seed=11, guidance_scale=3.0)], num_inference_steps=STEPS, output="latents"
    )
    table = TABLE_OF(engine._prologue, None, STEPS)
    matrix = with_state(table, histories, np.array(DRAWS) if noise else None).matrix
    shape = result.latents.shape[1:]
    state = np.zeros((2, 5, *shape))  # z, m, h1, h2, noise
    state[:, 0] = [initial_noise(11 + j, shape) for j in range(2)]
    for number, (latents, step, predicted, decoder_of, weights) in enumerate(seen):
        np.testing.assert_allclose(latents, state[:, 0], atol=1e-5 * np.abs(state).max())
        assert step.tolist() == [number, number]
        for j in range(2):
            rows = zip(decoder_of[j], weights[j], strict=True)
            state[j, 1] = sum(weight * predicted[row] for row, weight in rows if row >= 0)
            state[j, 4] = step_noise(11 + j, number, shape) if noise and DRAWS[number] else 0
            state[j, [0, 2, 3]] = np.einsum("jk,k...->j...", matrix[number], state[j])[:3]
    assert len(seen) == STEPS
    np.testing.assert_allclose(result.latents, state[:, 0], atol=1e-5 * np.abs(state).max())


def test_a_picture_of_a_batch_is_that_of_its_own_run(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, 2, lambda step: step % 2 == 0)
    requests = [Request("a beach", seed=3), Request("a street", num_images=2, seed=40), Request("a forest", seed=4)]
    options: dict[str, Any] = {"num_inference_steps": STEPS, "output": "latents"}
    together = engine.generate_batch(requests, **options)
    for request, found in zip(requests, together, strict=True):
        [alone] = engine.generate_batch([request], **options)
        np.testing.assert_array_equal(found.latents, alone.latents)
    [again] = engine.generate_batch([Request("a street", seed=41)], **options)
    np.testing.assert_array_equal(together[1].latents[1:], again.latents)


def test_a_sampler_without_a_state_takes_no_memory_for_one(engine_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And one with a state: the latents once more for each history, and for the noise."""
    manifest, pieces = Manifest.read(engine_dir), dict[tuple[int, bool], list[int]]()
    taken, take = list[int](), Arena.take
    monkeypatch.setattr(Arena, "take", lambda arena, nbytes: (taken.append(nbytes), take(arena, nbytes))[1])
    for histories, noise in ((0, False), (0, True), (1, False), (2, True)):
        use(monkeypatch, histories, bool if noise else None)
        taken.clear()
        arena_bytes(manifest, manifest.build_for("onnxruntime"), Size(2, 1, 128))
        pieces[histories, noise] = sorted(taken)
    latents = 4 * 32 * 32 * 4  # of one picture, with two in the pass: before the pass, and in both passes
    for (histories, noise), found in pieces.items():
        of_requests, of_passes = [latents * histories] * 2, [2 * latents * histories] * 2
        added = (of_requests + of_passes) * (histories > 0) + [2 * latents] * 2 * noise
        assert found == sorted([*pieces[0, False], *added])


def test_a_tensor_is_written_in_its_own_shape_and_type(engine: Engine) -> None:
    backend = engine.backend
    tensor = backend.put(np.zeros((2, 3), np.float32))
    values: NDArray[np.float32] = np.arange(6, dtype=np.float32).reshape(2, 3)
    backend.write(tensor, values)
    values += 1  # the caller's own
    np.testing.assert_array_equal(backend.get(tensor), values - 1)
    for wrong in (np.zeros((1, 3), np.float32), np.zeros((2, 3)), np.zeros(3, np.float32)):
        with pytest.raises(AssertionError):
            backend.write(tensor, wrong)
