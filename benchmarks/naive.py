"""RealisID as a good engineer would script it with diffusers: the honest baseline.

It has the usual optimisations of three-way guidance: inference mode, the guidance rows batched into one UNet call and
one call per ControlNet, prompts and ID tokens computed once, scaled-dot-product attention, no third row before the ID
is switched on. `share_null` adds one more: unless `branch_pooled_text` is "per_row", the none and the text row give the
ControlNets the same null ID, which is then evaluated once for both.

Optimisations that need other modules than diffusers' own are left out: an unmodified `forward` computes the time and
condition embeddings again at every step, and runs the UNet's encoder half once per row.

On a GPU it computes as the engine does: networks in the engine's precision, the VAE, guidance and DDIM in float32, and
the loop does not wait for the GPU. Times are measured between events on torch's stream and read when the picture is
finished; `progress` is called one step late, as with the engine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from export.checkpoint import Checkpoint
from export.checkpoint.vae import from_latents
from realisid_trt.errors import RequestError
from realisid_trt.loop.rows import steps_without_id
from realisid_trt.persons.boxes import FaceBox, Grid, snap_box
from realisid_trt.persons.conditions import location_mask
from realisid_trt.persons.person import Person
from realisid_trt.request import OMITTED, Omitted

from .torch_device import Clock, ClockedUsage

Progress = Callable[[int, int], object]
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
LOOP_PARTS = ("crop", "controlnet_local", "controlnet_global", "merge", "unet", "guidance")  # the parts of a step


@dataclass(frozen=True, eq=False)
class NaiveResult:
    """latents (1, C, h, w) float32; image (H, W, 3) float32 in [0, 1], or None; the rest as in the engine's Result."""

    latents: NDArray[np.float32]
    image: NDArray[np.float32] | None
    timings: dict[str, float]
    step_ms: tuple[float, ...]
    rows: dict[str, int]


