"""The reference with its networks in half precision and the VAE and all sums in float32, as a half build has it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..checkpoint import Checkpoint
from .half import narrow, quick_half
from .reference import Reference


@contextmanager
def half_reference(checkpoint: Checkpoint, dtype: torch.dtype) -> Iterator[Reference]:
    """The reference, its networks in `dtype`. The VAE, latents, residuals' sums, guidance and sampler stay float32."""
    reference = Reference(checkpoint, torch.float32)
    for module in (
        reference.unet,
        *reference.controlnets.values(),
        reference.image_encoder,
        reference.id_projection,
        reference.patch_projection,
        *reference.text_encoders,
    ):
        if module is not None:
            narrow(module, dtype)
    with quick_half():
        yield reference
