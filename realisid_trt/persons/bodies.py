"""Bodies as drawings of joints and limbs, each in the style that a published ControlNet was trained with.

A body is given by COCO's 17 joints. The drawings show OpenPose's 18: the same, and the neck between the shoulders.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..checks import own_array
from ..errors import RequestError
from .conditions import Color, as_planes, within_reach
from .mesh import FIVE, LEFT_EAR, LEFT_IRIS, NOSE_TIP, NUM_LANDMARKS, RIGHT_EAR, RIGHT_IRIS

Canvas = NDArray[np.uint8]
Joints = NDArray[np.float64]  # (18, 3) x, y, score: OpenPose's joints of one body

NUM_JOINTS = 17
NOSE, LEFT_SHOULDER, RIGHT_SHOULDER, NECK = 0, 5, 6, 17  # COCO has no neck: it is put after its joints
# COCO's nose, eyes and ears → landmarks of the face mesh, or keypoints of a face. Left is the person's own.
HEADS = {
    NUM_LANDMARKS: {NOSE: NOSE_TIP, 1: LEFT_IRIS[0], 2: RIGHT_IRIS[0], 3: LEFT_EAR, 4: RIGHT_EAR},
    len(FIVE): {NOSE: 2, 1: 1, 2: 0},
}
LEAST_SCORE = 0.3  # a joint is seen if its score is greater

# fmt: off
OPENPOSE = (0, NECK, 6, 8, 10, 5, 7, 9, 12, 14, 16, 11, 13, 15, 2, 1, 4, 3)  # COCO's number of each joint
LIMBS = ((1, 2), (1, 5), (2, 3), (3, 4), (5, 6), (6, 7), (1, 8), (8, 9), (9, 10), (1, 11), (11, 12), (12, 13), (1, 0),
         (0, 14), (14, 16), (0, 15), (15, 17))
# Once around the hues in 18 steps, red first: of joint i, and of limb i.
COLORS: tuple[Color, ...] = (
    (255, 0, 0), (255, 85, 0), (255, 170, 0), (255, 255, 0), (170, 255, 0), (85, 255, 0),
    (0, 255, 0), (0, 255, 85), (0, 255, 170), (0, 255, 255), (0, 170, 255), (0, 85, 255),
    (0, 0, 255), (85, 0, 255), (170, 0, 255), (255, 0, 255), (255, 0, 170), (255, 0, 85),
)
# fmt: on


@dataclass(frozen=True)
class BodyStyle:
    """A drawing of bodies.

    radii: (from this larger side of the picture, radius), both in px: of the joints, and half the width of the limbs.
    paint: (canvas, bodies, radius) → None. The order of joints and limbs, and how one covers the other.
    """

    radii: tuple[tuple[int, int], ...]
    paint: Callable[[Canvas, Sequence[Joints], int], None]


def checked_body(body: Any, what: str) -> NDArray[np.float64]:
    """A body in px of the output, as a (17, 2 or 3) float64 copy.

    Raises RequestError for another shape, for NaN, and for joints within one px: these are units of the picture.
    """
    joints = own_array(body, None, what, np.float64)
    if joints.shape not in ((NUM_JOINTS, 2), (NUM_JOINTS, 3)):
        raise RequestError(
            f"{what} has shape {joints.shape}, expected ({NUM_JOINTS}, 2) or ({NUM_JOINTS}, 3): x, y in px of the "
            "output, and a score if there is one, of COCO's joints."
        )
    if joints[:, :2].any() and joints[:, :2].min() >= 0 and joints[:, :2].max() <= 1:
        raise RequestError(
            f"{what} has its joints within 0 to 1, expected px of the output. Multiply x by its width, y by its height."
        )
    return joints


def body_drawing(bodies: Iterable[ArrayLike], height: int, width: int, style: str) -> NDArray[np.float32]:
    """The bodies of a picture in one drawing on black.

    bodies: of each body COCO's joints, (17, 2) x, y in px of the picture, or (17, 3) with scores. A joint whose score
            is at most 0.3 is missing. Without scores none is.
    style:  name of a preset in BODY_STYLES.

    Returns (3, H, W) float32 in [0, 1]. Raises RequestError for other joints and for an unknown style.
    """
    if style not in BODY_STYLES:
        raise RequestError(f"the style of a body is {style!r}, expected one of {', '.join(BODY_STYLES)}.")
    preset = BODY_STYLES[style]
    radius = next(radius for least_px, radius in reversed(preset.radii) if max(height, width) >= least_px)
    joints = [_openpose(checked_body(body, f"body {i + 1}"), height, width) for i, body in enumerate(bodies)]
    canvas = np.zeros((height, width, 3), np.uint8)
    preset.paint(canvas, joints, radius)
    return as_planes(canvas)


def head_body(points_px: NDArray[np.float64]) -> NDArray[np.float64]:
    """A body of which only the head is known: nose, eyes and ears, out of a face's points.

    points_px: x, y in px of the picture: the (478, 2) landmarks, or (5, 2) keypoints, which have no ears.

    Returns (17, 3): x, y and score of COCO's joints; the score is 1 for the head's and 0 for all others. It stands in
    for a body that nobody gave, and is ours: no published model is known to be trained with it.
    """
    body = np.zeros((NUM_JOINTS, 3))
    for joint, point in HEADS[len(points_px)].items():
        body[joint] = (*points_px[point], 1)
    return body


def is_seen(body: NDArray[np.float64]) -> bool:
    """Whether any joint of a body is seen. body: (17, 2 or 3), as `checked_body` returns it."""
    return body.shape[1] == 2 or bool((body[:, 2] > LEAST_SCORE).any())


def nose_of(body: NDArray[np.float64]) -> NDArray[np.float64] | None:
    """(2,) the nose of a body, px; None if its score says that it is missing."""
    seen = body.shape[1] == 2 or body[NOSE, 2] > LEAST_SCORE
    return body[NOSE, :2].copy() if seen else None


def _openpose(body: NDArray[np.float64], height: int, width: int) -> Joints:
    """OpenPose's joints out of COCO's. The neck is the mean of the shoulders, with the smaller of their scores."""
    scores = body[:, 2:] if body.shape[1] == 3 else np.ones((NUM_JOINTS, 1))
    joints = np.hstack((within_reach(body[:, :2], height, width), scores))
    shoulders = joints[[LEFT_SHOULDER, RIGHT_SHOULDER]]
    neck = (*shoulders[:, :2].mean(axis=0), shoulders[:, 2].min())
    return np.vstack((joints, neck))[list(OPENPOSE)]


def _limbs_blended_over_joints(canvas: Canvas, bodies: Sequence[Joints], radius: int) -> None:
    """Joints with a limb, then 0.6 of the limbs over them; all bodies together. ID-Patch, draw_openpose_from_mmpose."""
    for joints in bodies:
        jointed = {joint for limb in _seen_limbs(joints) for joint in LIMBS[limb]}
        for joint in sorted(jointed):
            _draw_joint(canvas, joints, joint, radius)
    limbs = canvas.copy()
    for joints in bodies:
        for limb in _seen_limbs(joints):
            _draw_limb(limbs, joints, limb, radius, COLORS[limb])
    cv2.addWeighted(canvas, 0.4, limbs, 0.6, 0, dst=canvas)


def _joints_over_dark_limbs(canvas: Canvas, bodies: Sequence[Joints], radius: int) -> None:
    """Limbs in 0.6 of their colours, then all joints; body after body. The model card of xinsir's openpose."""
    for joints in bodies:
        for limb in _seen_limbs(joints):
            red, green, blue = (value * 3 // 5 for value in COLORS[limb])
            _draw_limb(canvas, joints, limb, radius, (red, green, blue))
        for joint in np.flatnonzero(joints[:, 2] > LEAST_SCORE).tolist():
            _draw_joint(canvas, joints, joint, radius)


BODY_STYLES = {
    # ByteDance/ID-Patch, SDXL.
    "openpose-mmpose": BodyStyle(radii=((0, 4),), paint=_limbs_blended_over_joints),
    # xinsir/controlnet-openpose-sdxl-1.0 and its union.
    "openpose-xinsir": BodyStyle(
        radii=((0, 4), (500, 8), (1000, 12), (2000, 16), (3000, 20), (4000, 24), (5000, 28)),
        paint=_joints_over_dark_limbs,
    ),
}


def _seen_limbs(joints: Joints) -> list[int]:
    """The limbs with both joints."""
    seen = joints[:, 2] > LEAST_SCORE
    return [limb for limb, (start, end) in enumerate(LIMBS) if seen[start] and seen[end]]


def _draw_joint(canvas: Canvas, joints: Joints, joint: int, radius: int) -> None:
    x, y = (int(value) for value in joints[joint, :2])  # towards 0, as published
    cv2.circle(canvas, (x, y), radius, COLORS[joint], -1)


def _draw_limb(canvas: Canvas, joints: Joints, limb: int, half_width: int, color: Color) -> None:
    """A filled ellipse from joint to joint. Centre, half length and degrees are cut to whole numbers, as published."""
    (x0, y0), (x1, y1) = joints[list(LIMBS[limb]), :2].tolist()
    center = int((x0 + x1) / 2), int((y0 + y1) / 2)
    half_length = int(math.sqrt((x0 - x1) ** 2 + (y0 - y1) ** 2) / 2)
    degrees = int(math.degrees(math.atan2(y0 - y1, x0 - x1)))
    polygon = cv2.ellipse2Poly(center, (half_length, half_width), degrees, 0, 360, 1)
    cv2.fillConvexPoly(canvas, np.array(polygon), color)
