"""The judges' training, on true renders."""

from __future__ import annotations

from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from export.checkpoint import Checkpoint
from realisid_trt.persons.faces.squares import as_box, crop_square, grown

from ..judges.nets import FACE_MARGIN, FACE_PX, JUDGES, POINTS, STRIDE
from ..store import Store
from ..world import HATS, SHIRTS, describe
from .id_encoder import degraded, info_nce
from .stage import Item, Stage

JITTER = 0.06  # of place and size of a face square, over its side: boxes that are found are not exact


class JudgeStage(Stage):
    """One judge. It is not part of a checkpoint, so it is written beside it."""

    learning_rate = 1e-3
    batch_size = 64

    def __init__(self, checkpoint: Checkpoint, store: Store, accelerator: Accelerator, *, new: bool, seed: int) -> None:
        super().__init__(checkpoint, store, accelerator, new=new, seed=seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.judge = JUDGES[self.name]()

    def trained(self) -> dict[str, nn.Module]:
        return {self.name: self.judge}

    def _picture(self, index: int, rng: np.random.Generator) -> Tensor:
        """Picture number `index`, often a little blurred, as a VAE's output is."""
        rgb = np.ascontiguousarray(self.store["rgb"][index])
        if rng.random() < 0.5:
            import cv2

            rgb = cv2.GaussianBlur(rgb, (0, 0), 0.3 + 1.0 * rng.random())
        return torch.from_numpy(rgb.transpose(2, 0, 1).copy())


class RecogniserStage(JudgeStage):
    """InfoNCE over people and their siblings, and the identity factors, on crops of scenes with their background."""

    name = "recogniser"
    whole_batch = False

    def item(self, index: int, rng: np.random.Generator) -> Item:
        scenes = self.store["scenes"][index]  # (2, V, t, t, 3)
        views = rng.permutation(scenes.shape[1])[:2]
        crops = [[degraded(scenes[person, view], rng, 14) for view in views] for person in range(2)]
        return {
            "crops": torch.from_numpy(np.array(crops)),
            "factors": torch.from_numpy(np.array(self.store["factors"][index])),
        }

    def forward(self, batch: Item) -> dict[str, Tensor]:
        crops = batch["crops"]  # (B, 2, 2, t, t, 3)
        pixels = crops.flatten(0, 2).permute(0, 3, 1, 2).float().contiguous() / 255
        embeddings, factors = self.judge(pixels)
        error = (factors.float().unflatten(0, crops.shape[:3]) - batch["factors"][:, :, None]).pow(2).mean()
        contrast, top1 = info_nce(embeddings.float().unflatten(0, (-1, 2)), 0.07)
        return {"loss": contrast + 4 * error, "contrast": contrast, "top1": top1, "rmse": error.sqrt()}


class FacePointsStage(JudgeStage):
    """Mean absolute error of the landmarks, over the side of the face square."""

    name = "face-points"

    def item(self, index: int, rng: np.random.Generator) -> Item:
        person = int(rng.integers(self.store["num_persons"][index]))
        x0, y0, x1, y1 = (float(value) for value in self.store["boxes"][index, person])
        side = x1 - x0
        points = self.store["landmarks"][index, person][list(POINTS)] * side + (x0, y0)
        dx, dy, scale = JITTER * side * rng.standard_normal(3)
        box = as_box((x0 + dx - scale / 2, y0 + dy - scale / 2, x1 + dx + scale / 2, y1 + dy + scale / 2))
        rgb = self._picture(index, rng).permute(1, 2, 0).numpy()
        crop, _ = crop_square(rgb, grown(box, FACE_MARGIN), FACE_PX)
        inside = (points - (box[0], box[1])) / (box[2] - box[0])
        return {
            "crop": torch.from_numpy(np.ascontiguousarray(crop.transpose(2, 0, 1))),
            "points": torch.from_numpy(inside.astype(np.float32)),
        }

    def forward(self, batch: Item) -> dict[str, Tensor]:
        error = (self.judge(batch["crop"].float() / 255).float() - batch["points"]).abs()
        return {"loss": error.mean()}


class AttributesStage(JudgeStage):
    """Cross entropies of everything that a caption says."""

    name = "attributes"

    def __init__(self, checkpoint: Checkpoint, store: Store, accelerator: Accelerator, *, new: bool, seed: int) -> None:
        super().__init__(checkpoint, store, accelerator, new=new, seed=seed)
        self.labels = [caption_labels(caption) for caption in store.captions]

    def item(self, index: int, rng: np.random.Generator) -> Item:
        return {"pixels": self._picture(index, rng), **self.labels[index]}

    def forward(self, batch: Item) -> dict[str, Tensor]:
        logits, _ = self.judge(batch["pixels"].float() / 255)
        losses = {name: F.cross_entropy(logits[name].float(), batch[name]) for name in ("place", "persons")}
        for name in ("shirts", "hats"):
            losses[name] = F.binary_cross_entropy_with_logits(logits[name].float(), batch[name])
        return {"loss": cast(Tensor, sum(losses.values())), **losses}


class DetectorStage(JudgeStage):
    """A focal cross entropy of the centres, and 1 − IoU of the boxes that the cells about a centre predict."""

    name = "detector"
    whole_batch = False

    def item(self, index: int, rng: np.random.Generator) -> Item:
        boxes = np.array(self.store["boxes"][index])
        boxes[int(self.store["num_persons"][index]) :] = np.nan
        return {"pixels": self._picture(index, rng), "boxes": torch.from_numpy(boxes)}

    def forward(self, batch: Item) -> dict[str, Tensor]:
        told = self.judge(batch["pixels"].float() / 255).float()
        cells = told.shape[-1]
        line = torch.arange(cells, device=told.device) + 0.5
        x, y = line[None, None, None], line[None, None, :, None]  # of a cell's centre, (1, 1, 1 | h, w | 1)
        boxes = (batch["boxes"] / STRIDE).nan_to_num(-1e4)[..., None, None]  # (B, P, 4, 1, 1)
        x0, y0, x1, y1 = boxes.unbind(2)
        far = ((x - (x0 + x1) / 2) ** 2 + (y - (y0 + y1) / 2) ** 2).sqrt() / (x1 - x0).clamp(min=1)
        nearest, whose = far.min(1)  # (B, h, w)
        is_face = nearest < 0.2
        logit = told[:, 0]
        wrong = torch.where(is_face, 1 - logit.sigmoid(), logit.sigmoid())
        unsure = (nearest >= 0.2) & (nearest < 0.35)
        cross = F.binary_cross_entropy_with_logits(logit, is_face.float(), reduction="none")
        focal = (wrong**2 * cross * ~unsure).sum() / is_face.sum().clamp(min=1)
        edges = torch.stack([(side + 0 * (x + y)) for side in (x - x0, y - y0, x1 - x, y1 - y)], 2)  # (B, P, 4, h, w)
        true = edges.gather(1, whose[:, None, None].expand(-1, 1, 4, -1, -1))[:, 0]
        iou = _iou(told[:, 1:], true)
        iou_mean = (iou * is_face).sum() / is_face.sum().clamp(min=1)
        return {"loss": focal + 2 * (1 - iou_mean), "focal": focal, "iou": iou_mean}


def _iou(told: Tensor, true: Tensor) -> Tensor:
    """Of two boxes about the same cell, (B, 4, h, w) distances of left, top, right, bottom → (B, h, w)."""
    least = torch.minimum(told, true)
    both = (least[:, 0] + least[:, 2]).clamp(min=0) * (least[:, 1] + least[:, 3]).clamp(min=0)
    areas = [(one[:, 0] + one[:, 2]) * (one[:, 1] + one[:, 3]) for one in (told, true)]
    return both / (areas[0] + areas[1] - both).clamp(min=1e-6)


def caption_labels(caption: str) -> dict[str, Tensor]:
    """place and persons as class numbers, shirts (8,) and hats (4,) as 0 or 1 per colour."""
    said = describe(caption)
    labels = said.labels
    return {
        "place": torch.tensor(labels["place"]),
        "persons": torch.tensor(labels["persons"]),
        "shirts": torch.tensor([float(color in said.shirts) for color in SHIRTS]),
        "hats": torch.tensor([float(color in said.hats) for color in HATS]),
    }
