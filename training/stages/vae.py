"""The VAE: pictures ↔ latents of unit variance."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from export.checkpoint import Checkpoint
from realisid_trt.errors import CheckpointError

from ..fresh import fresh
from ..store import Store
from .stage import Item, Stage

CROP_PX = 64
KL = 1e-4  # weight of the KL term, per element: bounds the latents' scale
EDGES = 0.5  # weight of the differences between neighbouring pixels
PICTURES_FOR_WHITENING = 2048


class VAEStage(Stage):
    """L1 of pixels and of their differences, and a little KL, on crops: the decoder is a convolution, so any size
    works.

    L = mean w·|x̂ − x| + 0.5·mean w·|∇x̂ − ∇x| + 1e-4·KL,   x̂ = D(z), z ~ N(μ, σ) = E(x)

    w is `face_weight` in face squares and 1 elsewhere, divided by its mean. A share `at_a_face` of the crops lies about
    a face.

    At the end the latents' mean and standard deviation per channel are folded into the 1 × 1 convolutions on either
    side of them, which is exact, and `scaling_factor` becomes 1.
    """

    name = "vae"
    learning_rate = 2e-3
    batch_size = 32
    writes = ("vae",)
    face_weight: ClassVar[float] = 1.0
    at_a_face: ClassVar[float] = 0.5

    def __init__(self, checkpoint: Checkpoint, store: Store, accelerator: Accelerator, *, new: bool, seed: int) -> None:
        super().__init__(checkpoint, store, accelerator, new=new, seed=seed)
        self.side = int(store["rgb"].shape[1])
        self.factor, self.channels = checkpoint.vae_scale_factor, checkpoint.latent_channels
        self.vae: Any = fresh(checkpoint, "vae", seed) if new else checkpoint.load_vae()
        if self.vae.quant_conv is None or self.vae.post_quant_conv is None:
            raise CheckpointError(
                f"{checkpoint.path}: the VAE has no quant_conv and post_quant_conv, into which its latents' scale is "
                "folded. Set use_quant_conv and use_post_quant_conv in vae/config.json."
            )
        self.vae.requires_grad_(True).train()

    def item(self, index: int, rng: np.random.Generator) -> Item:
        side, room = min(CROP_PX, self.side), self.side - min(CROP_PX, self.side)
        corner = rng.random(2) * (room + 1)
        if rng.random() < self.at_a_face:
            box = self.store["boxes"][index, rng.integers(self.store["num_persons"][index])]
            centre = (box[:2] + box[2:]) / 2 + (rng.random(2) - 0.5) * side / 2
            corner = centre - side / 2
        x, y = np.clip(corner, 0, room).astype(int)
        crop = np.ascontiguousarray(self.store["rgb"][index, y : y + side, x : x + side].transpose(2, 0, 1))
        cells = side // self.factor
        noise = rng.standard_normal((self.channels, cells, cells), np.float32)
        face = np.zeros((1, side, side), bool)
        for x0, y0, x1, y1 in self.store["boxes"][index][: int(self.store["num_persons"][index])] - (x, y, x, y):
            inside = np.s_[:, max(int(y0), 0) : max(int(y1), 0), max(int(x0), 0) : max(int(x1), 0)]
            face[inside] = True
        return {"pixels": torch.from_numpy(crop), "face": torch.from_numpy(face), "noise": torch.from_numpy(noise)}

    def forward(self, batch: Item) -> dict[str, Tensor]:
        pixels = batch["pixels"].float() / 127.5 - 1
        posterior = self.vae.encode(pixels).latent_dist
        mean, std, logvar = posterior.mean.float(), posterior.std.float(), posterior.logvar.float()
        decoded = self.vae.decode(mean + std * batch["noise"]).sample.float()
        error, face = decoded - pixels, batch["face"]
        weight = 1 + (self.face_weight - 1) * face
        across = (error.diff(dim=-1).abs() * weight[..., 1:]).mean()
        down = (error.diff(dim=-2).abs() * weight[..., 1:, :]).mean()
        kl = 0.5 * (mean**2 + std**2 - 1 - logvar).mean()
        loss = ((error.abs() * weight).mean() + EDGES / 2 * (across + down)) / weight.mean() + KL * kl
        psnr = -10 * torch.log10((error / 2).pow(2).mean((1, 2, 3))).mean()
        face_psnr = -10 * torch.log10(((error / 2).pow(2).mean(1, keepdim=True) * face).sum() / face.sum().clamp(min=1))
        return {"loss": loss, "psnr_db": psnr, "face_psnr_db": face_psnr.detach(), "kl": kl}

    @torch.no_grad()
    def finish(self) -> None:
        """Latents of mean 0 and standard deviation 1 per channel, through the 1 × 1 convolutions beside them."""
        order = np.random.Generator(np.random.Philox(key=[0, 0])).permutation(self.size)[:PICTURES_FOR_WHITENING]
        device = next(self.parameters()).device
        means = []
        for some in np.array_split(order, -(-len(order) // 32)):
            pixels = torch.from_numpy(self.store["rgb"][np.sort(some)]).permute(0, 3, 1, 2).to(device)
            means.append(self.vae.encode(pixels.float() / 127.5 - 1).latent_dist.mean)
        latents = torch.cat(means)
        whiten(self.vae, latents.mean((0, 2, 3)), latents.std((0, 2, 3)))


class VAEFacesStage(VAEStage):
    """The same with more weight on faces: eyes are few pixels, and an even L1 loses their details."""

    name = "vae-faces"
    whole_batch = False  # the weights' mean is over one process's part
    learning_rate = 1.5e-3
    face_weight = 6.0
    at_a_face = 0.7


def whiten(vae: Any, mean: Tensor, std: Tensor) -> None:
    """Folds z' = (z − mean) / std into an AutoencoderKL; decoded pictures stay the same.

    mean, std: (C,) of its latents.
    """
    before, after = vae.quant_conv, vae.post_quant_conv
    channels = len(mean)
    before.weight.data[:channels] /= std[:, None, None, None]
    before.bias.data[:channels] = (before.bias[:channels] - mean) / std
    before.bias.data[channels:] -= 2 * std.log()  # the logarithm of the variance
    after.bias.data += after.weight[:, :, 0, 0] @ mean
    after.weight.data *= std[None, :, None, None]
    vae.register_to_config(scaling_factor=1.0)
