"""Drawings as whole bytes, for tests that compare them pixel by pixel."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]


def picture(drawing: NDArray[np.float32]) -> Pixels:
    """(3, H, W) in [0, 1] → (H, W, 3) uint8, exactly."""
    assert drawing.dtype == np.float32 and drawing.flags.c_contiguous and 0 <= drawing.min() <= drawing.max() <= 1
    pixels = np.round(drawing * 255).astype(np.uint8)
    assert np.array_equal(pixels.astype(np.float32) / np.float32(255), drawing)
    return np.ascontiguousarray(pixels.transpose(1, 2, 0))


def shows(pixels: Pixels, color: tuple[int, int, int]) -> NDArray[np.bool_]:
    return np.asarray((pixels == color).all(axis=2))


def sha256(drawing: NDArray[np.float32]) -> str:
    """The first half of the hash of a drawing's bytes."""
    return hashlib.sha256(picture(drawing).tobytes()).hexdigest()[:16]
