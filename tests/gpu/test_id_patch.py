"""ID-Patch on a GPU in half precision: the equations, the switch from text to text and ID, and its memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from export.checkpoint import Checkpoint
from export.truth.reference import ReferenceControl, ReferencePerson
from realisid_trt import Control, Engine, Person, Request
from realisid_trt.kernels.launch import Kernels
from realisid_trt.loop.denoise import loop_networks
from realisid_trt.loop.noise import initial_noise
from realisid_trt.memory import Size, arena_bytes
from tests.gpu.conftest import REHEARSAL
from tests.gpu.support import captures
from tests.methods import built_method
from tests.realisid_trt.truth import NEGATIVE, PROMPT, latent_errors

pytestmark = pytest.mark.slow("controlnet")  # builds engines of other tables

STEPS = 15
RATIO = 0.8  # ID-Patch's rule: the first three steps of fifteen read the text alone
WORST_RATIO = 2.0  # of the error of plain torch in float16
COUNTS = pytest.mark.parametrize("count", [1, 2, 4, 0])


@lru_cache
def opened(cuda_graph: bool = False) -> Engine:
    return Engine.load(built_method("idpatch").engine, "onnxruntime", "cuda", cuda_graph=cuda_graph)


@pytest.fixture(scope="module", autouse=True)
def forgotten() -> Iterator[None]:
    """Lets the engines go after the last test: others count the device's memory."""
    yield
    opened.cache_clear()


def side() -> int:
    return opened().model.default_size


def embeddings_of(count: int, seed: int) -> NDArray[np.float32]:
    vectors = np.random.default_rng(seed).standard_normal((count, 512))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def noses_of(count: int) -> list[tuple[float, float]]:
    """On a diagonal, the first at the border."""
    return [(side() * i / 5 + 0.25, side() * i / 6) for i in range(count)]


def people(count: int, seed: int = 0) -> list[Person]:
    return [Person(embedding=e, at=nose) for e, nose in zip(embeddings_of(count, seed), noses_of(count), strict=True)]


def drawing() -> NDArray[np.float32]:
    return np.random.default_rng(3).random((3, side(), side()), dtype=np.float32)


