"""Eqs. (4) to (6) with gradients, for a batch of pictures whose boxes differ: crop, both branches, relocate, add.

A resize of X is R_y·X·R_xᵀ with the runtime's own matrices (`realisid_trt.kernels.resample`), rows of zeros outside the
box: so boxes are data, and a batch takes two matrix products per tensor.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from realisid_trt.boxes import FaceBox
from realisid_trt.kernels.resample import resize_matrix

Batch = dict[str, Tensor]


def placement(box: FaceBox, canvas: int, mode: str) -> Batch:
    """The matrices of one face.

    canvas: side of the local branch's latents; mode: `relocate_mode`.

    Returns crop_y (canvas, H), crop_x (canvas, W) of Eq. (5), and for every level k put_y_k (H_k, canvas_k), put_x_k of
    Eq. (4): face_latents = crop_y·z·crop_xᵀ, R(i) = put_y_k·i·put_x_kᵀ.
    """
    found = {}
    for axis, first in (("y", 1), ("x", 0)):
        for level in range(box.grid.levels):
            start, stop = box.cells(level)[first], box.cells(level)[first + 2]
            size, small = box.grid.size(level)[1 - first], canvas >> level
            if level == 0:
                crop = np.zeros((canvas, size), np.float32)
                crop[:, start:stop] = resize_matrix(stop - start, canvas, "bilinear")
                found[f"crop_{axis}"] = torch.from_numpy(crop)
            put = np.zeros((size, small), np.float32)
            put[start:stop] = resize_matrix(small, stop - start, mode)
            found[f"put_{axis}_{level}"] = torch.from_numpy(put)
    return found


def crop(latents: Tensor, batch: Batch) -> Tensor:
    """ẑ_t: (B, C, H, W) → (B, C, canvas, canvas), each row's box cut out and up-sampled."""
    return _resized(latents, batch["crop_y"], batch["crop_x"])


def relocate(residual: Tensor, level: int, batch: Batch) -> Tensor:
    """R(i): (B, C, canvas_k, canvas_k) → (B, C, H_k, W_k), down-sampled into each row's box, zero elsewhere."""
    return _resized(residual, batch[f"put_y_{level}"], batch[f"put_x_{level}"])


def _resized(maps: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """rows·X·columnsᵀ in the matrices' own precision: autocast would round the positions."""
    with torch.autocast(maps.device.type, enabled=False):
        return rows[:, None] @ maps.to(rows.dtype) @ columns[:, None].transpose(-1, -2)


@dataclass(frozen=True, eq=False)
class Branches:
    """The two ControlNets and how their residuals meet. One of them may be absent.

    levels: of every residual, the mid block's last.
    """

    local: nn.Module | None
    whole: nn.Module | None
    levels: tuple[int, ...]

    def residuals(
        self, noisy: Tensor, timestep: Tensor, id_tokens: Tensor, added: dict[str, Tensor] | None, batch: Batch
    ) -> list[Tensor]:
        """R(i_l) + i_g of one person per row: one tensor per skip, the mid block's last.

        noisy: (B, C, H, W) latents; id_tokens (B, T, D); batch: pose_image (B, 3, S, S), location_mask (B, 1, …), the
        matrices of `placement`.
        """
        parts: list[list[Tensor]] = []
        if self.local is not None:
            found = _run(self.local, crop(noisy, batch), timestep, id_tokens, batch["pose_image"], added)
            parts.append([relocate(one, level, batch) for one, level in zip(found, self.levels, strict=True)])
        if self.whole is not None:
            parts.append(_run(self.whole, noisy, timestep, id_tokens, batch["location_mask"], added))
        return [sum(pair[1:], pair[0]) for pair in zip(*parts, strict=True)]


def _run(
    branch: nn.Module,
    latents: Tensor,
    timestep: Tensor,
    id_tokens: Tensor,
    condition: Tensor,
    added: dict[str, Tensor] | None,
) -> list[Tensor]:
    down, mid = branch(
        latents, timestep, id_tokens, controlnet_cond=condition, added_cond_kwargs=added, return_dict=False
    )
    return [*down, mid]
