"""What the branches add to the UNet, in plain torch, straight from the equations: Eqs. (4) to (6) for any table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from realisid_trt.branches import Branch

from ..checkpoint import Checkpoint

# text_embeds (1, P), the row's pooled text, and time_ids (1, 6); None where the UNet has no added conditions
Added = Mapping[str, Tensor] | None


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


def tokens_read(kind: str, prompt_embeds: Tensor, id_tokens: Sequence[Tensor]) -> Tensor:
    """(1, ·, D): the tokens "text", or "text_and_id": behind the text those of every person, (T, D) or (0, D)."""
    if kind == "text":
        return prompt_embeds
    return torch.cat([prompt_embeds, *(tokens[None] for tokens in id_tokens)], dim=1)


def normed(checkpoint: Checkpoint, embedding: Tensor, dtype: torch.dtype) -> Tensor:
    """(1, 1, E), as long as the projections expect."""
    assert checkpoint.face_encoder is not None
    embedding = embedding.to(dtype)[None, None]
    return F.normalize(embedding, dim=-1) if checkpoint.face_encoder.norm == "unit" else embedding


@dataclass(frozen=True, eq=False)
class ReferenceBranches:
    """The branches of a checkpoint in one dtype. patch_projection: where a branch is shown patches."""

    checkpoint: Checkpoint
    controlnets: Mapping[str, nn.Module]
    patch_projection: nn.Module | None
    dtype: torch.dtype

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

    # Eqs. (4), (5), (6), for every branch of the table

    def residuals(
        self,
        latents: Tensor,
        timestep: Tensor,
        persons: Sequence[ReferencePerson],
        boxes: Sequence[tuple[int, int, int]],
        id_tokens: Sequence[Tensor],
        prompt_embeds: Tensor,
        added: Added,
        controls: Mapping[str, ReferenceControl],
        share: tuple[float, float],
    ) -> list[Tensor]:
        """The branches' sum for one row of the UNet: one tensor per skip, the mid block's last; empty if none acts.

        prompt_embeds, id_tokens, added: what the row reads. share: of the steps, where this one begins and ends:
        (i/S, (i + 1)/S).
        """
        total: list[Tensor] = []
        for branch in self.checkpoint.config.table:
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
                read = tokens_read(branch.tokens, prompt_embeds, id_tokens)
                found = self._controlnet(branch, latents, timestep, read, shown[None], added)
            elif persons:
                found = self._of_persons(branch, latents, timestep, persons, boxes, id_tokens, prompt_embeds, added)
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
        added: Added,
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
            for index, residual in enumerate(self._controlnet(branch, seen, timestep, read, shown, added)):
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
                elif self.checkpoint.config.relocate_mode == "area":
                    placed = F.interpolate(residual, size=(side_k, side_k), mode="area")
                else:
                    placed = F.interpolate(residual, size=(side_k, side_k), mode="bilinear", align_corners=False)
                if self.checkpoint.config.overlap == "priority":
                    total[index][within] = placed
                else:
                    total[index][within] += placed
                covered[index][within] += 1
        if branch.writes == "box" and self.checkpoint.config.overlap == "average":
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
        added: Added,
    ) -> list[Tensor]:
        """latents: what the branch sees. added: of the row; the branch may have zeros for its text."""
        if added is not None and branch.pooled == "zeros":
            added = {**added, "text_embeds": torch.zeros_like(added["text_embeds"])}
        down, mid = self.controlnets[branch.name](
            latents,
            timestep,
            encoder_hidden_states=tokens,
            controlnet_cond=condition,
            added_cond_kwargs=added,
            return_dict=False,
        )
        return [*down, mid]

    def painted(self, drawing: Tensor, persons: Sequence[ReferencePerson]) -> Tensor:
        """drawing (3, H, W) + the patches of the persons, each centred at its anchor and cut at the border."""
        total = drawing.to(self.dtype)
        for person in persons:
            assert self.patch_projection is not None and person.embedding is not None and person.anchor is not None
            patch = self.patch_projection(normed(self.checkpoint, person.embedding, self.dtype))[0]  # (3, p²)
            side = math.isqrt(patch.shape[1])
            left, top = (round(x - side / 2) for x in person.anchor)  # halves to even
            right, bottom = drawing.shape[2] - left - side, drawing.shape[1] - top - side
            total = total + F.pad(patch.reshape(3, side, side), (left, right, top, bottom))  # below zero it cuts
        return total
