"""Eqs. (4) to (6) with gradients, for a batch of pictures whose boxes differ; and the method's baselines.

A resize of X is R_y·X·R_xᵀ with the runtime's own matrices (`realisid_trt.kernels.resample`), which are zero outside
the box. Boxes are therefore data, and a batch takes two matrix products per tensor.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from export.checkpoint import Checkpoint
from export.checkpoint.classes import module_class, quiet
from realisid_trt.branches import realisid_branches
from realisid_trt.errors import RequestError
from realisid_trt.kernels.resample import resize_matrix
from realisid_trt.persons.boxes import FaceBox
from realisid_trt.persons.conditions import location_mask, pose_image

from .fresh import fresh

Batch = dict[str, Tensor]
Residuals = list[Tensor]


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


def inside(box: FaceBox, level: int) -> Tensor:
    """(1, H_k, W_k): 1 in the box's cells at that level, zero elsewhere."""
    mask = torch.zeros(1, *box.grid.size(level))
    x0, y0, x1, y1 = box.cells(level)
    mask[:, y0:y1, x0:x1] = 1
    return mask


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


class Branches(nn.Module):
    """RealisID: the local branch sees the face and its drawing, the global one the picture and the mask.

    Its children are the ControlNets, named as their folders in a checkpoint.
    """

    name: ClassVar[str] = "realisid"
    parts: ClassVar[Mapping[str, str]] = {"local": "pose_image", "global": "location_mask"}
    local: ClassVar[Mapping[str, str]] = {}  # keys of the local branch's row that differ from RealisID's

    def __init__(self, checkpoint: Checkpoint, *, new: bool, seed: int) -> None:
        """new: copies of the UNet's encoder with zero convolutions and a new condition embedding, as ControlNet does.

        Else the checkpoint's own.
        """
        super().__init__()
        self.levels = tuple(level for _, level in checkpoint.residuals)
        unet = checkpoint.load_unet() if new else None
        for part in self.parts:
            branch = checkpoint.load_controlnet(part) if unet is None else self._new(checkpoint, part, unet, seed)
            self.add_module(f"controlnet_{part}", branch)

    @classmethod
    def rows(cls, pooled: str) -> list[dict[str, Any]]:
        """The design as rows of a checkpoint's `branches`: what an engine runs. pooled: of its branches."""
        changed = {"local": cls.local}
        return [
            {**row, **changed.get(row["name"], {})} for row in realisid_branches(pooled) if row["name"] in cls.parts
        ]

    def conditions(self, box: FaceBox, landmarks: NDArray[np.float32], checkpoint: Checkpoint) -> Batch:
        """The branches' inputs for one face. landmarks: (478, 2) in [0, 1] of the snapped box's square."""
        side = checkpoint.sample_size * checkpoint.vae_scale_factor
        return {
            "pose_image": torch.from_numpy(pose_image(landmarks, side, checkpoint.config.pose_style)),
            "location_mask": torch.from_numpy(location_mask(box.px, box.grid.height, box.grid.width)),
            **placement(box, checkpoint.sample_size, checkpoint.config.relocate_mode),
        }

    def forward(
        self, noisy: Tensor, timestep: Tensor, id_tokens: Tensor, added: dict[str, Tensor] | None, batch: Batch
    ) -> dict[str, Residuals]:
        """Part → residuals of one person per row, the mid block's last; the local ones relocated.

        noisy: (B, C, H, W) latents; id_tokens (B, T, D); batch: `conditions`, stacked.
        """
        return {
            part: self._part(part)(noisy, timestep, id_tokens, batch[condition], added, batch)
            for part, condition in self.parts.items()
        }

    def _part(self, part: str) -> Callable[..., Residuals]:
        return self._local if part == "local" else self._whole

    def _local(
        self, noisy: Tensor, timestep: Tensor, tokens: Tensor, condition: Tensor, added: Any, batch: Batch
    ) -> Residuals:
        found = self._run("local", crop(noisy, batch), timestep, tokens, condition, added)
        return [relocate(one, level, batch) for one, level in zip(found, self.levels, strict=True)]

    def _whole(
        self, noisy: Tensor, timestep: Tensor, tokens: Tensor, condition: Tensor, added: Any, batch: Batch
    ) -> Residuals:
        return self._run("global", noisy, timestep, tokens, condition, added)

    def _run(
        self, part: str, latents: Tensor, timestep: Tensor, tokens: Tensor, condition: Tensor, added: Any
    ) -> Residuals:
        down, mid = self.get_submodule(f"controlnet_{part}")(
            latents, timestep, tokens, controlnet_cond=condition, added_cond_kwargs=added, return_dict=False
        )
        return [*down, mid]

    def _new(self, checkpoint: Checkpoint, part: str, unet: nn.Module, seed: int) -> nn.Module:
        return _from_unet(fresh(checkpoint, f"controlnet_{part}", seed), unet)


