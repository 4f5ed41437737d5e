"""Drawings of bodies, pixel by pixel: the published rules, written again here from what their authors do."""

from __future__ import annotations

import math

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from realisid_trt.errors import RequestError
from realisid_trt.persons.bodies import BODY_STYLES, body_drawing
from tests.realisid_trt.pixels import Pixels, picture, sha256, shows

Points = NDArray[np.float64]

# COCO's number of each of OpenPose's joints; 17 is the neck.
COCO_OF = [0, 17, 6, 8, 10, 5, 7, 9, 12, 14, 16, 11, 13, 15, 2, 1, 4, 3]
ENDS = [(1, 2), (1, 5), (2, 3), (3, 4), (5, 6), (6, 7), (1, 8), (8, 9), (9, 10), (1, 11), (11, 12), (12, 13), (1, 0),
        (0, 14), (14, 16), (0, 15), (15, 17)]  # fmt: skip
ONES = np.ones((17, 1))


def hue(index: int) -> tuple[int, int, int]:
    """Step `index` of 18 around the hues, in 85ths: red, then more green, then less red, …"""
    ramp = [255, 255, 255, 255, 170, 85, 0, 0, 0, 0, 0, 0, 0, 85, 170, 255, 255, 255]
    return ramp[index], ramp[(index + 12) % 18], ramp[(index + 6) % 18]


def openpose(body: Points) -> Points:
    neck = [(body[5, 0] + body[6, 0]) / 2, (body[5, 1] + body[6, 1]) / 2, min(body[5, 2], body[6, 2])]
    return np.array([*body.tolist(), neck])[COCO_OF]


def limb(image: Pixels, first: Points, second: Points, half_width: int, color: tuple[float, ...]) -> None:
    dx, dy = float(first[0] - second[0]), float(first[1] - second[1])
    center = int((first[0] + second[0]) / 2), int((first[1] + second[1]) / 2)
    axes = int((dx**2 + dy**2) ** 0.5 / 2), half_width
    outline = cv2.ellipse2Poly(center, axes, int(math.degrees(math.atan2(dy, dx))), 0, 360, 1)
    cv2.fillConvexPoly(image, outline, color)


def mmpose_drawing(bodies: list[Points], height: int, width: int) -> Pixels:
    under = np.zeros((height, width, 3), np.uint8)
    for joints in map(openpose, bodies):
        seen = joints[:, 2] > 0.3
        limbs = [ends for ends in ENDS if seen[list(ends)].all()]
        for j in range(18):
            if any(j in ends for ends in limbs):
                cv2.circle(under, (int(joints[j, 0]), int(joints[j, 1])), 4, hue(j), -1)
    over = under.copy()
    for joints in map(openpose, bodies):
        for i, (a, b) in enumerate(ENDS):
            if joints[a, 2] > 0.3 and joints[b, 2] > 0.3:
                limb(over, joints[a], joints[b], 4, hue(i))
    return np.rint(0.4 * under.astype(np.float64) + 0.6 * over).astype(np.uint8)


