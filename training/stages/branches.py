"""RealisID itself: the local branch, the global branch and the ID projection, on a frozen base. Eq. (7)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor, nn

from export.checkpoint import Checkpoint
from realisid_trt.errors import RequestError
from realisid_trt.persons.boxes import FaceBox, Grid, snap_box
from realisid_trt.persons.conditions import id_pixels

from ..diffusion import Diffusion, mean_square, plain_attention_on
from ..fresh import fresh
from ..latents import latents_of
from ..residuals import Boxed, Branches, FiveKeypoints, GlobalOnly, LocalOnly, Uncropped, inside, merged_rows
from ..store import OnDemandStore, Store
from ..text import AbsentPrompt, encode_text, time_ids, token_ids
from .stage import Item, Stage

DROP_ID, DROP_TEXT, DROP_BOTH = 0.05, 0.05, 0.05  # the paper's
FACE_WEIGHT = 1.0  # λ of Eq. (7)
EACH = "each."  # prefix of a batch's entries for every person: (B, P, …), zeros after the last


class BranchesStage(Stage):
    """L = mean (ε̂ − ε)² + λ·mean ((ε̂ − ε) ⊙ c_loc)², λ = 1; Eq. (7), with v in the place of ε under v-prediction.

    Both means are over all elements of the batch, so a face counts by its area; c_loc is the snapped box at latent
    size. The paper's pictures are of single persons. In a picture with several, all are conditioned on and merged as in
    inference, and c_loc covers all of their faces. The IDs are dropped in 5 % of the examples, the text in 5 %,
    both in 5 %; pose and location never.

    New branches begin as copies of the UNet's encoder with zero convolutions, as ControlNet does. Rate, batch and
    weight decay are the paper's. Differences from it: AdamW with β₂ = 0.99, gradients clipped at 1, a warm-up and a
    decay of the rate, averaged weights (loop.py); and under v-prediction the loss is of v.
    """

    name = "branches"
    learning_rate = 1e-5
    batch_size = 16
    reads = ("vae", "unet", "image_encoder", "text_encoder", "text_encoder_2", "scheduler")
    writes = ("controlnet_local", "controlnet_global", "id_projection")
    design = Branches

    def __init__(self, checkpoint: Checkpoint, store: Store, accelerator: Accelerator, *, new: bool, seed: int) -> None:
        super().__init__(checkpoint, store, accelerator, new=new, seed=seed)
        c, self.diffusion = checkpoint, Diffusion(checkpoint)
        side = c.sample_size * c.vae_scale_factor
        self.grid = Grid(side, side, c.vae_scale_factor, c.levels, c.config.box_snap or c.vae_scale_factor)
        _check(store, c, self.grid)
        self.latents = latents_of(c, store, accelerator)
        self.ids, self.absent = token_ids(c, store.captions), AbsentPrompt(c)
        self.branches = self.design(c, new=new, seed=seed)
        self.id_projection = fresh(c, "id_projection", seed) if new else c.load_id_projection()
        self.requires_grad_(True).train()
        self.null_id_tokens = None if c.config.null_id == "zero_image" else c.null_id_tokens()
        unet = c.load_unet()
        self.frozen = [unet, c.load_image_encoder(), *map(c.load_text_encoder, c.text_encoder_names)]
        plain_attention_on(accelerator.device, *self.frozen, *self.branches.children())

    def trained(self) -> dict[str, nn.Module]:
        if self.design is not Branches:  # not a RealisID checkpoint, but `training.evaluate` can run it
            return {self.design.name: nn.ModuleDict({"branches": self.branches, "id_projection": self.id_projection})}
        return {**dict(self.branches.named_children()), "id_projection": self.id_projection}

    def item(self, index: int, rng: np.random.Generator) -> Item:
        latents = torch.from_numpy(self.latents[index].astype(np.float32))
        count, most = int(self.store["num_persons"][index]), self.store["boxes"].shape[1]
        people = [self._person(index, person) for person in range(count)]
        drop = rng.random()
        return {
            "latents": latents,
            "ids": self.ids[index],
            "drop_id": torch.tensor(drop < DROP_ID + DROP_BOTH),
            "drop_text": torch.tensor(DROP_ID <= drop < DROP_ID + DROP_BOTH + DROP_TEXT),
            "num_persons": torch.tensor(count),
            **{EACH + name: _padded([one[name] for one in people], most) for name in people[0]},
            **self.diffusion.draw(rng, tuple(latents.shape)),
        }

    def _person(self, index: int, person: int) -> Item:
        """The inputs for one person of a picture; "face" (1, h, w): 1 in the box, at latent size."""
        c = self.checkpoint
        square = self.store["boxes"][index, person].tolist()
        box = snap_box(square, self.grid)
        crop = np.asarray(self.store["crops"][index, person])
        landmarks = of_snapped(self.store["landmarks"][index, person], square, box)
        return {
            "face": inside(box, 0),
            "id_pixels": torch.from_numpy(id_pixels(crop, c.image_mean, c.image_std)),
            **self.branches.conditions(box, landmarks, c),
        }

    def forward(self, batch: Item) -> dict[str, Tensor]:
        return self._losses(batch)[0]

    def validation_losses(self, batch: Item) -> dict[str, Tensor]:
        """The losses, and the squared error of ẑ_0 by place. NaN where there is no such cell.

        inside: cells of the faces' boxes that have no neighbour outside; edge: the other cells of the boxes; around: up
        to two cells from a box; elsewhere: the rest.
        """
        losses, error = self._losses(batch)
        face = batch[EACH + "face"].amax(1)
        edge = face * F.max_pool2d(1 - face, 3, 1, 1)
        around = F.max_pool2d(face, 5, 1, 2) - face
        places = {"inside": face - edge, "edge": edge, "around": around, "elsewhere": 1 - face - around}
        per_cell = error.mean(1, keepdim=True)
        return {**losses, **{f"x0_{name}": (per_cell * at).sum() / at.sum() for name, at in places.items()}}

    def _losses(self, batch: Item) -> tuple[dict[str, Tensor], Tensor]:
        """The losses, and the squared error of pred_original_sample, (B, C, h, w)."""
        noisy, target = self.diffusion.noisy(batch["latents"], batch["noise"], batch["timestep"])
        prediction = self._predict(noisy, batch)
        error, face = mean_square(prediction, target), batch[EACH + "face"].amax(1)
        whole, at_face = error.mean(), (error * face).mean()
        original = self.diffusion.original(prediction.detach().float(), noisy, batch["timestep"])
        error_x0 = mean_square(original, batch["latents"])
        face_x0 = (error_x0 * face).sum() / (face.sum() * error.shape[1])
        return {"loss": whole + FACE_WEIGHT * at_face, "whole": whole, "face_x0": face_x0}, error_x0

    def _predict(self, noisy: Tensor, batch: Item) -> Tensor:
        """ε̂ (or v̂) of a frozen UNet with the branches' residuals."""
        c, (unet, _, *encoders) = self.checkpoint, self.frozen
        with torch.no_grad():
            embeds = encode_text(encoders, batch["ids"], c.has_added_conditions)
            prompt_embeds, pooled = self.absent.where(batch["drop_text"], *embeds, encoders)
        added = branch_added = None
        if pooled is not None:
            added = {"text_embeds": pooled, "time_ids": time_ids(c, len(pooled), pooled.device)}
            zeros = c.config.table[0].pooled == "zeros"
            branch_added = {**added, "text_embeds": torch.zeros_like(pooled) if zeros else pooled}
        # from here on a row is a person
        there = torch.arange(batch[EACH + "face"].shape[1], device=noisy.device) < batch["num_persons"][:, None]
        picture = there.nonzero()[:, 0]
        people = {name.removeprefix(EACH): value[there] for name, value in batch.items() if name.startswith(EACH)}
        tokens = self._id_tokens(people["id_pixels"], batch["drop_id"][picture])
        if branch_added is not None:
            branch_added = {name: value[picture] for name, value in branch_added.items()}
        found = self.branches(noisy[picture], batch["timestep"][picture], tokens, branch_added, people)
        *down, mid = merged_rows(found, picture, batch["num_persons"])
        predicted: Tensor = unet(
            noisy, batch["timestep"], prompt_embeds, added_cond_kwargs=added, return_dict=False,
            down_block_additional_residuals=down, mid_block_additional_residual=mid,
        )[0]  # fmt: skip
        return predicted

    def _id_tokens(self, pixels: Tensor, drop: Tensor) -> Tensor:
        """(R, T, D): the projection of the image encoder's features, the null ID's where the ID is dropped."""
        if self.null_id_tokens is None:
            pixels = pixels * ~drop[:, None, None, None]
        with torch.no_grad():
            features = self.frozen[1](pixels, output_hidden_states=True).hidden_states[-2]
        tokens: Tensor = self.id_projection(features)
        if self.null_id_tokens is None:
            return tokens
        return torch.where(drop[:, None, None], self.null_id_tokens.to(tokens), tokens)


