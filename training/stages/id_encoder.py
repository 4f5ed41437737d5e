"""The identity encoder: an image encoder whose tokens identify a person, independent of pose, light and hat."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor, nn

from export.checkpoint import Checkpoint
from realisid_trt.persons.conditions import id_pixels

from ..diffusion import plain_attention_on
from ..fresh import fresh
from ..store import Store
from .stage import Item, Stage

TEMPERATURE = 0.07
TELLING = 4.0  # weight of the factors' mean square error


class IDEncoderStage(Stage):
    """Contrast between people, siblings among them, and the world's identity factors read from the tokens.

    L = InfoNCE of the image embeddings (two views of a person belong together, everybody else in the batch does not)
        + 4·mean (W·mean_tokens h − factors)²,   h = hidden_states[-2], the tokens that the ID projection reads

    W is used in training only, and dropped at the end.
    """

    name = "id-encoder"
    learning_rate = 1e-3
    batch_size = 64
    writes = ("image_encoder",)
    whole_batch = False

    def __init__(self, checkpoint: Checkpoint, store: Store, accelerator: Accelerator, *, new: bool, seed: int) -> None:
        super().__init__(checkpoint, store, accelerator, new=new, seed=seed)
        self.image_encoder = fresh(checkpoint, "image_encoder", seed) if new else checkpoint.load_image_encoder()
        width = checkpoint.components["image_encoder"].config["hidden_size"]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.factors = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, store["factors"].shape[-1]))
        plain_attention_on(accelerator.device, self.image_encoder)
        self.requires_grad_(True).train()

    def trained(self) -> dict[str, nn.Module]:
        return {"image_encoder": self.image_encoder}

    def item(self, index: int, rng: np.random.Generator) -> Item:
        photos = self.store["photos"][index]  # (2, V, s, s, 3)
        views = rng.permutation(photos.shape[1])[:2]
        mean, std = self.checkpoint.image_mean, self.checkpoint.image_std
        pixels = [
            [id_pixels(degraded(photos[person, view], rng, 20), mean, std) for view in views] for person in range(2)
        ]
        return {
            "pixels": torch.from_numpy(np.array(pixels)),
            "factors": torch.from_numpy(np.array(self.store["factors"][index])),
        }

    def forward(self, batch: Item) -> dict[str, Tensor]:
        pixels = batch["pixels"]  # (B, 2 siblings, 2 views, 3, s, s)
        out = self.image_encoder(pixels.flatten(0, 2), output_hidden_states=True)
        told = self.factors(out.hidden_states[-2].float().mean(1)).unflatten(0, pixels.shape[:3])
        factors = (told - batch["factors"][:, :, None]).pow(2).mean()
        contrast, top1 = info_nce(out.image_embeds.float().unflatten(0, (-1, 2)), TEMPERATURE)
        return {"loss": contrast + TELLING * factors, "contrast": contrast, "top1": top1, "rmse": factors.sqrt()}


def info_nce(embeddings: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Cross entropy of finding each second view from its first, and the reverse; and the share that is found.

    embeddings: (N people, 2 views, D).
    """
    one, other = F.normalize(embeddings, dim=-1).unbind(1)
    likeness = one @ other.T / temperature
    right = torch.arange(len(likeness), device=likeness.device)
    loss = (F.cross_entropy(likeness, right) + F.cross_entropy(likeness.T, right)) / 2
    return loss, (likeness.argmax(1) == right).float().mean()


def degraded(crop: NDArray[np.uint8], rng: np.random.Generator, least_px: int) -> NDArray[np.uint8]:
    """The crop unchanged, or, half of the time, as if the face had been smaller: scaled down and up again.

    least_px: the smallest side that it is scaled down to.
    """
    import cv2

    side = crop.shape[0]
    if rng.random() < 0.5:
        return np.ascontiguousarray(crop)
    small = int(rng.integers(least_px, side))
    down = cv2.resize(np.ascontiguousarray(crop), (small, small), interpolation=cv2.INTER_AREA)
    return np.asarray(cv2.resize(down, (side, side), interpolation=cv2.INTER_LINEAR), np.uint8)
