"""The baseline computes RealisID: no more and no less than the reference does, to the rounding of float32."""

from __future__ import annotations

import dataclasses
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from benchmarks.baseline import FORMATS
from benchmarks.measure import relative_rms
from benchmarks.naive import NaivePipeline
from benchmarks.options import BASELINES, COMPILED
from benchmarks.same import SAME
from export.checkpoint import Checkpoint
from export.miniature import make_checkpoint
from export.truth.reference import Reference, ReferencePerson
from export.truth.verify_engine import WORST_RATIO
from realisid_trt import Person
from realisid_trt.config import RealisIDConfig
from realisid_trt.errors import RequestError
from tests.realisid_trt.truth import checkpoint_with
from training.residuals import DESIGNS

STEPS, PROMPT = 2, "two friends hiking"
SQUARE, OBLONG = (128, 128), (96, 160)


@lru_cache
def opened(path: Path) -> Checkpoint:
    return Checkpoint.open(path)


@lru_cache
def reference(path: Path, dtype: torch.dtype) -> Reference:
    return Reference(opened(path), dtype)


@lru_cache
def naive(path: Path, memory_format: str = "contiguous") -> NaivePipeline:
    return NaivePipeline(opened(path), memory_format)


def persons_of(checkpoint: Checkpoint, count: int) -> list[Person]:
    """Persons whose boxes overlap, so that every mode of `overlap` makes a difference."""
    rng = np.random.default_rng(3)
    side = checkpoint.sample_size * checkpoint.vae_scale_factor
    return [
        Person(
            id_tokens=rng.standard_normal((checkpoint.num_id_tokens, checkpoint.cross_attention_dim)).astype(
                np.float32
            ),
            pose_image=rng.random((3, side, side)).astype(np.float32).round(),
            box=box,
        )
        for box in [(5, 10, 69, 75), (40, 20, 120, 91)][:count]
    ]


