"""ControlNets that read the text: the engine equals diffusers' own pipelines, and runs no row that it can leave out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from export.checkpoint import Checkpoint
from export.truth.reference import Reference, ReferenceControl
from export.truth.schedulers import scheduler_of
from export.truth.verify import rms_of
from realisid_trt import Control, Engine, Request, Sampler
from realisid_trt.loop.noise import initial_noise
from tests.methods import built_method
from tests.realisid_trt.truth import NEGATIVE, PROMPT, Scene, checkpoint_with, latent_errors

pytestmark = pytest.mark.slow("controlnet")  # builds engines of other tables
STEPS, GUIDANCE = 6, 6.0
# Name of a branch → scale, start and end: four steps of six, three, and four.
ONE = {"openpose": (0.7, 0.3, 1.0)}
TWO = {"openpose": (0.7, 0.0, 0.6), "depth": (1.1, 0.3, 1.0)}

Settings = Mapping[str, tuple[float, float, float]]


@lru_cache
def opened(name: str) -> Engine:
    return Engine.load(built_method(name).engine)


def images(checkpoint: Checkpoint, size_px: tuple[int, int]) -> dict[str, NDArray[np.float32]]:
    """A random picture for every branch that takes one."""
    rng = np.random.default_rng(7)
    return {
        branch.name: rng.random((branch.channels, *size_px)).astype(np.float32)
        for branch in checkpoint.config.table
        if branch.per == "picture"
    }


def noise_of(checkpoint: Checkpoint, size_px: tuple[int, int]) -> NDArray[np.float32]:
    return initial_noise(5, (1, checkpoint.latent_channels, *(side // checkpoint.vae_scale_factor for side in size_px)))


def diffusers_latents(
    checkpoint: Checkpoint, dtype: torch.dtype, settings: Settings, size_px: tuple[int, int]
) -> NDArray[np.float64]:
    """The final latents of diffusers' pipeline for this base model, with the ControlNets that `settings` names."""
    from diffusers import MultiControlNetModel, StableDiffusionControlNetPipeline, StableDiffusionXLControlNetPipeline

    reference = Reference(checkpoint, dtype)
    nets = [reference.controlnets[name] for name in settings]
    parts: dict[str, Any] = {
        "vae": reference.vae,
        "text_encoder": reference.text_encoders[0],
        "tokenizer": reference.tokenizers[0],
        "unet": reference.unet,
        "controlnet": nets[0] if len(nets) == 1 else MultiControlNetModel(nets),
        "scheduler": scheduler_of(Sampler("ddim"), checkpoint.scheduler_config, dtype),
    }
    text, pooled = reference.encode_prompt(PROMPT)
    negative, negative_pooled = reference.encode_prompt(NEGATIVE)
    prompts = {"prompt_embeds": text, "negative_prompt_embeds": negative}
    pipeline: Any
    if checkpoint.has_added_conditions:
        parts |= {"text_encoder_2": reference.text_encoders[1], "tokenizer_2": reference.tokenizers[1]}
        prompts |= {"pooled_prompt_embeds": pooled, "negative_pooled_prompt_embeds": negative_pooled}
        pipeline = StableDiffusionXLControlNetPipeline(**parts)
    else:
        pipeline = StableDiffusionControlNetPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    pipeline.set_progress_bar_config(disable=True)
    shown = [torch.from_numpy(images(checkpoint, size_px)[name])[None].to(dtype) for name in settings]
    scales, starts, ends = (list(values) for values in zip(*settings.values(), strict=True))
    alone = len(nets) == 1
    return (
        pipeline(
            **prompts,
            image=shown[0] if alone else shown,
            latents=torch.from_numpy(noise_of(checkpoint, size_px)).to(dtype),
            height=size_px[0],
            width=size_px[1],
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            controlnet_conditioning_scale=scales[0] if alone else scales,
            control_guidance_start=starts,
            control_guidance_end=ends,
            output_type="latent",
        )
        .images.double()
        .numpy()
    )