def _padded(tensors: Sequence[Tensor], most: int) -> Tensor:
    """(most, …): these, then zeros."""
    return torch.stack([*tensors, *[torch.zeros_like(tensors[0])] * (most - len(tensors))])


def of_snapped(landmarks: NDArray[np.float32], square: Sequence[float], box: FaceBox) -> NDArray[np.float32]:
    """Landmarks in [0, 1] of a face's square → in [0, 1] of its snapped box, at the same places of the picture.

    Snapping rounds a square to the grid, and moves or shrinks one that leaves the picture.
    """
    x0, y0, x1, _ = square
    left, top, right, _ = box.px
    inside = (np.asarray(landmarks) * (x1 - x0) + (x0, y0) - (left, top)) / (right - left)
    return np.asarray(inside, np.float32)


def _check(store: Store, checkpoint: Checkpoint, grid: Grid) -> None:
    """Raises RequestError for examples that are not made for this checkpoint."""
    c, margin = checkpoint, store.description.get("margin")
    for what, has, wants in (
        ("pictures are", f"{store['rgb'].shape[1]} px", f"{grid.height} px"),
        ("ID crops are", f"{store['crops'].shape[2]} px", f"{c.image_size} px"),
        ("ID crops are of", f"{margin} face squares", f"{c.config.face_margin} face squares"),
    ):
        if has != wants:
            raise RequestError(
                f"{store.path}: the {what} {has}, the checkpoint's {wants}. Make them again: python -m "
                f"training.prepare … --size-px {grid.height} --crop-px {c.image_size} --margin {c.config.face_margin}."
            )
    persons = store["boxes"].shape[1]
    if persons > 1 and c.config.overlap != "sum":
        raise RequestError(
            f"{store.path}: pictures of up to {persons} persons, whose residuals a training sums where they meet, but "
            f"the checkpoint's overlap is {c.config.overlap!r}. Set sum in its realisid_config.json, or make examples "
            "of one person (--persons 1)."
        )
    if isinstance(store, OnDemandStore):  # the check would make all of it
        return
    boxes = np.asarray(store["boxes"])
    there = np.arange(boxes.shape[1])[None] < np.asarray(store["num_persons"])[:, None]
    sides = np.maximum(boxes[..., 2] - boxes[..., 0], boxes[..., 3] - boxes[..., 1])
    if (small := there & (sides < grid.multiple)).any():
        raise RequestError(
            f"{store.path}: {int(small.sum())} faces are smaller than {grid.multiple} px, one cell at the coarsest "
            "level of this checkpoint. Make the examples again with larger ones (--least-face, --face)."
        )


class LocalOnlyStage(BranchesStage):
    """Table 2, retrained without the global branch."""

    name, design = "branches-local-only", LocalOnly


class GlobalOnlyStage(BranchesStage):
    """Table 2, retrained without the local branch."""

    name, design = "branches-global-only", GlobalOnly


class UncroppedStage(BranchesStage):
    """Table 3, against the same two branches without crop and relocation."""

    name, design = "branches-uncropped", Uncropped


class BoxedStage(BranchesStage):
    """Between the two: as the uncropped twin, but its local branch writes inside the face box only."""

    name, design = "branches-boxed", Boxed


class FiveKeypointsStage(BranchesStage):
    """Table 3, against one branch as InstantID's, of the same size."""

    name, design = "branches-five-keypoints", FiveKeypoints
