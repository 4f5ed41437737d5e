"""What encodes an ID in an engine: an image encoder with its projection, or the projections behind a face encoder."""

from __future__ import annotations

from torch import Tensor, nn


class IdEncoder(nn.Module):
    """id_pixels (R, 3, S, S), normalised → id_tokens (R, T, D): p_id, from the image encoder's penultimate layer."""

    def __init__(self, image_encoder: nn.Module, id_projection: nn.Module) -> None:
        super().__init__()
        self.image_encoder = image_encoder
        self.id_projection = id_projection

    def forward(self, id_pixels: Tensor) -> Tensor:
        out = self.image_encoder(id_pixels, output_hidden_states=True)
        return self.id_projection(out.hidden_states[-2])


class EmbeddingEncoder(nn.Module):
    """embedding (R, 1, E) → id_tokens (R, T, D) and, with a patch projection, id_patch (R, 3, p, p), row-major.

    A patch has no range: its projection ends in a LayerNorm, so it leaves [0, 1].
    """

    def __init__(self, id_projection: nn.Module, patch_projection: nn.Module | None, side: int | None) -> None:
        super().__init__()
        self.id_projection = id_projection
        self.patch_projection = patch_projection
        self.side = side

    def forward(self, embedding: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        id_tokens = self.id_projection(embedding)
        if self.patch_projection is None:
            return id_tokens
        return id_tokens, self.patch_projection(embedding).unflatten(-1, (self.side, self.side))
