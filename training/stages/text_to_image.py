"""The base: text → pictures. A UNet and its text encoders, from nothing; a user of SDXL has them already."""

from __future__ import annotations

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from export.checkpoint import Checkpoint

from ..diffusion import Diffusion, mean_square, plain_attention_on, seldom
from ..fresh import fresh
from ..latents import latents_of
from ..store import Store
from ..text import AbsentPrompt, encode_text, freeze_unread, time_ids, token_ids
from .stage import Item, Stage

TEXT_DROP = 0.1  # share of the captions replaced by the absent prompt, for guidance


class TextToImageStage(Stage):
    """Mean square of ε̂ − ε, or of v̂ − v, as the checkpoint's scheduler says, over latents of captioned pictures."""

    name = "text-to-image"
    learning_rate = 1.5e-3
    batch_size = 32
    writes = ("unet", "text_encoder", "text_encoder_2")
    reads = ("vae", "scheduler")

    def __init__(self, checkpoint: Checkpoint, store: Store, accelerator: Accelerator, *, new: bool, seed: int) -> None:
        super().__init__(checkpoint, store, accelerator, new=new, seed=seed)
        self.diffusion, self.absent = Diffusion(checkpoint), AbsentPrompt(checkpoint)
        self.latents = latents_of(checkpoint, store, accelerator)
        self.ids = token_ids(checkpoint, store.captions)
        self.unet = fresh(checkpoint, "unet", seed) if new else checkpoint.load_unet()
        self.encoder_names = checkpoint.text_encoder_names
        for name in self.encoder_names:
            encoder = fresh(checkpoint, name, seed) if new else checkpoint.load_text_encoder(name)
            self.add_module(name, encoder)
        plain_attention_on(accelerator.device, *self.children())
        self.requires_grad_(True).train()
        freeze_unread(self.get_submodule(self.encoder_names[0]), checkpoint.has_added_conditions)

    def item(self, index: int, rng: np.random.Generator) -> Item:
        latents = torch.from_numpy(self.latents[index].astype(np.float32))
        drawn = self.diffusion.draw(rng, tuple(latents.shape))
        return {"latents": latents, "ids": self.ids[index], "drop_text": seldom(rng, TEXT_DROP), **drawn}

    def forward(self, batch: Item) -> dict[str, Tensor]:
        noisy, target = self.diffusion.noisy(batch["latents"], batch["noise"], batch["timestep"])
        encoders = [self.get_submodule(name) for name in self.encoder_names]
        embeds = encode_text(encoders, batch["ids"], self.checkpoint.has_added_conditions)
        prompt_embeds, pooled = self.absent.where(batch["drop_text"], *embeds, encoders)
        added = None
        if pooled is not None:
            added = {"text_embeds": pooled, "time_ids": time_ids(self.checkpoint, len(pooled), pooled.device)}
        prediction = self.unet(
            noisy, batch["timestep"], prompt_embeds, added_cond_kwargs=added, return_dict=False
        )[0]  # fmt: skip
        return {"loss": mean_square(prediction, target).mean()}