def noise(checkpoint: Checkpoint, size_px: tuple[int, int]) -> NDArray[np.float32]:
    shape = (1, checkpoint.latent_channels, *(px // checkpoint.vae_scale_factor for px in size_px))
    return np.random.default_rng(4).standard_normal(shape).astype(np.float32)


@lru_cache
def truth(
    path: Path, count: int, alpha: float | None, size_px: tuple[int, int], negative_prompt: str | None = None
) -> tuple[NDArray[np.float64], float]:
    """The final latents in float64, and the relative RMS error of the reference in float32."""
    checkpoint = opened(path)
    persons = [
        ReferencePerson(
            id_tokens=torch.as_tensor(person.id_tokens),
            pose_image=torch.as_tensor(person.pose_image),
            box=tuple(person.box),
        )
        for person in persons_of(checkpoint, count)
    ]
    exact, single = (
        reference(path, dtype)
        .generate(
            PROMPT,
            persons,
            torch.from_numpy(noise(checkpoint, size_px)),
            negative_prompt=negative_prompt,
            num_inference_steps=STEPS,
            subject_conditioning_ratio=alpha,
        )
        .double()
        .numpy()
        for dtype in (torch.float64, torch.float32)
    )
    return exact, relative_rms(single, exact)


def check(
    path: Path,
    count: int,
    alpha: float | None,
    size_px: tuple[int, int] = SQUARE,
    memory_format: str = "contiguous",
    negative_prompt: str | None = None,
    **baseline: bool,
) -> None:
    checkpoint = opened(path)
    result = naive(path, memory_format).generate(
        PROMPT,
        persons_of(checkpoint, count),
        noise(checkpoint, size_px),
        negative_prompt=negative_prompt,
        num_inference_steps=STEPS,
        subject_conditioning_ratio=alpha,
        **baseline,
    )
    exact, error = truth(path, count, alpha, size_px, negative_prompt)
    assert result.latents.dtype == np.float32
    assert relative_rms(result.latents, exact) <= WORST_RATIO * error
    assert result.image is not None and result.image.shape == (*size_px, 3)
    assert result.image.min() >= 0 and result.image.max() <= 1


@pytest.mark.parametrize("baseline", sorted(set(BASELINES) - set(COMPILED)))
@pytest.mark.parametrize("alpha", [0.7, None])  # of two steps, the first has no ID with 0.7
@pytest.mark.parametrize("count", [0, 1, 2])
def test_it_makes_the_reference_s_picture(checkpoint_dir: Path, count: int, alpha: float | None, baseline: str) -> None:
    check(checkpoint_dir, count, alpha, **BASELINES[baseline])


def test_an_oblong_picture_and_a_negative_prompt(checkpoint_dir: Path) -> None:
    check(checkpoint_dir, 2, 0.7, OBLONG, negative_prompt="blurry")


def test_channels_last_changes_the_order_of_sums_only(checkpoint_dir: Path) -> None:
    check(checkpoint_dir, 1, 0.7, memory_format="channels_last")


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
@pytest.mark.parametrize("count", [0, 2])
def test_in_half_precision_it_is_as_far_off_as_is_stated(checkpoint_dir: Path, count: int, precision: str) -> None:
    """Its error is less than half of the stated difference between two of them; the VAE is float32."""
    checkpoint = opened(checkpoint_dir)
    pipeline = NaivePipeline(checkpoint, dtype=getattr(torch, precision))
    assert pipeline.unet.dtype == pipeline.text_encoders["text_encoder"].dtype == getattr(torch, precision)
    assert pipeline.vae.dtype == torch.float32
    result = pipeline.generate(
        PROMPT, persons_of(checkpoint, count), noise(checkpoint, SQUARE), num_inference_steps=STEPS
    )
    exact, single = truth(checkpoint_dir, count, 0.7, SQUARE)
    assert result.latents.dtype == np.float32 and result.image is not None and result.image.dtype == np.float32
    assert 100 * single < relative_rms(result.latents, exact) < SAME[precision] / 2


@pytest.mark.parametrize(
    "options",
    [
        {
            "prediction": "v_prediction",
            "overlap": "average",
            "relocate_mode": "area",
            "branch_pooled_text": "per_row",
            "null_id": "zero_tokens",
        },
        {"family": "sd15", "vae_factor": 4, "overlap": "priority", "force_zeros_for_empty_prompt": False},
    ],
    ids=["sdxl", "sd15"],
)
def test_other_checkpoints(tmp_path: Path, options: dict[str, object]) -> None:
    path = make_checkpoint(tmp_path / "checkpoint", **options)
    check(path, 2, 0.7)
    check(path, 2, 0.7, share_null=True)


def test_branches_that_see_the_text_share_nothing(checkpoint_dir: Path) -> None:
    checkpoint = checkpoint_with(checkpoint_dir, branch_pooled_text="per_row")
    given = PROMPT, persons_of(checkpoint, 2), noise(checkpoint, SQUARE)
    plain, shared = (
        NaivePipeline(checkpoint).generate(*given, num_inference_steps=STEPS, share_null=share)
        for share in (False, True)
    )
    assert shared.rows == plain.rows
    assert np.array_equal(shared.latents, plain.latents)


def test_the_faster_format_is_one_of_them(checkpoint_dir: Path) -> None:
    pipeline, checkpoint = NaivePipeline(opened(checkpoint_dir)), opened(checkpoint_dir)
    picture = {"persons": persons_of(checkpoint, 1), "latents": noise(checkpoint, SQUARE), "num_inference_steps": 2}
    pipeline.use_faster_format(**picture)
    chosen = FORMATS[pipeline.memory_format]
    kernels = [weight for weight in pipeline.unet.parameters() if weight.ndim == 4 and min(weight.shape) > 1]
    assert kernels and all(weight.is_contiguous(memory_format=chosen) for weight in kernels)


@pytest.mark.parametrize(
    ("baseline", "unet", "branches"),
    [("naive", (2, 3), (2, 3)), ("naive-shared", (2, 3), (1, 2)), ("naive-no-delay", (3, 3), (3, 3))],
)
def test_rows_are_what_a_step_evaluates(
    checkpoint_dir: Path, baseline: str, unet: tuple[int, int], branches: tuple[int, int]
) -> None:
    checkpoint, seen = opened(checkpoint_dir), []
    pipeline = naive(checkpoint_dir)
    result = pipeline.generate(
        PROMPT,
        persons_of(checkpoint, 2),
        noise(checkpoint, SQUARE),
        num_inference_steps=STEPS,
        subject_conditioning_ratio=0.7,
        **BASELINES[baseline],
        decode=False,
        progress=lambda step, steps: seen.append((step, steps, pipeline.usage.rows["unet"])),
    )
    assert seen == [(1, 2, unet[0]), (2, 2, sum(unet))]
    assert result.rows["controlnet_local"] == result.rows["controlnet_global"] == 2 * sum(branches)
    assert result.image is None and "vae" not in result.timings
    parts = sum(ms for stage, ms in result.timings.items() if stage.startswith("denoise."))
    assert parts <= result.timings["denoise"] and sum(result.step_ms) <= result.timings["denoise"]


def test_a_drawing_of_the_whole_picture_is_refused(checkpoint_dir: Path) -> None:
    config = RealisIDConfig.from_dict({"branches": DESIGNS["uncropped"].rows("zeros")})
    checkpoint = dataclasses.replace(opened(checkpoint_dir), config=config)
    with pytest.raises(RequestError, match="draws nothing, and the branch local is .* alone: --baseline none"):
        NaivePipeline(checkpoint).generate(
            PROMPT, persons_of(checkpoint, 1), noise(checkpoint, SQUARE), num_inference_steps=1
        )


def test_a_photo_is_refused(checkpoint_dir: Path) -> None:
    checkpoint = opened(checkpoint_dir)
    with pytest.raises(RequestError, match=r"no face front end: give Person\(id_tokens=…, pose_image=…, box=…\)"):
        naive(checkpoint_dir).generate(PROMPT, [Person("alice.jpg")], noise(checkpoint, SQUARE), num_inference_steps=1)
