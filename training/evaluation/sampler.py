"""Pictures made in plain torch: by designs that no engine runs, and by the full model, to compare with an engine."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm

from export.checkpoint import Checkpoint
from export.checkpoint.vae import from_latents
from export.truth.half import narrow, quick_half
from realisid_trt.errors import CheckpointError
from realisid_trt.loop.noise import initial_noise, step_noise
from realisid_trt.loop.rows import guidance_weights, steps_without_id
from realisid_trt.loop.samplers import table_of
from realisid_trt.persons.boxes import Grid, snap_box
from realisid_trt.persons.conditions import id_pixels

from ..diffusion import plain_attention_on
from ..fresh import fresh
from ..residuals import DESIGNS, Branches, Residuals, merged
from ..text import AbsentPrompt, encode_text, time_ids, token_ids
from .cases import Case


class TorchSampler:
    """A design with its trained weights, over a checkpoint's base.

    Guidance, sampler, steps and α are the checkpoint's unless they are given. half: all networks but the VAE in
    float16, as in a half build; a CPU then rounds where a GPU does, in about twice the time.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        branches: Branches | None = None,
        id_projection: nn.Module | None = None,
        *,
        device: torch.device | None = None,
        batch: int = 16,
        steps: int | None = None,
        sampler: str | None = None,
        half: bool = False,
    ) -> None:
        c, config = checkpoint, checkpoint.config
        self.checkpoint, self.device, self.batch = checkpoint, device or torch.device("cpu"), batch
        self.branches = (branches or Branches(c, new=False, seed=0)).eval().requires_grad_(False).to(self.device)
        self.id_projection = (id_projection or c.load_id_projection()).eval().requires_grad_(False).to(self.device)
        self.unet: Any = c.load_unet().to(self.device)
        self.vae: Any = c.load_vae().to(self.device)
        self.image_encoder: Any = c.load_image_encoder().to(self.device)
        self.encoders = [c.load_text_encoder(name).to(self.device) for name in c.text_encoder_names]
        plain_attention_on(self.device, self.unet, *self.branches.children())
        self.half = half
        if half:
            for network in (
                self.unet,
                self.image_encoder,
                self.id_projection,
                *self.encoders,
                *self.branches.children(),
            ):
                narrow(network, torch.float16)
        self.steps = steps or config.num_inference_steps
        self.guidance = (config.guidance_scale, config.id_guidance_scale)
        self.ratio = config.subject_conditioning_ratio
        self.table = table_of(sampler or config.default_sampler, c.noise_schedule, self.steps)
        side = c.sample_size * c.vae_scale_factor
        self.grid = Grid(side, side, c.vae_scale_factor, c.levels, c.config.box_snap or c.vae_scale_factor)

    @classmethod
    def of_run(cls, checkpoint: Checkpoint, weights: Path, **options: Any) -> TorchSampler:
        """The design whose weights the training of a baseline wrote: weights/NAME.safetensors."""
        if not weights.is_file() or weights.stem not in DESIGNS:
            raise CheckpointError(f"{weights} is missing, or not a design: expected {', '.join(DESIGNS)}.safetensors.")
        branches = DESIGNS[weights.stem](checkpoint, new=True, seed=0)
        both = nn.ModuleDict({"branches": branches, "id_projection": fresh(checkpoint, "id_projection", 0)})
        try:
            both.load_state_dict({key: value.float() for key, value in load_file(weights).items()})
        except (RuntimeError, SafetensorError) as error:
            raise CheckpointError(f"{weights} is not of this checkpoint ({error}). Train it again.") from error
        return cls(checkpoint, branches, both["id_projection"], **options)

    @torch.no_grad()
    def make(self, cases: Sequence[Case], name: str) -> NDArray[np.uint8]:
        """(N, S, S, 3) uint8. Cases of different numbers of persons are made in separate batches."""
        made: dict[int, NDArray[np.uint8]] = {}
        quick = quick_half() if self.half and self.device.type == "cpu" else nullcontext()
        with tqdm(total=len(cases), desc=name) as bar, quick:
            for persons in sorted({len(case.identities) for case in cases}):
                numbers = [number for number, case in enumerate(cases) if len(case.identities) == persons]
                for first in range(0, len(numbers), self.batch):
                    some = numbers[first : first + self.batch]
                    pictures = self._pictures([cases[number] for number in some])
                    made.update(zip(some, pictures, strict=True))
                    bar.update(len(some))
        return np.stack([made[number] for number in range(len(cases))])

    def _pictures(self, cases: Sequence[Case]) -> NDArray[np.uint8]:
        c, rows = self.checkpoint, len(cases)
        ids = token_ids(c, [case.scene.caption for case in cases]).to(self.device)
        text, pooled = encode_text(self.encoders, ids, c.has_added_conditions)
        everywhere = torch.ones(rows, dtype=torch.bool, device=self.device)
        no_text, no_pooled = AbsentPrompt(c).where(everywhere, text, pooled, self.encoders)
        people = [self._person(cases, person) for person in range(len(cases[0].identities))]
        shape = (c.latent_channels, c.sample_size, c.sample_size)
        start = np.float32(self.table.init) * np.stack([initial_noise(case.seed, shape) for case in cases])
        latents = torch.from_numpy(start).to(self.device)
        histories = [torch.zeros_like(latents)] * self.table.histories
        delayed = steps_without_id(self.steps, self.ratio)
        zeros = c.config.table[0].pooled == "zeros"
        for row, timestep in enumerate(self.table.timesteps.tolist()):
            none, only_text, full = guidance_weights(*self.guidance, with_id=self.table.step_of[row] >= delayed)
            total = torch.zeros_like(latents)
            for weight, embeds, pool, with_id in (
                (none, no_text, no_pooled, False), (only_text, text, pooled, False), (full, text, pooled, True),
            ):  # fmt: skip
                if weight == 0:
                    continue
                added = branch_added = None
                if pool is not None:
                    added = {"text_embeds": pool, "time_ids": time_ids(c, rows, self.device)}
                    branch_added = {**added, "text_embeds": torch.zeros_like(pool) if zeros else pool}
                t = torch.full((rows,), timestep, device=self.device)
                *down, mid = self._residuals(latents, t, people, branch_added, with_id)
                total += weight * self.unet(
                    latents, t, embeds, added_cond_kwargs=added, return_dict=False,
                    down_block_additional_residuals=down, mid_block_additional_residual=mid,
                )[0]  # fmt: skip
            latents, *histories = self._next(row, cases, latents, total, histories)
        pixels = self.vae.decode(from_latents(latents, self.vae.config)).sample
        return np.asarray(((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy())

    def _next(
        self, row: int, cases: Sequence[Case], latents: Tensor, predicted: Tensor, histories: Sequence[Tensor]
    ) -> list[Tensor]:
        """The next latents and histories: a row of the sampler's table."""
        matrix, columns = self.table.matrix[row], {0: latents, 1: predicted, **dict(enumerate(histories, start=2))}
        if self.table.draws[row]:
            drawn = [step_noise(case.seed, self.table.row_of[row], tuple(latents.shape[1:])) for case in cases]
            columns[4] = torch.from_numpy(np.stack(drawn)).to(self.device)
        return [
            sum((float(line[column]) * values for column, values in columns.items()), torch.zeros_like(latents))
            for line in matrix[: 1 + len(histories)]
        ]

    def _residuals(
        self, latents: Tensor, t: Tensor, people: Sequence[dict[str, Tensor]], added: Any, with_id: bool
    ) -> Residuals:
        found = []
        for person in people:
            tokens = person["id_tokens"] if with_id else person["null_tokens"]
            found.append(self.branches(latents, t, tokens, added, person))
        return merged(found)

    def _person(self, cases: Sequence[Case], person: int) -> dict[str, Tensor]:
        """ID tokens and conditions of the person number `person` of every case."""
        c, items = self.checkpoint, []
        for case in cases:
            box = snap_box(case.picture.boxes[person].tolist(), self.grid)
            landmarks = case.picture.landmarks[person].astype(np.float32)
            pixels = torch.from_numpy(id_pixels(case.crops[person], c.image_mean, c.image_std))
            items.append({"pixels": pixels, **self.branches.conditions(box, landmarks, c)})
        batch = {name: torch.stack([item[name] for item in items]).to(self.device) for name in items[0]}
        pixels = batch.pop("pixels")
        null = torch.zeros_like(pixels) if c.config.null_id == "zero_image" else None
        batch["id_tokens"] = self._tokens(pixels)
        batch["null_tokens"] = (
            c.null_id_tokens().to(self.device).expand_as(batch["id_tokens"]) if null is None else self._tokens(null)
        )
        return batch

    def _tokens(self, pixels: Tensor) -> Tensor:
        found: Tensor = self.id_projection(self.image_encoder(pixels, output_hidden_states=True).hidden_states[-2])
        return found
