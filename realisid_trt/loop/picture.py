"""Latents → VAE → pictures."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..backends import Backend
from ..checks import check_finite


def decode(backend: Backend, latents: NDArray[np.float32]) -> Iterator[NDArray[np.float32]]:
    """Each picture (H, W, 3) float32 in [0, 1]. Raises NumericsError for NaN or infinity, naming the picture.

    One picture at a time: the VAE's activations are the largest of all networks.
    """
    for index in range(len(latents)):
        outputs = backend.run("vae_decoder", {"latents": backend.put(latents[index : index + 1])})
        image = backend.get(outputs["image"])[0]
        check_finite(image, f"the VAE's output for picture {index}")
        yield (image.transpose(1, 2, 0) / 2 + 0.5).clip(0, 1)


def to_pil(picture: NDArray[np.float32]) -> Image.Image:
    """A (H, W, 3) picture in [0, 1] as an 8-bit RGB image."""
    return Image.fromarray((picture * 255).round().astype(np.uint8))