def xinsir_drawing(bodies: list[Points], height: int, width: int) -> Pixels:
    side = max(height, width)
    radius = 4 * (1 if side < 500 else min(2 + side // 1000, 7))
    image = np.zeros((height, width, 3), np.uint8)
    for joints in map(openpose, bodies):
        for i, (a, b) in enumerate(ENDS):
            if joints[a, 2] > 0.3 and joints[b, 2] > 0.3:
                limb(image, joints[a], joints[b], radius, tuple(int(value * 0.6) for value in hue(i)))
        for j, (x, y, score) in enumerate(joints):
            if score > 0.3:
                cv2.circle(image, (int(x), int(y)), radius, hue(j), -1)
    return image


STANDING = np.array(
    [(150, 55), (156, 49), (144, 49), (165, 52), (135, 52), (180, 95), (120, 95), (200, 145), (95, 130), (190, 195),
     (75, 80), (165, 200), (131, 201), (175, 270), (125, 272), (172, 340), (120, 345)], np.float64
)  # fmt: skip
RULES = {"openpose-mmpose": mmpose_drawing, "openpose-xinsir": xinsir_drawing}


def test_every_style_of_bodies_has_its_rule() -> None:
    assert set(RULES) == set(BODY_STYLES)


@pytest.mark.parametrize("style", RULES)
@pytest.mark.parametrize(
    ("height", "width"), [(384, 448), (499, 320), (500, 320), (512, 768), (1024, 640), (640, 2000)]
)
def test_bodies_are_as_published(style: str, height: int, width: int) -> None:
    """Several bodies, joints that are missing or lie beyond the border, and wild poses."""
    rng = np.random.default_rng(height + width)
    for _ in range(12):
        bodies = []
        for _ in range(rng.integers(1, 4)):
            joints = STANDING * rng.uniform(0.3, 3) + rng.uniform(-100, 300, 2) + rng.normal(0, 9, (17, 2))
            if rng.random() < 0.3:
                joints = rng.uniform(-0.2, 1.2, (17, 2)) * (width, height)
            scores = rng.choice([0.0, 0.3, 0.31, 0.9, 1.0], (17, 1), p=[0.1, 0.1, 0.1, 0.3, 0.4])
            bodies.append(np.hstack((joints, scores)))
        found = picture(body_drawing(bodies, height, width, style))
        assert np.array_equal(found, RULES[style](bodies, height, width))


@pytest.mark.parametrize("style", RULES)
def test_bodies_colours_and_sides(style: str) -> None:
    """RGB, red first; the right arm, on the left of an unmirrored photo, is orange to yellow, the left one green."""
    pixels = picture(body_drawing([STANDING * 2], 768, 640, style))
    arm = {side: np.round(STANDING[[shoulder, elbow]].mean(axis=0) * 2).astype(int)
           for side, shoulder, elbow in (("right", 6, 8), ("left", 5, 7))}  # fmt: skip
    assert tuple(pixels[arm["right"][1], arm["right"][0]]) == (153, 102, 0)
    assert tuple(pixels[arm["left"][1], arm["left"][0]]) == (102, 153, 0)
    wrists = {
        side: tuple(pixels[int(y), int(x)]) for side, (x, y) in (("left", STANDING[9] * 2), ("right", STANDING[10] * 2))
    }
    if style == "openpose-xinsir":
        assert wrists == {"left": (0, 255, 85), "right": (170, 255, 0)} and tuple(pixels[110, 300]) == (255, 0, 0)
    swapped = STANDING[[0, 2, 1, 4, 3, 6, 5, 8, 7, 10, 9, 12, 11, 14, 13, 16, 15]]
    for wrong in (body_drawing([swapped * 2], 768, 640, style), body_drawing([STANDING * 2], 768, 640, style)[::-1]):
        assert not np.array_equal(picture(np.ascontiguousarray(wrong)), pixels)


def test_joints_that_are_missing() -> None:
    """At most 0.3 is missing. A joint without a limb: drawn by one style only. The neck needs both shoulders."""
    scores = np.zeros((17, 1))
    scores[9] = 0.9  # the left wrist alone
    alone = np.hstack((STANDING, scores))
    assert not body_drawing([alone], 384, 384, "openpose-mmpose").any()
    lit = shows(picture(body_drawing([alone], 384, 384, "openpose-xinsir")), (0, 255, 85))
    assert lit[195, 190] and lit.sum() == lit[191:200, 186:195].sum()
    for score in (0.3, 0.0, -1.0):
        body = np.hstack((STANDING, ONES))
        body[5, 2] = score
        pixels = picture(body_drawing([body], 384, 384, "openpose-xinsir"))
        assert not shows(pixels, hue(1)).any() and not shows(pixels, hue(5)).any() and shows(pixels, hue(6)).any()
    for style in RULES:
        with_ones = body_drawing([np.hstack((STANDING, ONES))], 384, 384, style)
        assert np.array_equal(body_drawing([STANDING], 384, 384, style), with_ones)
        assert (
            not body_drawing([], 384, 320, style).any() and not body_drawing([STANDING * 0], 9, 9, style)[:, 8, 8].any()
        )
        assert body_drawing([STANDING * 1e300, STANDING - 1e12], 64, 96, style).shape == (3, 64, 96)


def test_other_bodies_are_refused() -> None:
    for wrong in (np.zeros((18, 2)), np.zeros((17, 4)), np.zeros(34)):
        with pytest.raises(RequestError, match=r"body 2 has shape .*, expected \(17, 2\) or \(17, 3\): x, y in px"):
            body_drawing([STANDING, wrong], 64, 64, "openpose-mmpose")
    with pytest.raises(RequestError, match="body 1 holds NaN"):
        body_drawing([STANDING * np.nan], 64, 64, "openpose-mmpose")
    with pytest.raises(
        RequestError, match="body 1 has its joints within 0 to 1, expected px of the output. Multiply x by"
    ):
        body_drawing([STANDING / 400], 64, 64, "openpose-mmpose")
    with pytest.raises(RequestError, match="expected one of openpose-mmpose, openpose-xinsir"):
        body_drawing([STANDING], 64, 64, "openpose")


def test_golden_pictures() -> None:
    """Equal in OpenCV 4.13 and 5.0."""
    bodies = [STANDING * 2, np.hstack((STANDING * 1.8 + (330, 60), ONES))]
    found = {style: sha256(body_drawing(bodies, 768, 896, style)) for style in BODY_STYLES}
    assert found == {"openpose-mmpose": "71c85747f67ea248", "openpose-xinsir": "fd3d12f64e35a6b8"}