class LocalOnly(Branches):
    """Table 2's "without the global branch", trained without it from the start."""

    name = "local-only"
    parts = {"local": "pose_image"}


class GlobalOnly(Branches):
    """Table 2's "without the local branch", trained without it from the start."""

    name = "global-only"
    parts = {"global": "location_mask"}


class Uncropped(Branches):
    """The twin: both branches see the whole latents, the drawing lies in the box. Nothing is cropped or relocated.

    The same parameters, seeds and examples as the full model, so the two differ only in the local branch's input and in
    the place of its output.
    """

    name = "uncropped"
    parts = {"local": "placed_pose", "global": "location_mask"}
    local = {"view": "picture", "writes": "everywhere"}

    def conditions(self, box: FaceBox, landmarks: NDArray[np.float32], checkpoint: Checkpoint) -> Batch:
        side = box.grid.width
        x0, y0, x1, _ = box.px
        placed = pose_image((landmarks * (x1 - x0) + (x0, y0)) / side, side, checkpoint.config.pose_style)
        return {
            "placed_pose": torch.from_numpy(placed),
            "location_mask": torch.from_numpy(location_mask(box.px, box.grid.height, box.grid.width)),
        }

    def _local(
        self, noisy: Tensor, timestep: Tensor, tokens: Tensor, condition: Tensor, added: Any, batch: Batch
    ) -> Residuals:
        return self._run("local", noisy, timestep, tokens, condition, added)


class Boxed(Uncropped):
    """The twin, writing where the full model's local branch writes: in the box alone, at every level.

    So it differs from the twin by the place of its output, and from the full model by its input: the whole latents.
    """

    name = "boxed"
    local = {"view": "picture", "writes": "box"}

    def conditions(self, box: FaceBox, landmarks: NDArray[np.float32], checkpoint: Checkpoint) -> Batch:
        masks = {f"inside_{level}": inside(box, level) for level in range(box.grid.levels)}
        return {**super().conditions(box, landmarks, checkpoint), **masks}

    def _local(
        self, noisy: Tensor, timestep: Tensor, tokens: Tensor, condition: Tensor, added: Any, batch: Batch
    ) -> Residuals:
        found = super()._local(noisy, timestep, tokens, condition, added, batch)
        return [one * batch[f"inside_{level}"] for one, level in zip(found, self.levels, strict=True)]


# Right eye, left eye, nose, mouth corners: MediaPipe's numbers and InstantID's colours.
KEYPOINTS = {468: (255, 0, 0), 473: (0, 255, 0), 1: (0, 0, 255), 61: (255, 255, 0), 291: (255, 0, 255)}


