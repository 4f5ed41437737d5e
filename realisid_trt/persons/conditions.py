"""The networks' inputs for a person: crop → id_pixels, landmarks → pose_image, box → location_mask.

RealisID's drawing of landmarks is not published. A drawing is therefore a named preset of the checkpoint
(`pose_style`), and each preset is a row of data below.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import BoxError, RequestError, ShapeError
from .mesh import (
    INNER_LIPS,
    JAW,
    LEFT_BROW,
    LEFT_EYE,
    LEFT_IRIS,
    NOSE_BASE,
    NOSE_RIDGE,
    NUM_LANDMARKS,
    OUTER_LIPS,
    RIGHT_BROW,
    RIGHT_EYE,
    RIGHT_IRIS,
)

Color = tuple[int, int, int]  # RGB, 0..255


@dataclass(frozen=True)
class Line:
    """A path of landmarks in one colour."""

    path: tuple[int, ...]
    color: Color
    closed: bool = False


@dataclass(frozen=True)
class Disc:
    """A filled iris: centre and rim landmarks, seen only inside the eye opening, so a closed eye has none."""

    iris: tuple[int, ...]
    eye: tuple[int, ...]
    color: Color


@dataclass(frozen=True)
class PoseStyle:
    """A drawing: discs first, lines over them. `thickness` is in px per 512 px of the picture, at least 1 px."""

    lines: tuple[Line, ...]
    discs: tuple[Disc, ...]
    thickness: float


WHITE, ORANGE, YELLOW, RED, MAGENTA = (255, 255, 255), (255, 128, 0), (255, 255, 0), (255, 0, 0), (255, 0, 255)
BLUE, CYAN, MINT, GREEN = (0, 128, 255), (0, 200, 255), (0, 255, 128), (0, 255, 0)

POSE_STYLES = {
    # Hues differ per side, so a mirrored face is another picture, and per part, so thin lines keep their meaning.
    "realisid-v1": PoseStyle(
        lines=(
            Line(JAW, WHITE),
            *(Line(edge, BLUE) for edge in RIGHT_BROW),
            *(Line(edge, MINT) for edge in LEFT_BROW),
            Line(RIGHT_EYE, CYAN, closed=True),
            Line(LEFT_EYE, GREEN, closed=True),
            Line(NOSE_RIDGE, ORANGE),
            Line(NOSE_BASE, ORANGE),
            Line(OUTER_LIPS, RED, closed=True),
            Line(INNER_LIPS, MAGENTA, closed=True),
        ),
        discs=(Disc(RIGHT_IRIS, RIGHT_EYE, YELLOW), Disc(LEFT_IRIS, LEFT_EYE, YELLOW)),
        thickness=2.0,
    ),
}

SUBPIXEL_BITS = 4  # of OpenCV's drawing functions


def id_pixels(crop: NDArray[np.uint8], mean: Sequence[float], std: Sequence[float]) -> NDArray[np.float32]:
    """The face crop as the image encoder takes it: (crop/255 − mean) / std.

    crop:      (S, S, 3) uint8 RGB, background zeroed.
    mean, std: per channel, of the checkpoint's feature extractor.

    Returns (3, S, S) float32. Raises ShapeError.
    """
    if crop.ndim != 3 or crop.shape[0] != crop.shape[1] or crop.shape[2] != 3 or crop.dtype != np.uint8:
        raise ShapeError(f"the face crop is {crop.shape} {crop.dtype}, expected (S, S, 3) uint8 RGB.")
    scaled = crop.astype(np.float32) / np.float32(255)
    normalised = (scaled - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)
    return np.ascontiguousarray(normalised.transpose(2, 0, 1))


def pose_image(landmarks: ArrayLike, size_px: int, style: str = "realisid-v1") -> NDArray[np.float32]:
    """Pose and expression as a drawing on black: c_p&e of RealisID.

    landmarks: (478, 2) x, y in [0, 1] of the squared face box; points outside fall off the picture.
    size_px:   side S of the drawing.
    style:     name of a preset in POSE_STYLES.

    Returns (3, S, S) float32 in [0, 1]. Raises ShapeError for other landmarks, RequestError for an unknown style.
    """
    if style not in POSE_STYLES:
        raise RequestError(f"pose_style is {style!r}, expected one of {', '.join(POSE_STYLES)}.")
    points = np.asarray(landmarks, np.float64)
    if points.shape != (NUM_LANDMARKS, 2) or not np.isfinite(points).all():
        raise ShapeError(
            f"landmarks are {points.shape}, expected ({NUM_LANDMARKS}, 2) finite numbers: MediaPipe's mesh with irises."
        )
    preset = POSE_STYLES[style]
    thickness = max(1, round(preset.thickness * size_px / 512))
    points = np.clip(points, -8, 9) * size_px  # points farther away would overflow OpenCV's integers
    fixed = np.round(points * (1 << SUBPIXEL_BITS)).astype(np.int32)
    canvas = np.zeros((size_px, size_px, 3), np.uint8)
    for disc in preset.discs:
        _draw_disc(canvas, disc, points, fixed, thickness)
    for line in preset.lines:
        path = [fixed[list(line.path)]]
        cv2.polylines(canvas, path, line.closed, line.color, thickness, cv2.LINE_AA, SUBPIXEL_BITS)
    return np.ascontiguousarray(canvas.transpose(2, 0, 1), np.float32) / np.float32(255)


def location_mask(box_px: tuple[int, int, int, int], height: int, width: int) -> NDArray[np.float32]:
    """The mask of the person's place: c_loc of RealisID.

    box_px: x0, y0, x1, y1, whole px, half-open, inside the picture: the box after squaring and snapping.

    Returns (1, H, W) float32, 1 inside the box and 0 elsewhere. Raises BoxError.
    """
    x0, y0, x1, y1 = box_px
    if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
        raise BoxError(f"box {tuple(box_px)} does not lie in the picture of {width}×{height} px, or is empty.")
    mask = np.zeros((1, height, width), np.float32)
    mask[0, y0:y1, x0:x1] = 1
    return mask


def _draw_disc(
    canvas: NDArray[np.uint8], disc: Disc, points: NDArray[np.float64], fixed: NDArray[np.int32], thickness: int
) -> None:
    """Paints disc ∧ eye opening with soft edges, on the patch of canvas that the eye covers."""
    eye = points[list(disc.eye)]
    low = np.maximum(np.floor(eye.min(axis=0)).astype(int) - 1, 0)
    high = np.minimum(np.ceil(eye.max(axis=0)).astype(int) + 2, canvas.shape[0])
    width, height = high - low
    if width <= 0 or height <= 0:
        return
    origin = low << SUBPIXEL_BITS
    center, *rim = (points[index] for index in disc.iris)
    radius = max(float(np.linalg.norm(np.array(rim) - center, axis=1).mean()), thickness)
    opening, round_ = np.zeros((height, width), np.uint8), np.zeros((height, width), np.uint8)
    cv2.fillPoly(opening, [(fixed[list(disc.eye)] - origin).astype(np.int32)], 255, cv2.LINE_AA, SUBPIXEL_BITS)
    x, y = (int(value) for value in fixed[disc.iris[0]] - origin)
    cv2.circle(round_, (x, y), int(radius * (1 << SUBPIXEL_BITS)), 255, -1, cv2.LINE_AA, SUBPIXEL_BITS)
    cover = np.minimum(opening, round_).astype(np.float32)[..., None] / 255
    patch = canvas[low[1] : high[1], low[0] : high[0]]
    patch[:] = np.maximum(patch, (cover * np.array(disc.color, np.float32)).astype(np.uint8))
