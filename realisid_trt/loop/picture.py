"""Latents → VAE → pictures."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..backends import Backend
from ..checks import check_finite

OVERLAP = 4  # neighbouring tiles share at least this part of a tile: a quarter, as in diffusers' tiled_decode


def decode(backend: Backend, latents: NDArray[np.float32], tile: int | None = None) -> Iterator[NDArray[np.float32]]:
    """Each picture (H, W, 3) float32 in [0, 1]. Raises NumericsError for NaN or infinity, naming the picture.

    tile: a picture of more latent cells than this on a side is decoded in square tiles of this side; None: never.

    One picture at a time: the VAE's activations are the largest of all networks.
    """
    for index in range(len(latents)):
        one = latents[index : index + 1]
        whole = tile is None or max(one.shape[2:]) <= tile
        image = _decode(backend, one) if whole else _decode_tiles(backend, one, tile or 0)
        check_finite(image, f"the VAE's output for picture {index}")
        yield (image.transpose(1, 2, 0) / 2 + 0.5).clip(0, 1)


def _decode(backend: Backend, latents: NDArray[np.float32]) -> NDArray[np.float32]:
    """(3, H, W): the VAE's output for (1, C, h, w)."""
    image: NDArray[np.float32] = backend.get(backend.run("vae_decoder", {"latents": backend.put(latents)})["image"])[0]
    return image


def _decode_tiles(backend: Backend, latents: NDArray[np.float32], tile: int) -> NDArray[np.float32]:
    """(3, H, W) out of tiles that fade into each other: image = Σ w·tile / Σ w.

    Not equal to the picture in one piece: the VAE's group norms and its attention see a tile instead of the picture.
    So tiles are as large as the pictures that the model was trained on, and all have one size: a narrow rest at the
    border would have other means and variances, and another colour.
    """
    height, width = latents.shape[2:]
    sides = min(tile, height), min(tile, width)
    image = weights = np.zeros(0, np.float32)
    for y in tile_starts(height, sides[0]):
        for x in tile_starts(width, sides[1]):
            piece = _decode(backend, np.ascontiguousarray(latents[:, :, y : y + sides[0], x : x + sides[1]]))
            factor = piece.shape[1] // sides[0]
            if not image.size:
                image = np.zeros((len(piece), height * factor, width * factor), np.float32)
                weights = np.zeros(image.shape[1:], np.float32)
            weight = np.outer(_fade(height, sides[0], y, factor), _fade(width, sides[1], x, factor))
            place = slice(y * factor, (y + sides[0]) * factor), slice(x * factor, (x + sides[1]) * factor)
            image[:, *place] += piece * weight
            weights[place] += weight
    return image / weights


def tile_starts(size: int, tile: int) -> list[int]:
    """The first cell of each tile along a side: as few tiles as cover it, evenly spread."""
    if size <= tile:
        return [0]
    steps = -(-(size - tile) // (tile - tile // OVERLAP))
    return [round(step * (size - tile) / steps) for step in range(steps + 1)]


def _fade(size: int, tile: int, start: int, factor: int) -> NDArray[np.float32]:
    """(tile · factor,) float32: the weights of a tile's pixels along a side. They rise from 0 to 1 over what it shares
    with the tile before it, and fall over what it shares with the next."""
    starts = tile_starts(size, tile)
    place, pixels = starts.index(start), np.arange(tile * factor) + 0.5
    fade = np.ones(tile * factor)
    if place > 0:
        fade = np.minimum(fade, pixels / (factor * (starts[place - 1] + tile - start)))
    if place + 1 < len(starts):
        fade = np.minimum(fade, (tile * factor - pixels) / (factor * (start + tile - starts[place + 1])))
    return fade.astype(np.float32)


def to_pil(picture: NDArray[np.float32]) -> Image.Image:
    """A (H, W, 3) picture in [0, 1] as an 8-bit RGB image."""
    return Image.fromarray((picture * 255).round().astype(np.uint8))
