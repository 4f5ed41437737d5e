"""The scaling between the VAE's latents and the UNet's, for the export, the reference, training and evaluation.

z = (x - mean)·scaling_factor / std, where a VAE has statistics; else z = (x - shift_factor)·scaling_factor.
Source: diffusers' pipelines of SDXL and of SD 3, which invert it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def to_latents(encoded: Tensor, config: Any) -> Tensor:
    """The output of the VAE's encoder, (N, C, h, w) → the UNet's latents z. config: the VAE's."""
    scale, offset = _scaling(config, encoded)
    return (encoded - offset) * scale


def from_latents(latents: Tensor, config: Any) -> Tensor:
    """The UNet's latents z, (N, C, h, w) → the input of the VAE's decoder."""
    scale, offset = _scaling(config, latents)
    return latents / scale + offset


def _scaling(config: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and offset, (1, C or 1, 1, 1) each."""
    mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    scale = torch.tensor(config.scaling_factor, dtype=torch.float64)
    offset = torch.tensor(getattr(config, "shift_factor", None) or 0.0, dtype=torch.float64)
    if mean is not None and std is not None:
        scale, offset = scale / torch.tensor(std, dtype=torch.float64), torch.tensor(mean, dtype=torch.float64)
    return (
        scale.to(like).reshape(1, -1, 1, 1),
        offset.to(like).reshape(1, -1, 1, 1),
    )
