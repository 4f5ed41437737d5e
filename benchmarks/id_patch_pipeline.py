"""ID-Patch as its authors' pipeline makes it, on the checkpoint's own modules: the baseline of its engines.

Two guidance rows in one batch for the UNet and the ControlNet of diffusers, unmodified, in every step: the text alone
while the ID is delayed, then the text and the ID tokens of all persons, the null ones in the none row. The ControlNet
embeds its condition again in every step. Prompts, ID tokens and ID patches are computed once. Guidance and DDIM, which
is Euler's method on the checkpoint's timesteps, are float32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from export.checkpoint import Checkpoint
from realisid_trt import Control
from realisid_trt.branches import Branch
from realisid_trt.config import RealisIDConfig
from realisid_trt.errors import RequestError
from realisid_trt.loop.rows import in_window, steps_without_id
from realisid_trt.persons.faces.face_encoder import in_norm
from realisid_trt.persons.patches import paint_patches
from realisid_trt.persons.person import Person
from realisid_trt.request import OMITTED, Omitted

from .baseline import Baseline, BaselineResult, Progress
from .torch_device import ClockedUsage


class IdPatchPipeline(Baseline):
    """The published pipeline's loop. Other ControlNets of the picture may stand beside ID-Patch's in the table."""

    TRIAL: ClassVar[dict[str, Any]] = {**Baseline.TRIAL, "subject_conditioning_ratio": None}

    def __init__(
        self,
        checkpoint: Checkpoint,
        memory_format: str = "contiguous",
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Raises RequestError for a table that has rows of single persons, or for guidance with a third row."""
        check_two_rows(checkpoint.config)
        super().__init__(checkpoint, memory_format, device, dtype)
        self.id_projection: Any = checkpoint.load_id_projection(dtype).to(self.device)
        self.patch_projection: Any = None
        if checkpoint.has_patches:
            self.patch_projection = checkpoint.load_patch_projection(dtype).to(self.device)
        self.null_id_tokens = checkpoint.null_id_tokens().to(self.device, dtype)
        self._projected: dict[bytes, tuple[Tensor, NDArray[np.float32] | None]] = {}

    @torch.inference_mode()
    def generate(
        self,
        prompt: str,
        persons: Sequence[Person],
        latents: NDArray[np.float32],
        *,
        negative_prompt: str | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        subject_conditioning_ratio: float | None | Omitted = OMITTED,
        controls: Mapping[str, Control] | None = None,
        decode: bool = True,
        progress: Progress | None = None,
    ) -> BaselineResult:
        """One picture, from the latents (1, C, h, w).

        persons:  each with embedding and at.
        controls: as in a Request; images are (C, H, W) floats at the picture's size. ID patches are painted on the
                  image of a branch that is shown them.

        Raises RequestError for a person without embedding or at.
        """
        config, self.usage, watch = self.config, ClockedUsage(self.clock), ClockedUsage(self.clock)
        steps = config.num_inference_steps if num_inference_steps is None else num_inference_steps
        alpha = subject_conditioning_ratio
        alpha = config.subject_conditioning_ratio if isinstance(alpha, Omitted) else alpha
        scale = config.guidance_scale if guidance_scale is None else guidance_scale
        switch = steps_without_id(steps, alpha, config.delay_rule) if persons else steps
        with watch.measure("text"):
            texts = [self.encode_prompt(negative_prompt), self.encode_prompt(prompt)]
        with watch.measure("conditions"):
            f = self.checkpoint.vae_scale_factor
            size_px = latents.shape[-2] * f, latents.shape[-1] * f
            rows = self._rows(texts, persons, size_px)
            nets = [self._net(branch, (controls or {}).get(branch.name, Control()), persons) for branch in config.table]
        noisy_latents = self._placed(latents, torch.float32).contiguous(memory_format=self._format)
        self.scheduler.set_timesteps(steps)
        # The networks read the timestep on their device; the scheduler looks its coefficients up on the CPU.
        placed_timesteps = self.scheduler.timesteps.to(self.device)
        with watch.measure("denoise"):
            stamps = [self.clock.stamp()]
            for i, (timestep, placed) in enumerate(zip(self.scheduler.timesteps, placed_timesteps, strict=True)):
                acting = [net for net in nets if net and net.scale and in_window(i, steps, net.start, net.end)]
                tokens = rows.delayed_tokens if i < switch else rows.tokens
                predicted = self._predict(noisy_latents, placed, rows, tokens, acting)
                none, full = predicted.float().chunk(2)
                with self.usage.measure("guidance", 1):
                    noisy_latents = self.scheduler.step(
                        none + scale * (full - none), timestep, noisy_latents, eta=0.0, return_dict=False
                    )[0]
                stamps.append(self.clock.stamp())
                if progress is not None:
                    self.clock.wait_for(stamps[-2])
                    progress(i + 1, steps)
        image = None
        if decode:
            with watch.measure("vae"), self.usage.measure("vae", 1):
                image = self._decoded(noisy_latents)
        final, step_ms = noisy_latents.contiguous().cpu().numpy(), tuple(self.clock.elapsed_ms(stamps))
        parts = (*(f"controlnet_{name}" for name in self.controlnets), "merge", "unet", "guidance")
        timings = watch.ms | {f"denoise.{name}": self.usage.ms[name] for name in parts if name in self.usage.ms}
        return BaselineResult(final, image, timings, step_ms, dict(self.usage.rows))

    def _rows(
        self, texts: Sequence[tuple[Tensor, Tensor | None]], persons: Sequence[Person], size_px: tuple[int, int]
    ) -> _Rows:
        """What both rows read."""
        (negative, negative_pooled), (text, pooled) = texts
        prompt_embeds, added = torch.cat([negative, text]), dict[str, Tensor]()
        if negative_pooled is not None and pooled is not None:
            time_ids = torch.tensor([[*size_px, 0, 0, *size_px]] * 2, dtype=torch.float32, device=self.device)
            added = {"text_embeds": torch.cat([negative_pooled, pooled]), "time_ids": time_ids}
        if not persons:
            return _Rows(prompt_embeds, prompt_embeds, prompt_embeds, added)
        nobody = self.null_id_tokens.repeat(len(persons), 1)
        everybody = torch.cat([self._project(person)[0] for person in persons])
        dropped = torch.cat([prompt_embeds, nobody.expand(2, -1, -1)], dim=1)
        delayed = prompt_embeds if self.config.delayed_id == "absent" else dropped
        tokens = torch.cat([prompt_embeds, torch.stack([nobody, everybody])], dim=1)
        return _Rows(prompt_embeds, delayed, tokens, added)

    def _net(self, branch: Branch, control: Control, persons: Sequence[Person]) -> _Net | None:
        """One ControlNet of this picture, None without an image."""
        if control.image is None:
            return None
        image = np.asarray(control.image, np.float32)
        if branch.condition == "id_patches" and persons:
            patches = [patch for _, patch in map(self._project, persons) if patch is not None]
            anchors = [person.at for person in persons if person.at is not None]
            image = paint_patches(image, patches, anchors)
        scale, start, end = (
            getattr(branch, key) if getattr(control, key) is None else getattr(control, key)
            for key in ("scale", "start", "end")
        )
        condition = self._placed([image] * 2, self.dtype).contiguous(memory_format=self._format)
        return _Net(branch, condition, scale, start, end)

    def _project(self, person: Person) -> tuple[Tensor, NDArray[np.float32] | None]:
        """ID tokens (T, D) and ID patch (3, p, p) of a person, remembered."""
        if person.embedding is None or person.at is None:
            raise RequestError("ID-Patch's pipeline has no face front end: give Person(embedding=…, at=…).")
        assert self.checkpoint.face_encoder is not None
        embedding = in_norm(np.asarray(person.embedding, np.float32), self.checkpoint.face_encoder.norm)
        key = embedding.tobytes()
        if key not in self._projected:
            with self.usage.measure("id_encoder", 1):
                fed, patch = self._placed(embedding[None, None], self.dtype), None
                tokens = self.id_projection(fed)[0]
                if self.patch_projection is not None:
                    side = self.config.patch_px
                    patch = self.patch_projection(fed).reshape(3, side, side).float().cpu().numpy()
            self._projected[key] = tokens, patch
        return self._projected[key]

    def _predict(
        self, latents: Tensor, timestep: Tensor, rows: _Rows, tokens: Tensor, acting: Sequence[_Net]
    ) -> Tensor:
        """noise_pred (2, C, h, w). tokens: of the UNet. acting: the ControlNets of this step."""
        seen = latents.to(self.dtype, memory_format=self._format).expand(2, -1, -1, -1)
        found, injected = [], dict[str, Any]()
        for net in acting:
            name, added = net.branch.name, rows.added
            if added and net.branch.pooled == "zeros":
                added = {**added, "text_embeds": torch.zeros_like(added["text_embeds"])}
            with self.usage.measure(f"controlnet_{name}", 2):
                down, mid = self.controlnets[name](
                    seen,
                    timestep,
                    encoder_hidden_states=tokens if net.branch.tokens == "text_and_id" else rows.prompt_embeds,
                    controlnet_cond=net.condition,
                    conditioning_scale=net.scale,
                    added_cond_kwargs=added or None,
                    return_dict=False,
                )
            found.append([*down, mid])
        if found:
            *down, mid = found[0]
            if len(found) > 1:
                with self.usage.measure("merge", 2):
                    *down, mid = (sum(each[1:], each[0]) for each in zip(*found, strict=True))
            injected = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
        with self.usage.measure("unet", 2):
            noise_pred: Tensor = self.unet(
                seen,
                timestep,
                encoder_hidden_states=tokens,
                added_cond_kwargs=rows.added or None,
                return_dict=False,
                **injected,
            )[0]
        return noise_pred


def check_two_rows(config: RealisIDConfig) -> None:
    """Raises RequestError for an engine whose work this pipeline does not do."""
    alone = "Measure this engine alone: --baseline none."
    if others := [branch.name for branch in config.table if branch.per != "picture"]:
        raise RequestError(
            f"ID-Patch's pipeline has rows of the picture, and the branch {others[0]} has one for each person. {alone}"
        )
    if config.id_guidance_scale is not None:
        raise RequestError(
            f"ID-Patch's pipeline has two guidance rows, and id_guidance_scale {config.id_guidance_scale:g} asks for a "
            f"third. {alone}"
        )


@dataclass(frozen=True, eq=False)
class _Rows:
    """What the negative row and the row of the text read. tokens: (2, ·, D), of the UNet."""

    prompt_embeds: Tensor
    delayed_tokens: Tensor
    tokens: Tensor
    added: dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class _Net:
    """One ControlNet of this picture. condition: (2, C, H, W)."""

    branch: Branch
    condition: Tensor
    scale: float
    start: float
    end: float