@pytest.mark.parametrize(
    ("name", "settings", "prediction", "oblong"),
    [
        ("controlnet", ONE, "epsilon", False),
        ("controlnet", ONE, "v_prediction", True),
        ("controlnet", TWO, "epsilon", True),
        ("controlnet", TWO, "v_prediction", False),
        ("sd15", TWO, "epsilon", False),
        ("sd15", ONE, "v_prediction", True),
    ],
)
def test_the_engine_is_diffusers_pipeline(
    with_config: Callable[..., Path], name: str, settings: Settings, prediction: str, oblong: bool
) -> None:
    of, scheduler = built_method(name), {"prediction_type": prediction}
    checkpoint = checkpoint_with(of.checkpoint, scheduler)
    assert checkpoint.scheduler_config["set_alpha_to_one"]
    side = checkpoint.sample_size * checkpoint.vae_scale_factor
    size_px = (side // 2, side * 3 // 2) if oblong else (side, side)
    truth, plain = (diffusers_latents(checkpoint, dtype, settings, size_px) for dtype in (torch.float64, torch.float32))
    shown = images(checkpoint, size_px)
    controls = {branch: Control(shown[branch], *setting) for branch, setting in settings.items()}
    with Engine.load(with_config(of.engine, scheduler=scheduler)) as engine:
        ours = engine.generate(
            PROMPT, negative_prompt=NEGATIVE, controls=controls, latents=noise_of(checkpoint, size_px),
            num_inference_steps=STEPS, guidance_scale=GUIDANCE, height=size_px[0], width=size_px[1], output="latents",
        ).latents  # fmt: skip
    rms, rms_torch = (rms_of(latents - truth) / rms_of(truth) for latents in (ours, plain))
    print(f"{name}, {', '.join(settings)}, {prediction}: engine {rms:.2e}, diffusers in float32 {rms_torch:.2e}")
    assert 0 < rms <= 2 * rms_torch


def given(name: str) -> dict[str, Any]:
    """Arguments of one picture at the engine's size, without controls."""
    checkpoint = Checkpoint.open(built_method(name).checkpoint)
    side = checkpoint.sample_size * checkpoint.vae_scale_factor
    return {"latents": noise_of(checkpoint, (side, side)), "num_inference_steps": STEPS, "output": "latents"}


def shown_to(name: str) -> dict[str, NDArray[np.float32]]:
    checkpoint = Checkpoint.open(built_method(name).checkpoint)
    return images(checkpoint, (checkpoint.sample_size * checkpoint.vae_scale_factor,) * 2)


def test_a_branch_runs_in_its_window_only() -> None:
    """Two rows in each step of the window. A branch of scale 0, or without a picture, runs no network."""
    engine, shown = opened("controlnet"), shown_to("controlnet")
    controls = {name: Control(shown[name], *setting) for name, setting in TWO.items()}
    rows = engine.generate(PROMPT, controls=controls, **given("controlnet")).rows
    assert (rows["openpose_branch"], rows["depth_branch"], rows["unet_decoder"]) == (2 * 3, 2 * 4, 2 * STEPS)
    assert rows["openpose_condition"] == rows["depth_condition"] == 1
    alone = engine.generate(PROMPT, controls={"openpose": controls["openpose"]}, **given("controlnet"))
    silent = engine.generate(
        PROMPT, controls={**controls, "depth": Control(shown["depth"], scale=0)}, **given("controlnet")
    )
    assert np.array_equal(alone.latents, silent.latents)
    for result in (alone, silent):
        assert result.rows["openpose_branch"] == 2 * 3 and not [name for name in result.rows if "depth" in name]


def test_one_guidance_row_is_one_row_of_the_branch() -> None:
    engine, shown = opened("controlnet"), shown_to("controlnet")
    controls = {"depth": Control(shown["depth"])}
    rows = engine.generate(PROMPT, controls=controls, guidance_scale=1.0, **given("controlnet")).rows
    assert rows["depth_branch"] == rows["unet_decoder"] == rows["unet_encoder"] == STEPS


@pytest.mark.parametrize("name", ["controlnet", "mixed"])
def test_requests_of_a_batch_do_not_change_each_other(name: str) -> None:
    """With a control, without, with another scale and window: bit for bit as each makes its picture alone."""
    engine, shown = opened(name), shown_to(name)
    per_request: list[dict[str, Control]] = [
        {"openpose": Control(shown["openpose"])},
        {},
        {branch: Control(image[..., ::-1], 0.4, 0.3, 0.9) for branch, image in shown.items()},
    ]
    scene = Scene.make(engine, "one", engine.model.default_size, engine.model.default_size) if name == "mixed" else None
    people = [scene.persons(engine) if scene else [], [], []]
    requests = [
        Request(f"{PROMPT} {number}", persons, controls=controls, seed=number)
        for number, (controls, persons) in enumerate(zip(per_request, people, strict=True))
    ]
    options: Any = {"num_inference_steps": STEPS, "output": "latents"}
    together = engine.generate_batch(requests, **options)
    assert not np.array_equal(together[0].latents, together[1].latents)
    for request, result in zip(requests, together, strict=True):
        [alone] = engine.generate_batch([request], **options)
        assert np.array_equal(alone.latents, result.latents)


@pytest.mark.parametrize("place", ["nobody", "one", "overlapping"])
def test_realisid_with_a_text_branch_is_the_reference(place: str) -> None:
    """The branch ends after six tenths of the steps; the ID begins after three."""
    engine, checkpoint = opened("mixed"), Checkpoint.open(built_method("mixed").checkpoint)
    side = engine.model.default_size
    scene, picture = Scene.make(engine, place, side, side), shown_to("mixed")["openpose"]
    settings: dict[str, Any] = {"num_inference_steps": 8, "subject_conditioning_ratio": 0.7}
    result = engine.generate(
        PROMPT, scene.persons(engine), negative_prompt=NEGATIVE, latents=scene.latents, output="latents",
        controls={"openpose": Control(picture, scale=0.8)}, **settings,
    )  # fmt: skip
    assert result.rows["openpose_branch"] == 2 * 4
    controls = {"openpose": ReferenceControl(torch.from_numpy(picture), scale=0.8)}
    ours, plain = latent_errors(
        result.latents, checkpoint, scene.reference_persons(), scene.latents, PROMPT,
        negative_prompt=NEGATIVE, controls=controls, **settings,
    )  # fmt: skip
    print(f"{place}: engine {ours:.2e}, torch in float32 {plain:.2e}")
    assert 0 < ours <= 2 * plain
