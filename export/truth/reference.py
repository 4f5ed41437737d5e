"""A checkpoint's pictures in plain torch: unmodified diffusers modules, straight from the equations. Slow and obvious.

It is the truth that everything else is compared with: three full rows, nothing shared, nothing precomputed,
`F.interpolate`, diffusers' DDIMScheduler. It reads the checkpoint, and shares no code with the runtime.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoTokenizer

from realisid_trt.branches import Branch

from ..checkpoint import Checkpoint
from ..checkpoint.vae import from_latents


@dataclass(frozen=True, eq=False)
class ReferencePerson:
    """One person. id_pixels (3, S, S) normalised, id_tokens (T, D) or embedding (E,), or none without identities; box
    x0, y0, x1, y1 px, where a branch has rows of persons; pose_image (3, S, S), or (3, H, W) where a branch sees the
    whole picture. drawings: (C, H, W) by a branch's name, of the branches that draw a body, or a face without a
    pose_image. anchor: x, y px of the nose, where a branch is shown patches."""

    pose_image: Tensor | None = None
    box: tuple[float, float, float, float] | None = None
    id_pixels: Tensor | None = None
    id_tokens: Tensor | None = None
    embedding: Tensor | None = None
    anchor: tuple[float, float] | None = None
    drawings: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class ReferenceControl:
    """A branch in a request: its image (C, H, W) in [0, 1], and scale, start and end where the row's do not hold."""

    image: Tensor | None = None
    scale: float | None = None
    start: float | None = None
    end: float | None = None


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
        self.scheduler = checkpoint.load_scheduler()
        # In the dtype of the comparison: 0-dim float32 alphas would round the coefficients of a float64 run.
        self.scheduler.alphas_cumprod = self.scheduler.alphas_cumprod.to(dtype)
        self.scheduler.final_alpha_cumprod = torch.as_tensor(self.scheduler.final_alpha_cumprod).to(dtype)

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
            return self.id_projection(self._normed(person.embedding))[0]
        assert person.id_pixels is not None
        return self.encode_id(person.id_pixels[None])[0]

    def _normed(self, embedding: Tensor) -> Tensor:
        """(1, 1, E), as long as the projections expect."""
        assert self.checkpoint.face_encoder is not None
        embedding = embedding.to(self.dtype)[None, None]
        return F.normalize(embedding, dim=-1) if self.checkpoint.face_encoder.norm == "unit" else embedding

    def _read(self, kind: str, prompt_embeds: Tensor, id_tokens: Sequence[Tensor]) -> Tensor:
        """(1, ·, D): the tokens "text", or "text_and_id": behind the text those of every person, (T, D) or (0, D)."""
        if kind == "text":
            return prompt_embeds
        return torch.cat([prompt_embeds, *(tokens[None] for tokens in id_tokens)], dim=1)

    def painted(self, drawing: Tensor, persons: Sequence[ReferencePerson]) -> Tensor:
        """drawing (3, H, W) + the patches of the persons, each centred at its anchor and cut at the border."""
        total = drawing.to(self.dtype)
        for person in persons:
            assert self.patch_projection is not None and person.embedding is not None and person.anchor is not None
            patch = self.patch_projection(self._normed(person.embedding))[0]  # (3, p²)
            side = math.isqrt(patch.shape[1])
            left, top = (round(x - side / 2) for x in person.anchor)  # halves to even
            right, bottom = drawing.shape[2] - left - side, drawing.shape[1] - top - side
            total = total + F.pad(patch.reshape(3, side, side), (left, right, top, bottom))  # below zero it cuts
        return total

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

    # c_loc and the box arithmetic, in floating point from the formulas

    def snap(self, box: Sequence[float], height: int, width: int) -> tuple[int, int, int]:
        """x, y, side in latent cells."""
        f, snap = self.checkpoint.vae_scale_factor, self.checkpoint.config.box_snap or self.checkpoint.vae_scale_factor
        x0, y0, x1, y1 = box
        side = max(x1 - x0, y1 - y0)
        cx, cy = (x0 + x1) / 2, (y0 + y1) / 2
        side = min(side, height, width)
        x, y = cx - side / 2, cy - side / 2
        x, y = min(max(x, 0), width - side), min(max(y, 0), height - side)
        x, y, side = (math.floor(v / snap + 0.5) * snap // f for v in (x, y, side))
        side = max(side, snap // f)
        return min(max(x, 0), width // f - side), min(max(y, 0), height // f - side), side

    def level_box(self, box: tuple[int, int, int], level: int, size: tuple[int, int]) -> tuple[int, int, int]:
        """x, y, side in cells of `level`, inside (H, W) = size."""
        x, y, side = box
        side_k = max(1, math.floor(side / 2**level + 0.5))
        x_k = math.floor((x + side / 2) / 2**level - side_k / 2 + 0.5)
        y_k = math.floor((y + side / 2) / 2**level - side_k / 2 + 0.5)
        return min(max(x_k, 0), size[1] - side_k), min(max(y_k, 0), size[0] - side_k), side_k

    def location_mask(self, box: tuple[int, int, int], height: int, width: int) -> Tensor:
        """(1, 1, H, W): one inside the snapped box, zero elsewhere."""
        f = self.checkpoint.vae_scale_factor
        x, y, side = (v * f for v in box)
        mask = torch.zeros(1, 1, height, width, dtype=self.dtype)
        mask[..., y : y + side, x : x + side] = 1
        return mask

    # Eqs. (4), (5), (6), for every row of the table

    def residuals(
        self,
        latents: Tensor,
        timestep: Tensor,
        persons: Sequence[ReferencePerson],
        boxes: Sequence[tuple[int, int, int]],
        id_tokens: Sequence[Tensor],
        prompt_embeds: Tensor,
        pooled: Tensor | None,
        controls: Mapping[str, ReferenceControl],
        share: tuple[float, float],
    ) -> list[Tensor]:
        """The branches' sum for one row of the UNet: one tensor per skip, the mid block's last; empty if none acts.

        share: of the steps, where this one begins and ends: (i/S, (i + 1)/S).
        """
        total: list[Tensor] = []
        for branch in self.config.table:
            control = controls.get(branch.name, ReferenceControl())
            scale, start, end = (
                getattr(branch, key) if getattr(control, key) is None else getattr(control, key)
                for key in ("scale", "start", "end")
            )
            if share[0] < start or share[1] > end:
                continue
            if branch.per == "picture":
                if control.image is None:
                    continue
                shown = control.image.to(self.dtype)
                if branch.condition == "id_patches":
                    shown = self.painted(shown, persons)
                read = self._read(branch.tokens, prompt_embeds, id_tokens)
                found = self._controlnet(branch, latents, timestep, read, shown[None], pooled)
            elif persons:
                found = self._of_persons(branch, latents, timestep, persons, boxes, id_tokens, prompt_embeds, pooled)
            else:
                continue
            found = [scale * residual for residual in found]
            total = [a + b for a, b in zip(total, found, strict=True)] if total else found
        return total

    def _of_persons(
        self,
        branch: Branch,
        latents: Tensor,
        timestep: Tensor,
        persons: Sequence[ReferencePerson],
        boxes: Sequence[tuple[int, int, int]],
        id_tokens: Sequence[Tensor],
        prompt_embeds: Tensor,
        pooled: Tensor | None,
    ) -> list[Tensor]:
        """A branch that has one row for each person: their residuals, put where they belong and merged."""
        f, canvas = self.checkpoint.vae_scale_factor, self.checkpoint.sample_size
        size_px = latents.shape[-2] * f, latents.shape[-1] * f
        total: list[Tensor] = []
        covered: list[Tensor] = []
        for person, box, tokens in zip(persons, boxes, id_tokens, strict=True):
            x, y, side = box
            if branch.view == "face":
                seen = F.interpolate(  # ẑ_t
                    latents[:, :, y : y + side, x : x + side],
                    size=(canvas, canvas),
                    mode="bilinear",
                    align_corners=False,
                )
            else:
                seen = latents
            shown = self._shown(branch, person, box, size_px)
            read = tokens[None] if branch.tokens == "id" else prompt_embeds
            for index, residual in enumerate(self._controlnet(branch, seen, timestep, read, shown, pooled)):
                level = self.checkpoint.residuals[index][1]
                size = latents.shape[-2] >> level, latents.shape[-1] >> level
                if len(total) <= index:
                    total.append(residual.new_zeros(1, residual.shape[1], *size))
                    covered.append(residual.new_zeros(1, 1, *size))
                if branch.writes == "everywhere":
                    total[index] += residual
                    continue
                x_k, y_k, side_k = self.level_box(box, level, size)
                within = (..., slice(y_k, y_k + side_k), slice(x_k, x_k + side_k))
                if branch.view == "picture":
                    placed = residual[within]
                elif self.config.relocate_mode == "area":
                    placed = F.interpolate(residual, size=(side_k, side_k), mode="area")
                else:
                    placed = F.interpolate(residual, size=(side_k, side_k), mode="bilinear", align_corners=False)
                if self.config.overlap == "priority":
                    total[index][within] = placed
                else:
                    total[index][within] += placed
                covered[index][within] += 1
        if branch.writes == "box" and self.config.overlap == "average":
            total = [one / count.clamp(min=1) for one, count in zip(total, covered, strict=True)]
        return [one / len(persons) for one in total] if branch.merge == "mean" else total

    def _shown(
        self, branch: Branch, person: ReferencePerson, box: tuple[int, int, int], size_px: tuple[int, int]
    ) -> Tensor:
        """(1, C, H, W): what a branch is shown of one person. One channel is the brightest of three."""
        if branch.condition == "location":
            return self.location_mask(box, *size_px).expand(-1, branch.channels, -1, -1)
        if branch.draws_bodies or person.pose_image is None:
            shown = person.drawings[branch.name]
        else:
            shown = person.pose_image if branch.channels == 3 else person.pose_image.amax(dim=0, keepdim=True)
        return shown[None].to(self.dtype)

    def _controlnet(
        self,
        branch: Branch,
        latents: Tensor,
        timestep: Tensor,
        tokens: Tensor,
        condition: Tensor,
        pooled: Tensor | None,
    ) -> list[Tensor]:
        """latents: what the branch sees. pooled (1, P): the row's pooled text, None without added conditions."""
        added = None
        if pooled is not None:
            shown = torch.zeros_like(pooled) if branch.pooled == "zeros" else pooled
            added = {"text_embeds": shown, "time_ids": self._time_ids}
        down, mid = self.controlnets[branch.name](
            latents,
            timestep,
            encoder_hidden_states=tokens,
            controlnet_cond=condition,
            added_cond_kwargs=added,
            return_dict=False,
        )
        return [*down, mid]

    # Eq. (8), in every step

    @torch.no_grad()
    def generate(
        self,
        prompt: str,
        persons: Sequence[ReferencePerson],
        latents: Tensor,
        *,
        negative_prompt: str | None = None,
        num_inference_steps: int,
        guidance_scale: float | None = None,
        id_guidance_scale: float | None = None,
        subject_conditioning_ratio: float | None = None,
        controls: Mapping[str, ReferenceControl] | None = None,
        local_scale: float | None = None,
        global_scale: float | None = None,
    ) -> Tensor:
        """z_0 (1, C, h, w) from z_T = latents, in this reference's dtype."""
        controls = dict(controls or {})
        for name, scale in (("local", local_scale), ("global", global_scale)):
            if scale is not None:
                controls[name] = ReferenceControl(scale=scale)
        config, f = self.config, self.checkpoint.vae_scale_factor
        lambda_t = config.guidance_scale if guidance_scale is None else guidance_scale
        lambda_i = config.id_guidance_scale if id_guidance_scale is None else id_guidance_scale
        lambda_i = lambda_t if lambda_i is None else lambda_i
        height, width = latents.shape[-2] * f, latents.shape[-1] * f
        latents = latents.to(self.dtype)

        negative, text = self.encode_prompt(negative_prompt), self.encode_prompt(prompt)
        null_id, ids = torch.zeros(0), [torch.zeros(0)] * len(persons)
        if self.has_identities:
            null_id, ids = self.null_id_tokens(), [self._tokens_of(person) for person in persons]
        no_id = null_id[:0] if config.delayed_id == "absent" else null_id
        boxes = [self.snap(person.box, height, width) for person in persons if person.box is not None]
        self._time_ids = torch.tensor([[height, width, 0, 0, height, width]], dtype=self.dtype)

        self.scheduler.set_timesteps(num_inference_steps)
        for i, timestep in enumerate(self.scheduler.timesteps):
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
                added = None if pooled is None else {"text_embeds": pooled, "time_ids": self._time_ids}
                share = i / num_inference_steps, (i + 1) / num_inference_steps
                injected = {}
                if found := self.residuals(
                    latents, timestep, persons, boxes, tokens, prompt_embeds, pooled, controls, share
                ):
                    injected = {
                        "down_block_additional_residuals": found[:-1], "mid_block_additional_residual": found[-1]
                    }  # fmt: skip
                predictions.append(
                    self.unet(
                        latents,
                        timestep,
                        encoder_hidden_states=self._read(config.unet_tokens, prompt_embeds, tokens),
                        added_cond_kwargs=added,
                        return_dict=False,
                        **injected,
                    )[0]
                )
            none, text_only, full = predictions
            prediction = none + lambda_t * (text_only - none) + step_lambda_i * (full - text_only)
            latents = self.scheduler.step(prediction, timestep, latents, eta=0.0, return_dict=False)[0]
        return latents

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """z_0 → the picture (1, 3, H, W), about [-1, 1]."""
        return self.vae.decode(from_latents(latents.to(self.dtype), self.vae.config), return_dict=False)[0]
