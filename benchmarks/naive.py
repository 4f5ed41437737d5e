"""The checkpoint's table of branches as a good engineer would script it with diffusers: the honest baseline.

It has the usual optimisations of guidance: inference mode, the guidance rows batched into one UNet call and one call
per ControlNet, prompts and ID tokens computed once, scaled-dot-product attention, no third row before the ID is
switched on, no ControlNet outside its window. `share_null` adds one more: guidance rows for which a ControlNet reads
the same are evaluated once. Of a ControlNet that reads the ID, these are the none and the text row, which get the same
null ID, unless its `pooled` is "per_row"; of one that reads the text, the text and the full row.

Optimisations that need other modules than diffusers' own are left out: an unmodified `forward` computes the time and
condition embeddings again at every step, and runs the UNet's encoder half once per row. Guidance and DDIM are float32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from realisid_trt import Control
from realisid_trt.branches import Branch
from realisid_trt.errors import RequestError
from realisid_trt.loop.rows import in_window, steps_without_id
from realisid_trt.persons.boxes import FaceBox, Grid, snap_box
from realisid_trt.persons.conditions import location_mask
from realisid_trt.persons.person import Person
from realisid_trt.request import OMITTED, Omitted

from .baseline import Baseline, BaselineResult, Progress
from .torch_device import ClockedUsage


class NaivePipeline(Baseline):
    """The checkpoint's own modules, on one device."""

    TRIAL: ClassVar[dict[str, Any]] = {**Baseline.TRIAL, "subject_conditioning_ratio": None}

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
        controls: Mapping[str, Control] | None = None,
        delay: bool = True,
        share_null: bool = False,
        decode: bool = True,
        progress: Progress | None = None,
    ) -> BaselineResult:
        """One picture, from the latents (1, C, h, w).

        persons:    each with id_tokens (of an engine with identities), pose_image and box.
        controls:   as in a Request; images are (C, H, W) floats at the picture's size.
        delay:      False evaluates three rows at every step. Before the ID is switched on the third has weight zero, so
                    the picture is the same. Without persons there are two rows in either case.
        share_null: guidance rows share a ControlNet's row if it reads the same for them.

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
            rows = self._rows(texts, persons, controls or {}, size_px, share_null)
        noisy_latents = self._placed(latents, torch.float32).contiguous(memory_format=self._format)
        self.scheduler.set_timesteps(steps)
        # The networks read the timestep on their device; the scheduler looks its coefficients up on the CPU.
        placed_timesteps = self.scheduler.timesteps.to(self.device)
        with watch.measure("denoise"):
            stamps = [self.clock.stamp()]
            for i, (timestep, placed) in enumerate(zip(self.scheduler.timesteps, placed_timesteps, strict=True)):
                acting = [row for row in rows.branches if row.scale and in_window(i, steps, row.start, row.end)]
                with_id = i >= switch and any(row.branch.tokens == "id" for row in acting)
                num_rows = 3 if with_id or (persons and not delay) else 2
                predicted = self._predict(noisy_latents, placed, rows, acting, num_rows)
                none, text, *full = predicted.float().chunk(num_rows)
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
                image = self._decoded(noisy_latents)
        final, step_ms = noisy_latents.contiguous().cpu().numpy(), tuple(self.clock.elapsed_ms(stamps))
        nets = (f"controlnet_{name}" for name in self.controlnets)
        parts = ("crop", *nets, "merge", "unet", "guidance")  # of a step
        timings = watch.ms | {f"denoise.{name}": self.usage.ms[name] for name in parts if name in self.usage.ms}
        return BaselineResult(final, image, timings, step_ms, dict(self.usage.rows))

    def _rows(
        self,
        texts: Sequence[tuple[Tensor, Tensor | None]],
        persons: Sequence[Person],
        controls: Mapping[str, Control],
        size_px: tuple[int, int],
        share: bool,
    ) -> _Rows:
        """The inputs of the none, text and full row; fewer rows are a slice of them."""
        (negative, negative_pooled), (text, text_pooled) = texts
        rows = _Rows(torch.cat([negative, text, text]), {})
        if negative_pooled is not None and text_pooled is not None:
            time_ids = torch.tensor([[*size_px, 0, 0, *size_px]], dtype=torch.float32, device=self.device)
            pooled = torch.cat([negative_pooled, text_pooled, text_pooled])
            rows.added = {"text_embeds": pooled, "time_ids": time_ids.repeat(3, 1)}
        if persons:
            self._place(rows, persons, size_px)
        # What is written everywhere comes first: the boxes are added to it in place.
        for branch in sorted(self.config.table, key=lambda branch: branch.writes == "box"):
            control = controls.get(branch.name, Control())
            shown = self._shown(branch, control, persons, rows.boxes, size_px)
            if shown is not None:
                rows.branches.append(self._branch_rows(branch, control, shown, persons, rows, share))
        return rows

    def _place(self, rows: _Rows, persons: Sequence[Person], size_px: tuple[int, int]) -> None:
        """Adds the persons' boxes, and their shares of the cells where these overlap."""
        has_ids = self.config.id_input != "none"
        for branch in self.config.table:
            if (branch.per, branch.view, branch.condition) == ("person", "picture", "pose"):
                raise RequestError(
                    f"the naive pipeline draws nothing, and the branch {branch.name} is shown each person in the whole "
                    "picture. Measure this engine alone: --baseline none."
                )
        if any(
            person.pose_image is None or person.box is None or (has_ids and person.id_tokens is None)
            for person in persons
        ):
            raise RequestError(
                "the naive pipeline has no face front end: give Person(id_tokens=…, pose_image=…, box=…)."
            )
        c = self.checkpoint
        grid = Grid(*size_px, c.vae_scale_factor, c.levels, self.config.box_snap or c.vae_scale_factor)
        rows.boxes = [snap_box(person.box, grid) for person in persons]  # type: ignore[arg-type]
        rows.shares = [_shares(rows.boxes, level, self.config.overlap, self.device) for level in range(c.levels)]

    def _shown(
        self,
        branch: Branch,
        control: Control,
        persons: Sequence[Person],
        boxes: Sequence[FaceBox],
        size_px: tuple[int, int],
    ) -> Tensor | None:
        """(subjects, C, H, W): what a branch is shown, of the picture or of every person; None: nothing."""
        if branch.per == "picture":
            return None if control.image is None else self._placed([control.image], self.dtype)
        if not persons:
            return None
        if branch.condition == "location":
            masks = [location_mask(box.px, *size_px) for box in boxes]
            return self._placed(masks, self.dtype).expand(-1, branch.channels, -1, -1)
        drawings = self._placed([person.pose_image for person in persons], self.dtype)
        return drawings if branch.channels == 3 else drawings.amax(dim=1, keepdim=True)

    def _branch_rows(
        self, branch: Branch, control: Control, shown: Tensor, persons: Sequence[Person], rows: _Rows, share: bool
    ) -> _BranchRows:
        """The inputs of one branch for its distinct rows: of the none, text and full row, those that `row_of` names."""
        by_text, by_id = branch.tokens == "text" or branch.pooled == "per_row", branch.tokens == "id"
        reads = [(by_text and kind > 0, by_id and kind == 2) for kind in range(3)]
        distinct = list(dict.fromkeys(reads)) if share else reads
        row_of = [distinct.index(read) if share else kind for kind, read in enumerate(reads)]
        kinds = [row_of.index(row) for row in range(len(distinct))]  # a guidance row that reads each of them
        if by_id:
            given = self._placed([person.id_tokens for person in persons], self.dtype)
            null = self.null_id_tokens.expand(len(shown), -1, -1)
            tokens = torch.cat([given if kind == 2 else null for kind in kinds])
        else:
            tokens = rows.prompt_embeds[kinds].repeat_interleave(len(shown), 0)
        added = {name: values[kinds].repeat_interleave(len(shown), 0) for name, values in rows.added.items()}
        if added and branch.pooled == "zeros":
            added["text_embeds"] = torch.zeros_like(added["text_embeds"])
        scale, start, end = (
            getattr(branch, key) if getattr(control, key) is None else getattr(control, key)
            for key in ("scale", "start", "end")
        )
        condition = shown.repeat(len(distinct), 1, 1, 1).contiguous(memory_format=self._format)
        index = torch.tensor(row_of, device=self.device)
        return _BranchRows(branch, scale, start, end, len(shown), row_of, index, tokens, added, condition)

    def _predict(
        self, latents: Tensor, timestep: Tensor, rows: _Rows, acting: Sequence[_BranchRows], num_rows: int
    ) -> Tensor:
        """noise_pred (num_rows, C, h, w) of the first rows. acting: the branches of this step."""
        injected: dict[str, Any] = {}
        seen = latents.to(self.dtype, memory_format=self._format)
        faces = torch.empty(0)
        if any(each.branch.view == "face" for each in acting):
            canvas = (self.checkpoint.sample_size,) * 2
            with self.usage.measure("crop", len(rows.boxes)):
                cut = [latents[..., y0:y1, x0:x1] for x0, y0, x1, y1 in (box.cells(0) for box in rows.boxes)]
                sized = [F.interpolate(face, size=canvas, mode="bilinear", align_corners=False) for face in cut]
                faces = torch.cat(sized).to(self.dtype)
        found = [(each, self._controlnet(each, faces, seen, timestep, num_rows)) for each in acting]
        if found:
            with self.usage.measure("merge", num_rows):
                *down, mid = (
                    self._merge(index, [(each, residuals[index]) for each, residuals in found], rows, num_rows)
                    for index in range(len(self.checkpoint.residuals))
                )
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

    def _controlnet(
        self, of: _BranchRows, faces: Tensor, picture: Tensor, timestep: Tensor, num_rows: int
    ) -> list[Tensor]:
        """The residuals of one branch, of as many of its rows as the first guidance rows receive."""
        num = (max(of.row_of[:num_rows]) + 1) * of.subjects
        if of.branch.view == "face":
            seen = faces.repeat(num // of.subjects, 1, 1, 1)
        else:
            seen = picture.expand(num, -1, -1, -1)
        with self.usage.measure(f"controlnet_{of.branch.name}", num):
            down, mid = self.controlnets[of.branch.name](
                seen,
                timestep,
                encoder_hidden_states=of.tokens[:num],
                controlnet_cond=of.condition[:num],
                conditioning_scale=of.scale,
                added_cond_kwargs=_first(of.added, num),
                return_dict=False,
            )
        return [*down, mid]

    def _merge(self, index: int, found: Sequence[tuple[_BranchRows, Tensor]], rows: _Rows, num_rows: int) -> Tensor:
        """The injection into the guidance rows at one skip. Branches that share rows alike are summed before that."""
        alike: dict[tuple[int, ...], Tensor] = {}
        index_of: dict[tuple[int, ...], Tensor] = {}
        for of, residual in found:
            row_of = tuple(of.row_of[:num_rows])
            alike[row_of] = self._added(alike.get(row_of), index, of, residual, rows)
            index_of[row_of] = of.index[:num_rows]
        total: Tensor | None = None
        for row_of, merged in alike.items():
            spread = merged if row_of == tuple(range(num_rows)) else merged[index_of[row_of]]
            total = spread if total is None else total + spread
        assert total is not None
        return total

    def _added(self, merged: Tensor | None, index: int, of: _BranchRows, residual: Tensor, rows: _Rows) -> Tensor:
        """merged + the branch's residual at one skip, over the persons: mean_p i_g, or Σ_p R(i_l)."""
        level, subjects = self.checkpoint.residuals[index][1], of.subjects
        if of.branch.writes == "everywhere":
            if subjects > 1:
                each = residual.reshape(-1, subjects, *residual.shape[1:])
                residual = each.mean(1) if of.branch.merge == "mean" else each.sum(1)
            return residual if merged is None else merged.add_(residual)
        if merged is None:
            merged = residual.new_zeros(len(residual) // subjects, residual.shape[1], *rows.boxes[0].grid.size(level))
        mode: dict[str, Any] = {"mode": self.config.relocate_mode}
        if mode["mode"] == "bilinear":
            mode["align_corners"] = False
        for p, box in enumerate(rows.boxes):
            x0, y0, x1, y1 = box.cells(level)
            mine, share = residual[p::subjects], rows.shares[level][p]
            small = mine[..., y0:y1, x0:x1]
            if of.branch.view == "face":
                small = F.interpolate(mine, size=(y1 - y0, x1 - x0), **mode)
            if share is not None:
                small = small * share.to(small.dtype)
            merged[..., y0:y1, x0:x1] += small / subjects if of.branch.merge == "mean" else small
        return merged


@dataclass(eq=False)
class _BranchRows:
    """The inputs of one branch, its subjects (persons, or the picture) one after the other in every row.

    row_of: the row of the branch that the none, text and full row receive; index: the same, on the device.
    """

    branch: Branch
    scale: float
    start: float
    end: float
    subjects: int
    row_of: list[int]
    index: Tensor
    tokens: Tensor
    added: dict[str, Tensor]
    condition: Tensor


@dataclass(eq=False)
class _Rows:
    """The inputs of three rows. shares: [level][person], see `_shares`. branches: those that are shown something."""

    prompt_embeds: Tensor
    added: dict[str, Tensor]
    boxes: Sequence[FaceBox] = ()
    shares: Sequence[Sequence[Tensor | None]] = ()
    branches: list[_BranchRows] = field(default_factory=list)


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