class FiveKeypoints(Branches):
    """InstantID's design: one branch, as large as both of ours, that sees the whole latents and five keypoints.

    Its transformers are deeper than the UNet's until it has as many parameters. Blocks that the UNet has are copied,
    and the others begin as identities.
    """

    name = "five-keypoints"
    parts = {"global": "keypoints"}

    def __init__(self, checkpoint: Checkpoint, *, new: bool, seed: int) -> None:
        if not new:
            raise RequestError("no checkpoint has this design's branch. Begin with new weights: --new.")
        super().__init__(checkpoint, new=new, seed=seed)

    def conditions(self, box: FaceBox, landmarks: NDArray[np.float32], checkpoint: Checkpoint) -> Batch:
        side = box.grid.width
        x0, y0, x1, _ = box.px
        points = landmarks * (x1 - x0) + (x0, y0)
        picture = np.zeros((side, side, 3), np.uint8)
        for index, color in KEYPOINTS.items():
            x, y = (int(value) for value in np.round(points[index] * 16))
            cv2.circle(picture, (x, y), round(16 * max(side / 100, 1)), color, -1, cv2.LINE_AA, 4)
        return {"keypoints": torch.from_numpy(picture.transpose(2, 0, 1).astype(np.float32) / 255)}

    def _new(self, checkpoint: Checkpoint, part: str, unet: nn.Module, seed: int) -> nn.Module:
        return _from_unet(self._sized(checkpoint, seed), unet)

    def _sized(self, checkpoint: Checkpoint, seed: int) -> nn.Module:
        """A ControlNet of three channels with about as many parameters as the checkpoint's two together."""
        config = dict(checkpoint.components["controlnet_local"].config)
        wanted = sum(sum(checkpoint.elements(f"controlnet_{part}").values()) for part in ("local", "global"))
        depth = config.get("transformer_layers_per_block", 1)
        depths = [depth] * len(config["block_out_channels"]) if isinstance(depth, int) else list(depth)
        kind, best = module_class("ControlNetModel"), depths
        for more in range(64):
            deeper = [layers + more for layers in depths]
            with quiet(), torch.device("meta"):
                size = sum(
                    p.numel() for p in kind.from_config(config | {"transformer_layers_per_block": deeper}).parameters()
                )
            if size > wanted:
                break
            best = deeper
        with quiet():
            torch.manual_seed(seed)
            made: nn.Module = kind.from_config(config | {"transformer_layers_per_block": best})
        return made


# The outputs of a transformer block: with these weights at zero the block is an identity.
_ADDS = re.compile(r"transformer_blocks\.\d+\.(attn[12]\.to_out\.0|ff\.net\.2)\.")


def _from_unet(branch: nn.Module, unet: nn.Module) -> nn.Module:
    initial = branch.state_dict()
    copied = {
        key: value for key, value in unet.state_dict().items() if key in initial and initial[key].shape == value.shape
    }
    added = {key: torch.zeros_like(value) for key, value in initial.items() if _ADDS.search(key) and key not in copied}
    branch.load_state_dict(initial | copied | added)
    return branch


def merged(per_person: list[dict[str, Residuals]]) -> Residuals:
    """Local residuals summed, global ones averaged over the persons of a picture, and both added."""
    total: Residuals | None = None
    for part in per_person[0]:
        weight = 1.0 if part == "local" else 1.0 / len(per_person)
        for residuals in per_person:
            scaled = [one * weight for one in residuals[part]]
            total = scaled if total is None else [a + b for a, b in zip(total, scaled, strict=True)]
    assert total is not None
    return total


def merged_rows(residuals: dict[str, Residuals], picture: Tensor, num_persons: Tensor) -> Residuals:
    """`merged`, for pictures with different numbers of persons.

    residuals: of one person per row; picture (R,): which picture each is in; num_persons (B,), of every picture.
    """
    total: Residuals | None = None
    for part, found in residuals.items():
        weight = torch.ones_like(picture, dtype=torch.float32) if part == "local" else 1 / num_persons[picture]
        scaled = [one * weight[:, None, None, None] for one in found]
        zeros = [one.new_zeros(len(num_persons), *one.shape[1:]) for one in scaled]
        summed = [zero.index_add(0, picture, one) for zero, one in zip(zeros, scaled, strict=True)]
        total = summed if total is None else [a + b for a, b in zip(total, summed, strict=True)]
    assert total is not None
    return total


DESIGNS: dict[str, type[Branches]] = {
    design.name: design for design in (Branches, LocalOnly, GlobalOnly, Uncropped, Boxed, FiveKeypoints)
}
