"""ID-Patch: the engine equals its published equations, and a picture does not depend on its neighbours."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from realisid_trt import Control, Engine, Person, Request
from realisid_trt.errors import ShapeError
from realisid_trt.loop.noise import initial_noise
from tests.methods import built_method
from tests.realisid_trt.id_patch_equations import IdPatchModels, id_patch_latents

pytestmark = pytest.mark.slow("controlnet")  # builds engines of other tables
PROMPT, NEGATIVE, STEPS = "two friends raise a glass", "blurry, dark", 6


@lru_cache
def opened() -> Engine:
    return Engine.load(built_method("idpatch").engine)


@lru_cache
def models(dtype: torch.dtype) -> IdPatchModels:
    return IdPatchModels(built_method("idpatch").checkpoint, dtype)


def embeddings_of(count: int, seed: int = 0) -> NDArray[np.float32]:
    vectors = np.random.default_rng(seed).standard_normal((count, 512))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def noses_of(count: int, size_px: tuple[int, int]) -> list[tuple[float, float]]:
    """Fractions of pixels, one halfway between two, overlapping, the first and the last at the border."""
    height, width = size_px
    places = [
        (3.25, 0.0),
        (width / 2 + 0.5, height / 2),
        (width / 2 + 11.5, height / 2 - 7),
        (width - 0.6, height - 1),
    ]
    return places[:count] if count != 1 else [places[1]]


def drawing_of(size_px: tuple[int, int]) -> NDArray[np.float32]:
    return np.random.default_rng(3).random((3, *size_px)).astype(np.float32)


def people(count: int, size_px: tuple[int, int], seed: int = 0) -> list[Person]:
    places = zip(embeddings_of(count, seed), noses_of(count, size_px), strict=True)
    return [Person(embedding=embedding, at=nose) for embedding, nose in places]


def noise_of(size_px: tuple[int, int]) -> NDArray[np.float32]:
    model = opened().model
    return initial_noise(5, (1, model.latent_channels, *(side // model.vae_scale_factor for side in size_px)))


def made(count: int, ratio: float | None, size_px: tuple[int, int], **options: Any) -> NDArray[np.float32]:
    return (
        opened()
        .generate(
            PROMPT, people(count, size_px), negative_prompt=NEGATIVE, latents=noise_of(size_px), output="latents",
            controls={"id_patch": Control(drawing_of(size_px))}, num_inference_steps=STEPS, height=size_px[0],
            width=size_px[1], subject_conditioning_ratio=ratio, **options,
        )
        .latents
    )  # fmt: skip


def published(
    dtype: torch.dtype, count: int, ratio: float | None, size_px: tuple[int, int], **options: Any
) -> NDArray[np.float64]:
    latents = id_patch_latents(
        models(dtype), PROMPT, NEGATIVE, torch.from_numpy(embeddings_of(count)), noses_of(count, size_px),
        torch.from_numpy(drawing_of(size_px)), torch.from_numpy(noise_of(size_px)), STEPS, ratio, **options,
    )  # fmt: skip
    return latents.double().numpy()


def rms(values: NDArray[Any]) -> float:
    return float(np.sqrt(np.mean(np.asarray(values, np.float64) ** 2)))


@pytest.mark.parametrize(
    ("count", "ratio", "oblong"),
    [
        (1, 0.8, False),
        (2, 0.8, True),
        (4, 0.8, False),
        (2, 0.0, False),
        (2, 1.0, False),
        (1, None, True),
        (4, 0.5, True),
    ],
)
def test_the_engine_is_the_published_equations(count: int, ratio: float | None, oblong: bool) -> None:
    side = opened().model.default_size
    size_px = (side // 2, side * 3 // 2) if oblong else (side, side)
    truth, plain = (published(dtype, count, ratio, size_px) for dtype in (torch.float64, torch.float32))
    ours = made(count, ratio, size_px)
    error, error_torch = (rms(latents - truth) / rms(truth) for latents in (ours, plain))
    print(f"N = {count}, ρ = {ratio}: engine {error:.2e}, torch in float32 {error_torch:.2e}")
    assert 0 < error <= 2 * error_torch


def test_the_oracle_sees_the_delay_and_the_patches() -> None:
    """Another delay, or noses a cell further, is another picture by far more than the bound."""
    side = opened().model.default_size
    size_px = (side, side)
    truth = published(torch.float64, 2, 0.8, size_px)
    assert rms(made(2, None, size_px) - truth) > 100 * rms(made(2, 0.8, size_px) - truth)
    moved = [Person(embedding=p.embedding, at=(p.at[0] + 8, p.at[1])) for p in people(2, size_px)]
    other = opened().generate(
        PROMPT, moved, negative_prompt=NEGATIVE, latents=noise_of(size_px), output="latents",
        controls={"id_patch": Control(drawing_of(size_px))}, num_inference_steps=STEPS,
    )  # fmt: skip
    assert rms(other.latents - truth) > 100 * rms(made(2, 0.8, size_px) - truth)


def test_euler_of_the_published_pipeline_is_this_sampler() -> None:
    """Leading spacing: Euler is DDIM with a last ᾱ of 1."""
    side = opened().model.default_size
    truth = published(torch.float64, 2, 0.8, (side, side))
    euler = published(torch.float64, 2, 0.8, (side, side), sampler="EulerDiscreteScheduler")
    assert rms(euler - truth) / rms(truth) < 1e-4


def test_persons_in_another_order_are_the_same_picture() -> None:
    """Attention does not see the order of tokens. But it sees how often somebody stands among them."""
    side = opened().model.default_size
    given: dict[str, Any] = {
        "negative_prompt": NEGATIVE, "latents": noise_of((side, side)), "output": "latents",
        "num_inference_steps": STEPS, "controls": {"id_patch": Control(drawing_of((side, side)))},
    }  # fmt: skip
    persons = people(3, (side, side))
    one = opened().generate(PROMPT, persons, **given).latents
    permuted = opened().generate(PROMPT, [persons[2], persons[0], persons[1]], **given).latents
    twice = opened().generate(PROMPT, [*persons, persons[0]], **given).latents
    bound = rms(published(torch.float32, 2, 0.8, (side, side)) - published(torch.float64, 2, 0.8, (side, side)))
    assert rms(one - permuted) <= 4 * bound  # each is within 2 of the exact one
    assert rms(one - twice) > 100 * bound


def test_pictures_of_one_two_and_no_persons_in_one_batch() -> None:
    """Bit for bit as each alone, in the order asked for."""
    engine, side = opened(), opened().model.default_size
    drawing = {"id_patch": Control(drawing_of((side, side)))}
    requests = [
        Request(f"{PROMPT} {number}", people(count, (side, side), seed=number), controls=drawing, seed=number, **more)
        for number, (count, more) in enumerate(
            [(1, {}), (2, {}), (0, {}), (2, {"subject_conditioning_ratio": 0.3}), (2, {"num_images": 2})]
        )
    ]
    seen: list[tuple[int, int]] = []
    options: Any = {"num_inference_steps": STEPS, "output": "latents"}
    together = engine.generate_batch(requests, progress=lambda done, total: seen.append((done, total)), **options)
    assert seen == [(done, 4 * STEPS) for done in range(1, 4 * STEPS + 1)]
    for request, result in zip(requests, together, strict=True):
        [alone] = engine.generate_batch([request], **options)
        assert np.array_equal(alone.latents, result.latents)
    assert [result.rows["unet_decoder"] for result in together] == [2 * STEPS] * 4 + [2 * 2 * STEPS]


def test_two_rows_of_everything_for_any_number_of_persons() -> None:
    side = opened().model.default_size
    for count in (1, 4):
        result = opened().generate(
            PROMPT, people(count, (side, side)), output="latents", num_inference_steps=STEPS,
            controls={"id_patch": Control(drawing_of((side, side)))},
        )  # fmt: skip
        assert {name: result.rows[name] for name in ("unet_encoder", "unet_decoder", "id_patch_branch")} == {
            "unet_encoder": 2 * STEPS, "unet_decoder": 2 * STEPS, "id_patch_branch": 2 * STEPS,
        }  # fmt: skip
        assert result.rows["id_patch_condition"] == 1


def test_more_persons_than_the_engine_was_built_for_are_refused_by_number(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = opened()
    monkeypatch.setitem(engine.manifest.values["built_for"], "persons", 2)  # as a build with --persons 2 says
    persons = people(3, (engine.model.default_size,) * 2)
    said = "3 persons were asked for in one picture, and this engine was built for 2 .*--persons 3"
    for ask in (engine.generate, engine.conditions):
        with pytest.raises(ShapeError, match=said):
            ask(PROMPT, persons)