def noise() -> NDArray[np.float32]:
    model = opened().model
    return initial_noise(5, (1, model.latent_channels, *(2 * (side() // model.vae_scale_factor,))))


def made(engine: Engine, count: int, seed: int = 0, **options: Any) -> Any:
    settings = {"num_inference_steps": STEPS, "subject_conditioning_ratio": RATIO, "output": "latents"}
    return engine.generate(
        PROMPT, people(count, seed), negative_prompt=NEGATIVE, latents=noise(),
        controls={"id_patch": Control(drawing())}, **{**settings, **options},
    )  # fmt: skip


def rows_of_steps(result: Any) -> list[int | None]:
    """Without those of encoders, whose outputs are kept from request to request."""
    return [result.rows.get(name) for name in loop_networks(opened().config.table)]


@COUNTS
def test_it_errs_at_most_twice_as_much_as_torch(count: int) -> None:
    """Final latents against the reference in float64; torch's networks in float16, its sums in float32."""
    engine, checkpoint = opened(), Checkpoint.open(built_method("idpatch").checkpoint)
    assert engine.backend.precision == "float16"
    persons = [
        ReferencePerson(embedding=torch.from_numpy(embedding), anchor=nose)
        for embedding, nose in zip(embeddings_of(count, 0), noses_of(count), strict=True)
    ]
    settings: dict[str, Any] = {"num_inference_steps": STEPS // 2, "subject_conditioning_ratio": RATIO}
    ours, plain = latent_errors(
        made(engine, count, **settings).latents, checkpoint, persons, noise(), PROMPT, torch.float16,
        negative_prompt=NEGATIVE, controls={"id_patch": ReferenceControl(torch.from_numpy(drawing()))}, **settings,
    )  # fmt: skip
    print(f"N = {count}: engine {ours:.2e}, torch in float16 {plain:.2e}")
    assert 1e-4 < ours <= WORST_RATIO * plain  # 2⁻¹¹ is one rounding: so half precision ran


@COUNTS
def test_each_step_merges_in_one_launch(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the switch, when the branch reads the text alone, and after it."""
    launched, launch = [], Kernels.relocate_merge
    monkeypatch.setattr(Kernels, "relocate_merge", lambda *given: (launched.append(1), launch(*given))[1])
    made(opened(), count)
    assert len(launched) == STEPS


@pytest.mark.skipif(not REHEARSAL, reason="ONNX Runtime's CUDA sessions cannot be captured")
@COUNTS
def test_the_switch_to_the_id_is_captured_anew(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sequences grow by the IDs. Replayed steps make the same latents, also for other persons, who cost no
    capture."""
    from tests.kernels.stand_in import Counters

    passes = (3, 12) if count else (15,)
    plain, engine = opened(), opened(cuda_graph=True)
    expected, found = made(plain, count), captures(engine, monkeypatch)
    before = Counters().graph_launches
    ours = made(engine, count)
    assert np.array_equal(ours.latents, expected.latents) and rows_of_steps(ours) == rows_of_steps(expected)
    assert len(found) == len(passes)
    assert Counters().graph_launches - before == sum(steps - 2 for steps in passes)
    made(engine, count)  # until all addresses have settled
    settled = len(found)
    again = made(engine, count, seed=70)
    assert len(found) == settled
    assert np.array_equal(again.latents, made(plain, count, seed=70).latents)
    assert np.array_equal(again.latents, expected.latents) == (not count)


def test_pictures_of_a_batch_are_those_of_single_runs() -> None:
    """Of two, no and one persons: three passes, each with a count of tokens of its own."""
    controls = {"id_patch": Control(drawing())}
    requests = [
        Request(PROMPT, people(count, seed=count), seed=count, controls=controls, subject_conditioning_ratio=RATIO)
        for count in (2, 0, 1)
    ]
    batch = opened().generate_batch(requests, num_inference_steps=4, output="latents")
    for request, together in zip(requests, batch, strict=True):
        [alone] = opened().generate_batch([request], num_inference_steps=4, output="latents")
        assert np.array_equal(together.latents, alone.latents)
        assert rows_of_steps(together) == rows_of_steps(alone)


@COUNTS
def test_one_stage_at_a_time_makes_the_same_picture(count: int) -> None:
    """memory="low", with replayed steps where they can be."""
    expected = made(opened(), count, output="np")
    folder = built_method("idpatch").engine
    with Engine.load(folder, "onnxruntime", "cuda", memory="low", cuda_graph=REHEARSAL) as engine:
        ours = made(engine, count, output="np")
        assert np.array_equal(ours.latents, expected.latents)
        assert np.array_equal(ours.images[0], expected.images[0])


@pytest.mark.parametrize("size", [Size(1, 1, 128), Size(1, 0, 128), Size(2, 3, 64), Size(1, 4, 192)], ids=str)
def test_the_arena_is_counted_to_the_byte(size: Size, pieces: Callable[[Any], tuple[list[int], list[int]]]) -> None:
    """Every piece, in the order in which it is taken."""
    engine, steps = opened(), opened().config.num_inference_steps
    requests = [
        Request(
            f"{2 * n}",
            [Person(embedding=e, at=(9.5, 9.5)) for e in embeddings_of(size.persons, n)],
            f"{2 * n + 1}",
            seed=n,
            controls={"id_patch": Control(np.full((3, size.resolution, size.resolution), n / 4, np.float32))},
        )
        for n in range(size.batch)
    ]
    options: dict[str, Any] = {"height": size.resolution, "width": size.resolution, "output": "np"}
    engine.generate_batch(requests, num_inference_steps=steps, **options)
    ours = pieces(engine.backend._gpu)  # type: ignore[attr-defined]
    arena_bytes(engine.manifest, engine.manifest.build_for("onnxruntime", "cuda"), size)
    assert len(ours[1]) > 20 and pieces(None) == ours