class NaivePipeline:
    """The checkpoint's own modules, on one device."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        memory_format: str = "contiguous",
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Loads the weights. memory_format: of the convolutions, "contiguous" or "channels_last".

        dtype: of the networks; the VAE is float32 in any case, since SDXL's overflows float16.
        """
        self.checkpoint, self.config = checkpoint, checkpoint.config
        self.device, self.dtype = torch.device(device), dtype
        self.unet: Any = checkpoint.load_unet(dtype).to(self.device)
        self.vae: Any = checkpoint.load_vae().to(self.device)
        self.controlnets: dict[str, Any] = {
            name: checkpoint.load_controlnet(name, dtype).to(self.device) for name in ("local", "global")
        }
        names = checkpoint.text_encoder_names
        self.text_encoders = {name: checkpoint.load_text_encoder(name, dtype).to(self.device) for name in names}
        self.tokenizers = {name: checkpoint.load_tokenizer(name) for name in names}
        self.null_id_tokens = checkpoint.null_id_tokens().to(self.device, dtype)
        self.scheduler = checkpoint.load_scheduler()
        self.clock = Clock(self.device)
        self.usage = ClockedUsage(self.clock)
        self.use_format(memory_format)

    def use_format(self, memory_format: str) -> None:
        """Lays the convolutions' weights out in this format, in place."""
        self.memory_format, self._format = memory_format, FORMATS[memory_format]
        for module in (self.unet, self.vae, *self.controlnets.values()):
            module.to(memory_format=self._format)

    def use_faster_format(self, persons: Sequence[Person], latents: NDArray[np.float32]) -> None:
        """Chooses the format in which a step of this picture with the ID is faster, by the better of two steps."""

        def step_ms(memory_format: str) -> float:
            self.use_format(memory_format)
            steps: dict[str, Any] = {"num_inference_steps": 2, "subject_conditioning_ratio": None, "decode": False}
            return min(self.generate("", persons, latents, **steps).step_ms)

        self.use_format(min(FORMATS, key=step_ms))

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
        id_guidance_scale: float | None = None,
        subject_conditioning_ratio: float | None | Omitted = OMITTED,
        delay: bool = True,
        share_null: bool = False,
        decode: bool = True,
        progress: Progress | None = None,
    ) -> NaiveResult:
        """One picture, from the latents (1, C, h, w). Both branches' scales are 1.

        persons:    each with id_tokens, pose_image and box.
        delay:      False evaluates three rows at every step. Before the ID is switched on the third has weight zero, so
                    the picture is the same. Without persons there are two rows in either case.
        share_null: the none and the text row share their rows of the ControlNets, if these do not get the text.

        Raises RequestError for a person that is given by a photo, BoxError for a box that does not fit.
        """
        config, self.usage, watch = self.config, ClockedUsage(self.clock), ClockedUsage(self.clock)
        steps = config.num_inference_steps if num_inference_steps is None else num_inference_steps
        alpha = subject_conditioning_ratio
        alpha = config.subject_conditioning_ratio if isinstance(alpha, Omitted) else alpha
        lambda_t = config.guidance_scale if guidance_scale is None else guidance_scale
        lambda_i = config.id_guidance_scale if id_guidance_scale is None else id_guidance_scale
        switch = steps_without_id(steps, alpha)
        with watch.measure("text"):
            texts = [self.encode_prompt(negative_prompt), self.encode_prompt(prompt)]
        with watch.measure("conditions"):
            f = self.checkpoint.vae_scale_factor
            size_px = latents.shape[-2] * f, latents.shape[-1] * f
            rows = self._rows(texts, persons, size_px, share_null and config.branch_pooled_text != "per_row")
        noisy_latents = self._placed(latents, torch.float32).contiguous(memory_format=self._format)
        self.scheduler.set_timesteps(steps)
        # The networks read the timestep on their device; the scheduler looks its coefficients up on the CPU.
        placed_timesteps = self.scheduler.timesteps.to(self.device)
        with watch.measure("denoise"):
            stamps = [self.clock.stamp()]
            for i, (timestep, placed) in enumerate(zip(self.scheduler.timesteps, placed_timesteps, strict=True)):
                with_id = bool(persons) and i >= switch
                num_rows = 3 if with_id or (persons and not delay) else 2
                none, text, *full = self._predict(noisy_latents, placed, rows, num_rows).float().chunk(num_rows)
                with self.usage.measure("guidance", 1):
                    prediction = none + lambda_t * (text - none)
                    if with_id:
                        prediction = prediction + lambda_i * (full[0] - text)
                    noisy_latents = self.scheduler.step(
                        prediction, timestep, noisy_latents, eta=0.0, return_dict=False
                    )[0]
                stamps.append(self.clock.stamp())
                if progress is not None:
                    self.clock.wait_for(stamps[-2])
                    progress(i + 1, steps)
        image = None
        if decode:
            with watch.measure("vae"), self.usage.measure("vae", 1):
                decoded = self.vae.decode(from_latents(noisy_latents, self.vae.config), return_dict=False)[0]
                image = (decoded[0].permute(1, 2, 0) / 2 + 0.5).clamp(0, 1).contiguous().cpu().numpy()
        final, step_ms = noisy_latents.contiguous().cpu().numpy(), tuple(self.clock.elapsed_ms(stamps))
        timings = watch.ms | {f"denoise.{name}": self.usage.ms[name] for name in LOOP_PARTS if name in self.usage.ms}
        return NaiveResult(final, image, timings, step_ms, dict(self.usage.rows))

    def encode_prompt(self, prompt: str | None) -> tuple[Tensor, Tensor | None]:
        """prompt_embeds (1, 77, D), pooled (1, P) or None. None is the absent negative prompt."""
        c = self.checkpoint
        if prompt is None and self.config.force_zeros_for_empty_prompt:
            options: dict[str, Any] = {"device": self.device, "dtype": self.dtype}
            pooled = torch.zeros(1, c.pooled_dim, **options) if c.has_added_conditions else None
            return torch.zeros(1, c.max_length, c.cross_attention_dim, **options), pooled
        hidden_states, pooled = [], None
        for name, encoder in self.text_encoders.items():
            tokens = self.tokenizers[name](
                prompt or "", padding="max_length", max_length=c.max_length, truncation=True, return_tensors="pt"
            )
            with self.usage.measure(name, 1):
                out = encoder(tokens.input_ids.to(self.device), output_hidden_states=c.has_added_conditions)
            hidden_states.append(out.hidden_states[-2] if c.has_added_conditions else out[0])
            pooled = out[0] if c.has_added_conditions else None
        return torch.cat(hidden_states, dim=-1), pooled

    def _rows(
        self,
        texts: Sequence[tuple[Tensor, Tensor | None]],
        persons: Sequence[Person],
        size_px: tuple[int, int],
        share_null: bool,
    ) -> _Rows:
        """The inputs of the none, text and full row; fewer rows are a slice of them."""
        (negative, negative_pooled), (text, text_pooled) = texts
        num_persons = len(persons)
        added: dict[str, Tensor] = {}
        branch_added: dict[str, Tensor] = {}
        if negative_pooled is not None and text_pooled is not None:
            pooled = torch.cat([negative_pooled, text_pooled, text_pooled])
            time_ids = torch.tensor([[*size_px, 0, 0, *size_px]], dtype=torch.float32, device=self.device)
            added = {"text_embeds": pooled, "time_ids": time_ids.repeat(3, 1)}
            seen = pooled if self.config.branch_pooled_text == "per_row" else torch.zeros_like(pooled)
            branch_added = {
                "text_embeds": seen.repeat_interleave(num_persons, 0),
                "time_ids": time_ids.repeat(3 * num_persons, 1),
            }
        branch_of = [0, 0, 1] if share_null else [0, 1, 2]
        index = torch.tensor(branch_of, device=self.device)
        rows = _Rows(torch.cat([negative, text, text]), added, branch_added, num_persons, branch_of, index)
        if not persons:
            return rows
        if any(person.id_tokens is None or person.pose_image is None or person.box is None for person in persons):
            raise RequestError(
                "the naive pipeline has no face front end: give Person(id_tokens=…, pose_image=…, box=…)."
            )
        c = self.checkpoint
        grid = Grid(*size_px, c.vae_scale_factor, c.levels, self.config.box_snap or c.vae_scale_factor)
        rows.boxes = [snap_box(person.box, grid) for person in persons]  # type: ignore[arg-type]
        rows.shares = [_shares(rows.boxes, level, self.config.overlap, self.device) for level in range(c.levels)]
        tokens = self._placed([person.id_tokens for person in persons], self.dtype)
        null = self.null_id_tokens.expand(num_persons, -1, -1)
        rows.id_tokens = torch.cat([*[null] * branch_of[2], tokens])
        poses = self._placed([person.pose_image for person in persons], self.dtype)
        masks = self._placed([location_mask(box.px, *size_px) for box in rows.boxes], self.dtype)
        rows.pose_images, rows.location_masks = (
            images.repeat(3, 1, 1, 1).contiguous(memory_format=self._format) for images in (poses, masks)
        )
        return rows

    def _placed(self, arrays: Any, dtype: torch.dtype) -> Tensor:
        """An array, or a list of them as one, on the device."""
        return torch.from_numpy(np.array(arrays, np.float32)).to(self.device, dtype)

    def _predict(self, latents: Tensor, timestep: Tensor, rows: _Rows, num_rows: int) -> Tensor:
        """noise_pred (num_rows, C, h, w) of the first rows."""
        injected: dict[str, Any] = {}
        seen = latents.to(self.dtype, memory_format=self._format)
        if rows.num_persons:
            canvas, branch_of = self.checkpoint.sample_size, rows.branch_of[:num_rows]
            num = (branch_of[-1] + 1) * rows.num_persons
            with self.usage.measure("crop", rows.num_persons):
                faces = [
                    F.interpolate(
                        latents[..., y0:y1, x0:x1], size=(canvas, canvas), mode="bilinear", align_corners=False
                    )
                    for x0, y0, x1, y1 in (box.cells(0) for box in rows.boxes)
                ]
                face_latents = torch.cat(faces).to(self.dtype).repeat(branch_of[-1] + 1, 1, 1, 1)
            local = self._controlnet("local", face_latents, timestep, rows, rows.pose_images[:num])
            picture = seen.expand(num, -1, -1, -1)
            global_residuals = self._controlnet("global", picture, timestep, rows, rows.location_masks[:num])
            with self.usage.measure("merge", num_rows):
                merged = [
                    self._merge(i, *pair, rows) for i, pair in enumerate(zip(local, global_residuals, strict=True))
                ]
                if branch_of != list(range(num_rows)):
                    merged = [residual[rows.branch_index[:num_rows]] for residual in merged]
                *down, mid = merged
            injected = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
        with self.usage.measure("unet", num_rows):
            noise_pred: Tensor = self.unet(
                seen.expand(num_rows, -1, -1, -1),
                timestep,
                encoder_hidden_states=rows.prompt_embeds[:num_rows],
                added_cond_kwargs=_first(rows.added, num_rows),
                return_dict=False,
                **injected,
            )[0]
        return noise_pred

    def _controlnet(self, name: str, latents: Tensor, timestep: Tensor, rows: _Rows, condition: Tensor) -> list[Tensor]:
        with self.usage.measure(f"controlnet_{name}", len(latents)):
            down, mid = self.controlnets[name](
                latents,
                timestep,
                encoder_hidden_states=rows.id_tokens[: len(latents)],
                controlnet_cond=condition,
                added_cond_kwargs=_first(rows.branch_added, len(latents)),
                return_dict=False,
            )
        return [*down, mid]

    def _merge(self, index: int, local: Tensor, global_residuals: Tensor, rows: _Rows) -> Tensor:
        """The injection into the rows at one skip: mean_p i_g + Σ_p R(i_l).

        local, global_residuals: (branch rows × persons, …).
        """
        level, persons = self.checkpoint.residuals[index][1], rows.num_persons
        merged = (
            global_residuals
            if persons == 1
            else global_residuals.reshape(-1, persons, *global_residuals.shape[1:]).mean(1)
        )
        mode: dict[str, Any] = {"mode": self.config.relocate_mode}
        if mode["mode"] == "bilinear":
            mode["align_corners"] = False
        for p, box in enumerate(rows.boxes):
            x0, y0, x1, y1 = box.cells(level)
            small = F.interpolate(local[p::persons], size=(y1 - y0, x1 - x0), **mode)
            share = rows.shares[level][p]
            merged[..., y0:y1, x0:x1] += small if share is None else small * share.to(small.dtype)
        return merged


