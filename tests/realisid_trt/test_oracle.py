"""An outside oracle: where the two must coincide, the engine equals diffusers' own SDXL pipeline with two ControlNets.

One person, the box over the whole picture, the branches seeing the row's pooled text, λi = λt, no delay, the ID tokens
set to the prompt's embeddings and the null ID to the negative prompt's: then RealisID is a plain multi-ControlNet.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from export.truth.reference import Reference
from export.truth.schedulers import scheduler_of
from realisid_trt import Engine, Person, Sampler
from realisid_trt.loop.noise import initial_noise
from realisid_trt.manifest import CONSTANTS, MANIFEST
from tests.realisid_trt.truth import NEGATIVE, PROMPT, checkpoint_with

SCALE, STEPS = 6.0, 8


def pipeline_latents(checkpoint: Any, dtype: torch.dtype, pose: np.ndarray, noise: np.ndarray) -> tuple[Any, ...]:
    from diffusers import MultiControlNetModel, StableDiffusionXLControlNetPipeline

    reference = Reference(checkpoint, dtype)
    pipeline = StableDiffusionXLControlNetPipeline(
        vae=reference.vae,
        text_encoder=reference.text_encoders[0],
        text_encoder_2=reference.text_encoders[1],
        tokenizer=reference.tokenizers[0],
        tokenizer_2=reference.tokenizers[1],
        unet=reference.unet,
        controlnet=MultiControlNetModel(list(reference.controlnets.values())),
        scheduler=scheduler_of(Sampler("ddim"), checkpoint.scheduler_config, dtype),
    )
    pipeline.set_progress_bar_config(disable=True)
    prompt_embeds, pooled = reference.encode_prompt(PROMPT)
    negative_embeds, negative_pooled = reference.encode_prompt(NEGATIVE)
    side = pose.shape[-1]
    latents = pipeline(
        prompt_embeds=prompt_embeds,
        pooled_prompt_embeds=pooled,
        negative_prompt_embeds=negative_embeds,
        negative_pooled_prompt_embeds=negative_pooled,
        image=[torch.from_numpy(pose)[None].to(dtype), torch.ones(1, 1, side, side, dtype=dtype)],
        latents=torch.from_numpy(noise).to(dtype),
        height=side,
        width=side,
        num_inference_steps=STEPS,
        guidance_scale=SCALE,
        controlnet_conditioning_scale=[1.0, 1.0],
        output_type="latent",
    ).images
    return latents.double().numpy(), prompt_embeds[0], negative_embeds[0]


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_engine_is_diffusers_multi_controlnet(
    built: Any, with_config: Callable[..., Path], prediction: str
) -> None:
    of, scheduler = built["x8"], {"prediction_type": prediction}
    config = {"branch_pooled_text": "per_row", "null_id": "file"}
    checkpoint = checkpoint_with(of.checkpoint, scheduler, **config)
    side = checkpoint.sample_size * checkpoint.vae_scale_factor
    pose = np.random.default_rng(0).random((3, side, side)).astype(np.float32)
    noise = initial_noise(5, (1, checkpoint.latent_channels, checkpoint.sample_size, checkpoint.sample_size))
    truth, prompt_embeds, negative_embeds = pipeline_latents(checkpoint, torch.float64, pose, noise)
    plain, *_ = pipeline_latents(checkpoint, torch.float32, pose, noise)

    folder = with_config(of.engine, scheduler=scheduler, **config)
    _set_null_id(folder, negative_embeds.numpy().astype(np.float32))
    engine = Engine.load(folder)
    person = Person(id_tokens=prompt_embeds.numpy(), box=(0, 0, side, side), pose_image=pose)
    ours = engine.generate(
        PROMPT, [person], negative_prompt=NEGATIVE, latents=noise, num_inference_steps=STEPS, guidance_scale=SCALE,
        id_guidance_scale=SCALE, subject_conditioning_ratio=None, output="latents",
    ).latents  # fmt: skip
    scale = np.sqrt(np.mean(truth**2))
    rms, rms_torch = (np.sqrt(np.mean((z - truth) ** 2)) / scale for z in (ours, plain))
    print(f"{prediction}: engine {rms:.2e}, diffusers in float32 {rms_torch:.2e}")
    assert 0 < rms <= 2 * rms_torch


def _set_null_id(folder: Path, tokens: np.ndarray) -> None:
    """The engine as built from a checkpoint whose null_id.safetensors holds `tokens`."""
    import json

    from safetensors.numpy import load_file

    from realisid_trt.files import file_sha256
    from realisid_trt.manifest import seal

    constants = load_file(folder / CONSTANTS)
    assert constants["null_id_tokens"].shape == tokens.shape
    (folder / CONSTANTS).unlink()  # a link to the original
    save_file(constants | {"null_id_tokens": tokens}, folder / CONSTANTS)
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"][CONSTANTS] = {
        "bytes": (folder / CONSTANTS).stat().st_size,
        "sha256": file_sha256(folder / CONSTANTS),
    }
    manifest["seal"] = seal(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))
