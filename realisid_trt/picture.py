"""Latents → VAE → pictures."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .backends import Backend
from .errors import NumericsError


def decode(backend: Backend, latents: NDArray[np.float32]) -> NDArray[np.float32]:
    """(B, H, W, 3) float32 in [0, 1]. Raises NumericsError for NaN or infinity, naming the picture.

    One picture at a time: the VAE's activations are the largest of all networks.
    """
    pictures = []
    for index in range(len(latents)):
        image = backend.get(backend.run("vae_decoder", {"latents": backend.put(latents[index : index + 1])})["image"])[
            0
        ]
        check_finite(image, f"the VAE's output for picture {index}")
        pictures.append((image.astype(np.float32).transpose(1, 2, 0) / 2 + 0.5).clip(0, 1))
    return np.stack(pictures)


def to_pil(picture: NDArray[np.float32]) -> Image.Image:
    """A (H, W, 3) picture in [0, 1] as an 8-bit RGB image."""
    return Image.fromarray((picture * 255).round().astype(np.uint8))


def check_finite(array: NDArray[np.float32], what: str) -> None:
    """Raises NumericsError if there is a NaN or an infinity."""
    if not np.isfinite(array).all():
        bad = int((~np.isfinite(array)).sum())
        raise NumericsError(
            f"{what} holds {bad} NaN or infinite of {array.size} values. In half precision this is an overflow: build "
            "without --fp16, or with a VAE made for it. In float32 check the checkpoint's weights and the scales asked."
        )
