"""A checkpoint's pictures in plain torch: unmodified diffusers modules, straight from the equations. Slow and obvious.

It is the truth that everything else is compared with: three full rows, nothing shared, nothing precomputed,
`F.interpolate`, diffusers' schedulers. It reads the checkpoint, and shares no code with the runtime but the names of
samplers and the noise of a seed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from realisid_trt.loop.noise import step_noise
from realisid_trt.loop.samplers import Sampler

from ..checkpoint import Checkpoint
from ..checkpoint.vae import from_latents
from .reference_branches import ReferenceBranches, ReferenceControl, ReferencePerson, normed, tokens_read
from .schedulers import steps_of

__all__ = ["Reference", "ReferenceControl", "ReferencePerson"]


class Reference:
    """All of a checkpoint in one dtype."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> None:
        self.checkpoint, self.config, self.dtype = checkpoint, checkpoint.config, dtype
        self.unet = checkpoint.load_unet(dtype)
        self.controlnets = {branch.name: checkpoint.load_controlnet(branch.name, dtype) for branch in self.config.table}
        self.has_identities = self.config.id_input != "none"
        self.image_encoder = checkpoint.load_image_encoder(dtype) if self.config.id_input == "face_crop" else None
        self.id_projection = checkpoint.load_id_projection(dtype) if self.has_identities else None
        self.patch_projection = checkpoint.load_patch_projection(dtype) if checkpoint.has_patches else None
        self.vae = checkpoint.load_vae(dtype)
        self.text_encoders = [checkpoint.load_text_encoder(name, dtype) for name in checkpoint.text_encoder_names]
        self.tokenizers = [
            AutoTokenizer.from_pretrained(checkpoint.tokenizer_folder(name)) for name in checkpoint.text_encoder_names
        ]
        self.branches = ReferenceBranches(checkpoint, self.controlnets, self.patch_projection, dtype)

    # p_text

    @torch.no_grad()
    def encode_prompt(self, prompt: str | None) -> tuple[Tensor, Tensor | None]:
        """prompt_embeds (1, T, D) and pooled (1, P); None is the absent negative prompt."""
        zeros = prompt is None and self.config.force_zeros_for_empty_prompt
        hidden_states, pooled = [], None
        for tokenizer, encoder in zip(self.tokenizers, self.text_encoders, strict=True):
            ids = tokenizer(
                prompt or "",
                padding="max_length",
                max_length=self.checkpoint.max_length,
                truncation=True,
                return_tensors="pt",
            ).input_ids
            out = encoder(ids, output_hidden_states=True)
            if self.checkpoint.has_added_conditions:  # SDXL
                hidden_states.append(out.hidden_states[-2])
                pooled = out[0]
            else:  # SD 1.5
                hidden_states.append(out[0])
        prompt_embeds = torch.cat(hidden_states, dim=-1)
        if zeros:
            return torch.zeros_like(prompt_embeds), None if pooled is None else torch.zeros_like(pooled)
        return prompt_embeds, pooled

    # p_id

    @torch.no_grad()
    def encode_id(self, id_pixels: Tensor) -> Tensor:
        """id_pixels (N, 3, S, S) → (N, T, D)."""
        assert self.image_encoder is not None and self.id_projection is not None
        hidden_states = self.image_encoder(id_pixels.to(self.dtype), output_hidden_states=True).hidden_states
        return self.id_projection(hidden_states[-2])

    def _tokens_of(self, person: ReferencePerson) -> Tensor:
        if person.id_tokens is not None:
            return person.id_tokens.to(self.dtype)
        if person.embedding is not None:
            assert self.id_projection is not None
            return self.id_projection(normed(self.checkpoint, person.embedding, self.dtype))[0]
        assert person.id_pixels is not None
        return self.encode_id(person.id_pixels[None])[0]

    def null_id_tokens(self) -> Tensor:
        """(T, D): the tokens of a dropped ID."""
        if self.config.null_id == "file":
            return torch.as_tensor(self.checkpoint.null_id_tokens()).to(self.dtype)
        if self.checkpoint.face_encoder is not None:
            assert self.id_projection is not None
            zero = torch.zeros(1, 1, self.checkpoint.face_encoder.output_dim, dtype=self.dtype)
            tokens = self.id_projection(zero)[0]
            return torch.zeros_like(tokens) if self.config.null_id == "zero_tokens" else tokens
        size = self.checkpoint.image_size
        tokens = self.encode_id(torch.zeros(1, 3, size, size))[0]
        return torch.zeros_like(tokens) if self.config.null_id == "zero_tokens" else tokens

    # Eq. (8), at every evaluation

    @torch.no_grad()
    def generate(
        self,
        prompt: str,
        persons: Sequence[ReferencePerson],
        latents: Tensor,
        *,
        negative_prompt: str | None = None,
        num_inference_steps: int,
        sampler: Sampler | Mapping[str, Any] | str | None = None,
        seed: int = 0,
        guidance_scale: float | None = None,
        id_guidance_scale: float | None = None,
        subject_conditioning_ratio: float | None = None,
        controls: Mapping[str, ReferenceControl] | None = None,
        local_scale: float | None = None,
        global_scale: float | None = None,
    ) -> Tensor:
        """z_0 (1, C, h, w) in this reference's dtype.

        latents: (1, C, h, w) standard normal noise. sampler: None takes the config's, or else DDIM. seed: of the noise
        that its steps add; each evaluation has its own (`step_noise`).
        """
        controls = dict(controls or {})
        for name, scale in (("local", local_scale), ("global", global_scale)):
            if scale is not None:
                controls[name] = ReferenceControl(scale=scale)
        config, f, shape = self.config, self.checkpoint.vae_scale_factor, latents.shape[1:]
        lambda_t = config.guidance_scale if guidance_scale is None else guidance_scale
        lambda_i = config.id_guidance_scale if id_guidance_scale is None else id_guidance_scale
        lambda_i = lambda_t if lambda_i is None else lambda_i
        height, width = latents.shape[-2] * f, latents.shape[-1] * f

        negative, text = self.encode_prompt(negative_prompt), self.encode_prompt(prompt)
        null_id, ids = torch.zeros(0), [torch.zeros(0)] * len(persons)
        if self.has_identities:
            null_id, ids = self.null_id_tokens(), [self._tokens_of(person) for person in persons]
        no_id = null_id[:0] if config.delayed_id == "absent" else null_id
        boxes = [self.branches.snap(person.box, height, width) for person in persons if person.box is not None]
        time_ids = torch.tensor([[height, width, 0, 0, height, width]], dtype=self.dtype)

        sampler = config.default_sampler if sampler is None else Sampler.of(sampler)
        steps = steps_of(sampler, self.checkpoint.scheduler_config, num_inference_steps, self.dtype)
        state = steps.begin(latents.to(self.dtype))
        # All evaluations of a step have its number i: the delay and the windows of branches count steps.
        for row, (timestep, i) in enumerate(zip(steps.timesteps, steps.step_of, strict=True)):
            latents = steps.read(state)
            # The delay: steps i <= (1 - α)·S have no ID in FastComposer, those with i < S·(1 - α) in ID-Patch.
            delayed = False
            if (ratio := subject_conditioning_ratio) is not None and config.delay_rule == "inclusive":
                delayed = i <= (1 - ratio) * num_inference_steps
            elif ratio is not None:
                delayed = i < num_inference_steps * (1 - ratio)
            dropped = [no_id if delayed else null_id] * len(persons)
            step_lambda_i = 0.0 if delayed or not persons else lambda_i
            predictions = []
            for (prompt_embeds, pooled), tokens in (
                (negative, dropped),
                (text, dropped),
                (text, dropped if delayed else ids),
            ):
                added = None if pooled is None else {"text_embeds": pooled, "time_ids": time_ids}
                share = i / num_inference_steps, (i + 1) / num_inference_steps
                injected = {}
                if found := self.branches.residuals(
                    latents, timestep, persons, boxes, tokens, prompt_embeds, added, controls, share
                ):
                    injected = {
                        "down_block_additional_residuals": found[:-1], "mid_block_additional_residual": found[-1]
                    }  # fmt: skip
                predictions.append(
                    self.unet(
                        latents,
                        timestep,
                        encoder_hidden_states=tokens_read(config.unet_tokens, prompt_embeds, tokens),
                        added_cond_kwargs=added,
                        return_dict=False,
                        **injected,
                    )[0]
                )
            none, text_only, full = predictions
            prediction = none + lambda_t * (text_only - none) + step_lambda_i * (full - text_only)
            state = steps.step(prediction, state, partial(self._noise, seed, row, shape))
        return state

    def _noise(self, seed: int, row: int, shape: tuple[int, ...]) -> Tensor:
        """(1, C, h, w): standard normal noise, which an evaluation's step multiplies by its deviation and adds."""
        return torch.from_numpy(step_noise(seed, row, shape))[None].to(self.dtype)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """z_0 → the picture (1, 3, H, W), about [-1, 1]."""
        return self.vae.decode(from_latents(latents.to(self.dtype), self.vae.config), return_dict=False)[0]