@dataclass(eq=False)
class _Rows:
    """The inputs of three rows; those of persons are ordered row by row.

    branch_of: the row of the branches that each row receives; branch_index: the same, on the device.
    shares: [level][person], see `_shares`.
    """

    prompt_embeds: Tensor
    added: dict[str, Tensor]
    branch_added: dict[str, Tensor]
    num_persons: int
    branch_of: list[int]
    branch_index: Tensor
    boxes: Sequence[FaceBox] = ()
    shares: Sequence[Sequence[Tensor | None]] = ()
    id_tokens: Tensor = torch.empty(0)
    pose_images: Tensor = torch.empty(0)
    location_masks: Tensor = torch.empty(0)


def _shares(boxes: Sequence[FaceBox], level: int, overlap: str, device: torch.device) -> list[Tensor | None]:
    """The part of each person's residual that counts in each cell of its box; None: all of it, as in the paper."""
    if overlap == "sum" or len(boxes) == 1:
        return [None] * len(boxes)
    owners = torch.zeros(len(boxes), *boxes[0].grid.size(level), device=device)
    for p, (x0, y0, x1, y1) in enumerate(box.cells(level) for box in boxes):
        if overlap == "priority":
            owners[:p, y0:y1, x0:x1] = 0
        owners[p, y0:y1, x0:x1] = 1
    owners /= owners.sum(0).clamp(min=1)
    return [owners[p, y0:y1, x0:x1] for p, (x0, y0, x1, y1) in enumerate(box.cells(level) for box in boxes)]


def _first(added: dict[str, Tensor], rows: int) -> dict[str, Tensor] | None:
    return {name: values[:rows] for name, values in added.items()} or None
