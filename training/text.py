"""Captions → prompt embeddings, with gradients where the encoders have them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from export.checkpoint import Checkpoint


def token_ids(checkpoint: Checkpoint, captions: Sequence[str]) -> Tensor:
    """(N, E, 77) int64: the captions for each of the E text encoders, cut at their maximal length."""
    rows = []
    for name in checkpoint.text_encoder_names:
        tokenizer = checkpoint.load_tokenizer(name)
        rows.append(
            tokenizer(
                list(captions), padding="max_length", max_length=checkpoint.max_length, truncation=True,
                return_tensors="pt",
            ).input_ids
        )  # fmt: skip
    return torch.stack(rows, dim=1)


def encode_text(encoders: Sequence[nn.Module], ids: Tensor, added: bool) -> tuple[Tensor, Tensor | None]:
    """prompt_embeds (B, 77, D) and pooled (B, P) of token ids (B, E, 77).

    added: as SDXL (the layer before the last of both encoders, pooled of the second), else as SD 1.5 (the last layer).
    """
    states, pooled = [], None
    for number, encoder in enumerate(encoders):
        out = encoder(ids[:, number], output_hidden_states=added)
        states.append(out.hidden_states[-2] if added else out[0])
        pooled = out[0] if added else None
    return torch.cat(states, dim=-1), pooled


class AbsentPrompt:
    """The runtime's substitute for an absent prompt: zeros, or the embedding of the empty text."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.added = checkpoint.has_added_conditions
        self.ids = None if checkpoint.config.force_zeros_for_empty_prompt else token_ids(checkpoint, [""])

    def where(
        self, drop: Tensor, prompt_embeds: Tensor, pooled: Tensor | None, encoders: Sequence[nn.Module]
    ) -> tuple[Tensor, Tensor | None]:
        """The embeddings, with the absent prompt's in the rows that `drop` (B,) bool marks."""
        if self.ids is None:
            empty = torch.zeros_like(prompt_embeds[:1]), None if pooled is None else torch.zeros_like(pooled[:1])
        else:
            empty = encode_text(encoders, self.ids.to(drop.device), self.added)
        embeds = torch.where(drop[:, None, None], empty[0], prompt_embeds)
        return embeds, None if pooled is None or empty[1] is None else torch.where(drop[:, None], empty[1], pooled)


def freeze_unread(encoder: Any, first_of_two: bool) -> None:
    """SDXL reads the layer before the last of its first encoder: the layers after it get no gradient."""
    if first_of_two:
        encoder.encoder.layers[-1].requires_grad_(False)
        encoder.final_layer_norm.requires_grad_(False)


def time_ids(checkpoint: Checkpoint, rows: int, device: torch.device) -> Tensor:
    """(rows, 6): height, width, 0, 0, height, width of the pictures."""
    side = checkpoint.sample_size * checkpoint.vae_scale_factor
    return torch.tensor([[side, side, 0, 0, side, side]], dtype=torch.float32, device=device).repeat(rows, 1)
