"""RealisID for one person over a Checkpoint, in plain torch; written from the equations for these tests."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from export.checkpoint import Checkpoint


def rms(tensor: torch.Tensor) -> float:
    return float(tensor.square().mean().sqrt())


class Sampler:
    """The three rows and both branches, for one person."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.unet = checkpoint.load_unet()
        self.branches = {which: checkpoint.load_controlnet(which) for which in ("local", "global")}
        self.encoder, self.projection = checkpoint.load_image_encoder(), checkpoint.load_id_projection()
        self.texts = {
            name: (checkpoint.load_tokenizer(name), checkpoint.load_text_encoder(name))
            for name in checkpoint.text_encoder_names
        }
        self.side = checkpoint.sample_size
        self.null = checkpoint.null_id_tokens()[None]

    def text(self, prompt: str | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states and pooled text, zeros for no prompt. Pooled text has no columns without added conditions."""
        states, pooled = [], torch.zeros(1, 0)
        for tokenizer, encoder in self.texts.values():
            ids = tokenizer(prompt or "", padding="max_length", truncation=True, return_tensors="pt").input_ids
            out = encoder(ids, output_hidden_states=True)
            states.append(out.hidden_states[-2])
            pooled = out.get("text_embeds", pooled)
        keep = 0.0 if prompt is None else 1.0
        return torch.cat(states, -1) * keep, pooled * keep

    def id_tokens(self, seed: int) -> torch.Tensor:
        size = self.checkpoint.image_size
        patches = torch.randn(1, 3, 5, 5, generator=torch.Generator().manual_seed(seed))
        features = self.encoder(F.interpolate(patches, size, mode="bicubic"), output_hidden_states=True)
        return self.projection(features.hidden_states[-2])

    def pose(self, seed: int) -> torch.Tensor:
        """Thin lines on black, like a drawing of landmarks."""
        stream = torch.Generator().manual_seed(seed)
        small = torch.rand(1, 3, self.side, self.side, generator=stream)
        return F.interpolate((small > 0.9).float(), scale_factor=self.checkpoint.vae_scale_factor)

    def added(self, pooled: torch.Tensor) -> dict[str, Any]:
        if not self.checkpoint.has_added_conditions:
            return {}
        pixels = float(self.side * self.checkpoint.vae_scale_factor)
        time_ids = torch.tensor([[pixels, pixels, 0, 0, pixels, pixels]]).expand(len(pooled), -1)
        return {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": time_ids}}

    def residuals(self, latents: torch.Tensor, t: int, tokens: torch.Tensor, pose: torch.Tensor, box: tuple[int, ...]):
        """(local, merged) residuals, a row for every row of `tokens`."""
        x, y, side = box
        f, rows = self.checkpoint.vae_scale_factor, len(tokens)
        crop = F.interpolate(latents[:, :, y : y + side, x : x + side], self.side, mode="bilinear")
        mask = torch.zeros(1, 1, self.side * f, self.side * f)
        mask[:, :, y * f : (y + side) * f, x * f : (x + side) * f] = 1
        out = []
        for which, seen, condition in (("local", crop, pose), ("global", latents, mask)):
            seen, condition = seen.expand(rows, -1, -1, -1), condition.expand(rows, -1, -1, -1)
            added = self.added(torch.zeros(rows, self.checkpoint.pooled_dim))
            skips, middle = self.branches[which](seen, t, tokens, condition, return_dict=False, **added)
            out.append([*skips, middle])
        merged = []
        for r, g in zip(*out, strict=True):
            k = self.side // r.shape[-1]
            s, u, v = max(1, side // k), x // k, y // k
            canvas = g.clone()
            canvas[:, :, v : v + s, u : u + s] += F.interpolate(r, (s, s), mode="bilinear")
            merged.append(canvas)
        return out[0], merged

    def predict(self, latents: torch.Tensor, t: int, texts: list[Any], tokens: list[torch.Tensor], pose: Any, box: Any):
        """One row for every pair of a text and ID tokens."""
        _, merged = self.residuals(latents, t, torch.cat(tokens), pose, box)
        states, pooled = (torch.cat(parts) for parts in zip(*texts, strict=True))
        rows = latents.expand(len(states), -1, -1, -1)
        into = {"down_block_additional_residuals": merged[:-1], "mid_block_additional_residual": merged[-1]}
        return self.unet(rows, t, states, return_dict=False, **into, **self.added(pooled))[0]
