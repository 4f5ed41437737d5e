"""The networks' inputs for a person: crop → id_pixels, landmarks → pose_image, box → location_mask.

RealisID's drawing of landmarks is not published, and other ControlNets of faces have drawings of their own. A drawing
is therefore a named preset of the checkpoint (`pose_style`), and each preset is a row of data below.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import BoxError, RequestError, ShapeError
from .mesh import (
    DLIB_68,
    FACE_OVAL,
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
class Square:
    """A pupil: a square of whole px around a landmark. Half its side is the thickness of the lines."""

    point: int
    color: Color


@dataclass(frozen=True)
class PoseStyle:
    """A drawing of a face: discs, lines over them, then squares and dots.

    Lengths are in px per 512 px of the picture's smaller side.
    thickness:     of the lines; drawn in whole px, at least 1 px.
    dots:          landmarks that are drawn as white dots of radius `dot_radius`, at least half a px.
    smooth:        lines are anti-aliased and cut at the border. False: MediaPipe's lines, see `_draw_pixel_lines`.
    least_face_px: a face whose landmarks extend less than this in x or y is left out. Not scaled.
    """

    lines: tuple[Line, ...] = ()
    discs: tuple[Disc, ...] = ()
    squares: tuple[Square, ...] = ()
    dots: tuple[int, ...] = ()
    thickness: float = 2.0
    dot_radius: float = 2.5
    smooth: bool = True
    least_face_px: int = 0


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
    ),
    # CrucibleAI/ControlNetMediaPipeFace, SD 1.5 and 2.1. Published: 2 px at any size, which is this at 512 px.
    "mediapipe-face": PoseStyle(
        lines=(
            Line(FACE_OVAL, (10, 200, 10), closed=True),
            Line(LEFT_EYE, (10, 200, 180), closed=True),
            *(Line(edge, (10, 220, 180)) for edge in LEFT_BROW),
            Line(RIGHT_EYE, (180, 200, 10), closed=True),
            *(Line(edge, (180, 220, 10)) for edge in RIGHT_BROW),
            Line(OUTER_LIPS, (10, 180, 10), closed=True),
            Line(INNER_LIPS, (10, 180, 10), closed=True),
        ),
        squares=(Square(RIGHT_IRIS[0], (250, 200, 10)), Square(LEFT_IRIS[0], (10, 200, 250))),
        smooth=False,
        least_face_px=64,
    ),
    # georgefen/Face-Landmark-ControlNet, SD 1.5. Approximate, promises nothing: the published dots are dlib's.
    "dots-68": PoseStyle(dots=DLIB_68),
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
    """Pose and expression of one face as a drawing on black: c_p&e of RealisID.

    landmarks: (478, 2) x, y in [0, 1] of the squared face box; points outside fall off the picture.
    size_px:   side S of the drawing.
    style:     name of a preset in POSE_STYLES.

    Returns (3, S, S) float32 in [0, 1]. Raises ShapeError for other landmarks, RequestError for an unknown style.
    """
    return face_drawing([np.asarray(landmarks, np.float64) * size_px], size_px, size_px, style)


def face_drawing(faces: Iterable[ArrayLike], height: int, width: int, style: str) -> NDArray[np.float32]:
    """The faces of a picture in one drawing on black, later ones over earlier ones.

    faces: of each face the landmarks, (478, 2) x, y in px of the picture. Pixel i reaches from i to i + 1.
    style: name of a preset in POSE_STYLES.

    Returns (3, H, W) float32 in [0, 1]. Raises ShapeError for other landmarks, RequestError for an unknown style.
    """
    if style not in POSE_STYLES:
        raise RequestError(f"pose_style is {style!r}, expected one of {', '.join(POSE_STYLES)}.")
    preset, scale = POSE_STYLES[style], min(height, width) / 512
    thickness = max(1, round(preset.thickness * scale))
    canvas = np.zeros((height, width, 3), np.uint8)
    for face in faces:
        points = _checked(face)
        if np.ptp(points, axis=0).min() < preset.least_face_px:
            continue
        points = within_reach(points, height, width)
        fixed = np.round(points * (1 << SUBPIXEL_BITS)).astype(np.int32)
        for disc in preset.discs:
            _draw_disc(canvas, disc, points, fixed, thickness)
        for line in preset.lines:
            if preset.smooth:
                path = [fixed[list(line.path)]]
                cv2.polylines(canvas, path, line.closed, line.color, thickness, cv2.LINE_AA, SUBPIXEL_BITS)
            else:
                _draw_pixel_lines(canvas, line, points, thickness)
        for square in preset.squares:
            _draw_square(canvas, points[square.point], square.color, thickness)
        if preset.dots:
            _draw_dots(canvas, points[list(preset.dots)], max(0.5, preset.dot_radius * scale))
    return as_planes(canvas)


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


def within_reach(points: NDArray[np.float64], height: int, width: int) -> NDArray[np.float64]:
    """Points in px; those that are farther away than eight pictures come nearer, or OpenCV's integers would overflow.

    points: (n, 2) x, y.
    """
    size = np.array((width, height))
    return np.clip(points, -8 * size, 9 * size)


def as_planes(canvas: NDArray[np.uint8]) -> NDArray[np.float32]:
    """A painted canvas, (H, W, 3) uint8 RGB, as the networks take it: (3, H, W) float32 in [0, 1]."""
    return np.ascontiguousarray(canvas.transpose(2, 0, 1), np.float32) / np.float32(255)


def _checked(landmarks: ArrayLike) -> NDArray[np.float64]:
    points = np.asarray(landmarks, np.float64)
    if points.shape != (NUM_LANDMARKS, 2) or not np.isfinite(points).all():
        raise ShapeError(
            f"landmarks are {points.shape}, expected ({NUM_LANDMARKS}, 2) finite numbers: MediaPipe's mesh with irises."
        )
    return points


def _draw_disc(
    canvas: NDArray[np.uint8], disc: Disc, points: NDArray[np.float64], fixed: NDArray[np.int32], thickness: int
) -> None:
    """Paints disc ∧ eye opening with soft edges, on the patch of canvas that the eye covers."""
    eye = points[list(disc.eye)]
    low = np.maximum(np.floor(eye.min(axis=0)).astype(int) - 1, 0)
    high = np.minimum(np.ceil(eye.max(axis=0)).astype(int) + 2, canvas.shape[1::-1])
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


def _draw_pixel_lines(canvas: NDArray[np.uint8], line: Line, points: NDArray[np.float64], thickness: int) -> None:
    """Edges between whole px, not anti-aliased, as MediaPipe's draw_landmarks: an edge that leaves the picture is left
    out; the far borders, x = W and y = H, belong to the picture and to its last pixels."""
    size = np.array(canvas.shape[1::-1])
    inside = np.asarray(((points >= 0) & (points <= size)).all(axis=1))
    pixels = np.minimum(np.floor(points), size - 1).astype(int).tolist()
    for start, end in pairwise(line.path + line.path[:1] if line.closed else line.path):
        if inside[start] and inside[end]:
            cv2.line(canvas, pixels[start], pixels[end], line.color, thickness)


def _draw_square(canvas: NDArray[np.uint8], point: NDArray[np.float64], color: Color, half_px: int) -> None:
    """A square around a point. One that would cross the upper or left border is left out: published slices wrap."""
    height, width = canvas.shape[:2]
    x, y = (int(value) for value in np.floor(point))
    if half_px <= x < width and half_px <= y < height:
        canvas[y - half_px : y + half_px, x - half_px : x + half_px] = color


def _draw_dots(canvas: NDArray[np.uint8], points: NDArray[np.float64], radius: float) -> None:
    """White dots around whole px, cut at the border. The quarter px makes them Pillow's ellipses where radius = 2.5."""
    reach = int(np.ceil(radius + 0.25))
    offsets = np.arange(-reach, reach) + 0.5  # of pixel centres
    dot = np.argwhere(np.hypot(offsets, offsets[:, None]) <= radius + 0.25) - reach  # (n, 2) row, column
    pixels = (np.round(points[:, None, ::-1]).astype(int) + dot).reshape(-1, 2)
    rows, columns = pixels[((pixels >= 0) & (pixels < canvas.shape[:2])).all(axis=1)].T
    canvas[rows, columns] = 255
