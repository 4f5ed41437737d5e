"""Squares of a photo and the affine maps between photo and crop: the geometry that all of this folder shares."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray

Box = tuple[float, float, float, float]  # x0, y0, x1, y1
Points = NDArray[np.float64]  # (n, 2)
Affine = NDArray[np.float64]  # (2, 3): column vectors (x, y, 1) → (x', y')


def as_box(numbers: ArrayLike) -> Box:
    """(4,) → four floats."""
    x0, y0, x1, y1 = (float(number) for number in np.asarray(numbers))
    return x0, y0, x1, y1


def squared(boxes: ArrayLike) -> NDArray[np.float64]:
    """Boxes (…, 4) made square on their longer edge, about their centre."""
    boxes = np.asarray(boxes, np.float64)
    sides = boxes[..., 2:] - boxes[..., :2]
    longer = sides.max(axis=-1, keepdims=True)
    corner = boxes[..., :2] + sides * 0.5 - longer * 0.5
    return np.concatenate([corner, corner + longer], axis=-1)


def from_square(points: ArrayLike, box: ArrayLike) -> Points:
    """Points (n, 2) in units of a squared box → the units of the box."""
    x0, y0, x1, _ = squared(box)
    return np.asarray(np.asarray(points, np.float64) * (x1 - x0) + (x0, y0), np.float64)


def grown(square: Sequence[float], scale: float) -> Box:
    """The square with `scale` times its side, about its centre."""
    x0, y0, x1, y1 = square
    half = (x1 - x0) / 2 * scale
    return (x0 + x1) / 2 - half, (y0 + y1) / 2 - half, (x0 + x1) / 2 + half, (y0 + y1) / 2 + half


def crop_square(
    rgb: NDArray[np.uint8], square: Sequence[float], size: int, *, repeat_edge: bool = False
) -> tuple[NDArray[np.uint8], Affine]:
    """A square of a picture, resized, and the map to it.

    rgb:    (H, W, 3) uint8.
    square: x0, y0, x1, y1 in pixels of `rgb`; may leave it, where the crop is zero (or repeats its edge).

    Returns (size, size, 3) uint8 and the (2, 3) affine pixels of `rgb` → pixels of the crop.
    """
    scale = size / (square[2] - square[0])
    to_crop = np.array([[scale, 0, -square[0] * scale], [0, scale, -square[1] * scale]])
    warp = to_crop
    if scale < 0.5:  # warpAffine reads four pixels only, so the picture is averaged to twice the crop's scale first
        height, width = rgb.shape[:2]
        small = (max(1, round(width * 2 * scale)), max(1, round(height * 2 * scale)))
        rgb = np.asarray(cv2.resize(rgb, small, interpolation=cv2.INTER_AREA), np.uint8)
        back = np.array([width / small[0], height / small[1]])  # pixel centres: old = (new + ½)·back − ½
        warp = np.column_stack([to_crop[:, :2] * back, to_crop[:, 2] + to_crop[:, :2] @ (back / 2 - 0.5)])
    border = cv2.BORDER_REPLICATE if repeat_edge else cv2.BORDER_CONSTANT
    crop = cv2.warpAffine(rgb, warp, (size, size), flags=cv2.INTER_LINEAR, borderMode=border)
    return np.asarray(crop, np.uint8), to_crop


def apply(affine: Affine, points: NDArray[np.floating]) -> Points:
    """(n, 2) points through a (2, 3) affine."""
    return np.asarray(points @ affine[:, :2].T + affine[:, 2], np.float64)


def inverse(affine: Affine) -> Affine:
    """The inverse map."""
    return np.asarray(cv2.invertAffineTransform(affine), np.float64)
