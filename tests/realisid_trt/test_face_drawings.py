"""Drawings of faces, pixel by pixel: the published rules, written again here from what their authors say and do."""

from __future__ import annotations

import ast
import json
import math
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from export.wheels import fetch_member
from realisid_trt.errors import BuildError, ShapeError
from realisid_trt.persons.conditions import POSE_STYLES, face_drawing, pose_image
from realisid_trt.persons.mesh import DLIB_68, JAW, LEFT_BROW, LEFT_EYE, RIGHT_BROW, RIGHT_EYE
from tests.realisid_trt.pixels import Pixels, picture, sha256, shows

Points = NDArray[np.float64]
EXPECTED: dict[str, Any] = json.loads((Path(__file__).parent.parent / "data" / "faces_expected.json").read_text())
SIZES = [(512, 512), (512, 768), (768, 512), (256, 320), (1024, 768)]  # height, width

# The wheel of the landmark models (export/face_models.py) holds the edges that MediaPipe draws.
MEDIAPIPE, EDGES_FILE = "mediapipe==0.10.21", "mediapipe/python/solutions/face_mesh_connections.py"
EDGES_SHA256 = "cc7171e44d0612db38720cb2fd2516c395992cdd7457efe341543be6f3c22d87"


def edges(*paths: str) -> list[tuple[int, int]]:
    points = [[int(word) for word in path.split()] for path in paths]
    return [pair for path in points for pair in zip(path[:-1], path[1:], strict=True)]


# In the order in which the published code draws them, with its colours, which are BGR.
MEDIAPIPE_EDGES = {
    "FACE_OVAL": (
        edges(
            "10 338 297 332 284 251 389 356 454 323 361 288 397 365 379 378 400 377 152 148 176 149 150 136 172 58 132 "
            "93 234 127 162 21 54 103 67 109 10"
        ),
        (10, 200, 10),
    ),
    "LEFT_EYE": (edges("263 249 390 373 374 380 381 382 362", "263 466 388 387 386 385 384 398 362"), (180, 200, 10)),
    "LEFT_EYEBROW": (edges("276 283 282 295 285", "300 293 334 296 336"), (180, 220, 10)),
    "RIGHT_EYE": (edges("33 7 163 144 145 153 154 155 133", "33 246 161 160 159 158 157 173 133"), (10, 200, 180)),
    "RIGHT_EYEBROW": (edges("46 53 52 65 55", "70 63 105 66 107"), (10, 220, 180)),
    "LIPS": (
        edges(
            "61 146 91 181 84 17 314 405 321 375 291",
            "61 185 40 39 37 0 267 269 270 409 291",
            "78 95 88 178 87 14 317 402 318 324 308",
            "78 191 80 81 82 13 312 311 310 415 308",
        ),
        (10, 180, 10),
    ),
}
MEDIAPIPE_PUPILS = {468: (10, 200, 250), 473: (250, 200, 10)}  # right, left; BGR


def face_of(name: str) -> Points:
    """The landmarks that MediaPipe found in a photograph, from 0 to 1 across them."""
    points = np.array(EXPECTED[name]["looks"][0]["second"])
    return np.asarray((points - points.min(axis=0)) / np.ptp(points, axis=0).max(), np.float64)


ASTRONAUT, HOPPER = face_of("astronaut.png"), face_of("hopper.jpg")


def share(points: Points, height: int, width: int) -> Points:
    """Points of 0 to 1 across the picture, on a grid that both doubles and products with the sides hold exactly."""
    return np.round(points * 2**20) / 2**20


def mediapipe_drawing(faces: list[Points], height: int, width: int, thickness: int) -> Pixels:
    """The published drawing. faces: x, y from 0 to 1 across the picture."""
    image = np.zeros((height, width, 3), np.uint8)
    for face in faces:
        extent = face.max(axis=0) - face.min(axis=0)
        if min(extent[0] * width, extent[1] * height) < 64:
            continue
        places: dict[int, tuple[int, int]] = {}
        for index, (x, y) in enumerate(face.tolist()):
            if 0 <= x <= 1 and 0 <= y <= 1:
                places[index] = min(math.floor(x * width), width - 1), min(math.floor(y * height), height - 1)
        for pairs, color in MEDIAPIPE_EDGES.values():
            for start, end in pairs:
                if start in places and end in places:
                    cv2.line(image, places[start], places[end], color, thickness)
        for index, color in MEDIAPIPE_PUPILS.items():
            x, y = face[index].tolist()
            if x >= 1 or x < 0 or y >= 1 or y < 0:
                continue
            column, row = int(width * x), int(height * y)
            image[row - thickness : row + thickness, column - thickness : column + thickness, :] = color
    return np.ascontiguousarray(image[:, :, ::-1])


def faces_of_a_picture(rng: np.random.Generator, height: int, width: int) -> list[Points]:
    """One to three faces somewhere, some of them small, some beyond the border. From 0 to 1 across the picture."""
    faces = []
    for _ in range(rng.integers(1, 4)):
        points = (ASTRONAUT, HOPPER)[rng.integers(2)] + rng.normal(0, 0.004, (478, 2))
        points = points * rng.uniform(40, 0.9 * min(height, width)) / (width, height) + rng.uniform(-0.3, 0.9, 2)
        faces.append(share(points, height, width))
    return faces


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_mediapipe_faces_are_as_published(height: int, width: int) -> None:
    """At 512 px; other sizes scale the two pixels of the published code, and nothing else."""
    rng = np.random.default_rng(height + 7 * width)
    thickness = {256: 1, 512: 2, 768: 3}[min(height, width)]
    for _ in range(12):
        faces = faces_of_a_picture(rng, height, width)
        found = picture(face_drawing([face * (width, height) for face in faces], height, width, "mediapipe-face"))
        assert np.array_equal(found, mediapipe_drawing(faces, height, width, thickness))


def test_the_rule_sees_what_it_shall_see() -> None:
    """Each of these errors would change the drawing of an ordinary face."""
    face = share(ASTRONAUT * 0.8 + 0.1, 512, 512)
    right = mediapipe_drawing([face], 512, 512, 2)
    mirrored = face * (-1, 1) + (1, 0)
    others = {
        "BGR": right[:, :, ::-1],
        "left for right": mediapipe_drawing([mirrored], 512, 512, 2)[:, ::-1],
        "thicker": mediapipe_drawing([face], 512, 512, 3),
        "a pixel to the right": mediapipe_drawing([face + (1 / 512, 0)], 512, 512, 2),
    }
    assert [name for name, wrong in others.items() if np.array_equal(right, wrong)] == []


def test_edges_are_mediapipes_own() -> None:
    """The constants of the wheel that the landmark models come from, read as text."""
    try:
        text = fetch_member(MEDIAPIPE, EDGES_FILE, EDGES_SHA256).read_text(encoding="utf-8")
    except BuildError as error:
        pytest.skip(f"no wheel: {error}")
    published = {
        node.targets[0].id: ast.literal_eval(node.value.args[0])
        for node in ast.parse(text).body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
        if isinstance(node.value, ast.Call) and node.value.args and isinstance(node.value.args[0], ast.List)
    }
    for name, (pairs, _) in MEDIAPIPE_EDGES.items():
        assert set(pairs) == set(published[f"FACEMESH_{name}"]) and len(pairs) == len(set(pairs))
    ends = [
        (line.color, {start, end})
        for line in POSE_STYLES["mediapipe-face"].lines
        for start, end in zip(line.path, line.path[1:] + line.path[: line.closed], strict=False)
    ]
    for name, (pairs, color) in MEDIAPIPE_EDGES.items():
        assert sum((color[::-1], {start, end}) in ends for start, end in pairs) == len(pairs), name
    assert len(ends) == sum(len(pairs) for pairs, _ in MEDIAPIPE_EDGES.values())


def test_mediapipe_colours_and_sides() -> None:
    """RGB, and the person's own left: on the right of an unmirrored photo."""
    pixels = picture(pose_image(ASTRONAUT * 0.8 + 0.1, 512, "mediapipe-face"))
    assert {tuple(color) for color in pixels.reshape(-1, 3).tolist()} == {
        (0, 0, 0), (10, 200, 10), (10, 200, 180), (10, 220, 180), (180, 200, 10), (180, 220, 10), (10, 180, 10),
        (250, 200, 10), (10, 200, 250),
    }  # fmt: skip
    places = np.floor((ASTRONAUT * 0.8 + 0.1) * 512).astype(int)
    for path, color in ((LEFT_EYE, (10, 200, 180)), (RIGHT_EYE, (180, 200, 10)), (LEFT_BROW[0], (10, 220, 180)),
                        (RIGHT_BROW[0], (180, 220, 10))):  # fmt: skip
        for x, y in places[list(path)]:
            assert tuple(pixels[y, x]) == color
    for pupil, color in ((468, (250, 200, 10)), (473, (10, 200, 250))):
        x, y = places[pupil]
        lit = np.argwhere(shows(pixels, color))
        assert (
            len(lit) == 16 and (lit.min(axis=0) == (y - 2, x - 2)).all() and (lit.max(axis=0) == (y + 1, x + 1)).all()
        )
    assert places[468, 0] < 256 < places[473, 0]


def test_small_faces_are_left_out() -> None:
    tall = ASTRONAUT / np.ptp(ASTRONAUT, axis=0)  # a square extent
    for width, drawn in ((63.9, False), (64.0, True)):
        for size in ((width, 200.0), (200.0, width)):
            assert face_drawing([tall * size + 100], 512, 512, "mediapipe-face").any() == drawn
    both = [ASTRONAUT * 200 + (10, 20), HOPPER * 60 + (300, 300)]
    alone = face_drawing(both[:1], 512, 512, "mediapipe-face")
    assert np.array_equal(face_drawing(both, 512, 512, "mediapipe-face"), alone)
    assert not face_drawing([], 384, 512, "mediapipe-face").any()


def test_lines_that_leave_the_picture_are_left_out() -> None:
    face = ASTRONAUT * 400 + 50
    outside = face.copy()
    outside[10, 1] = -0.5  # the top of the oval
    before, after = (picture(face_drawing([points], 512, 512, "mediapipe-face")) for points in (face, outside))
    gone = np.argwhere((before != after).any(axis=2))
    ends = face[[109, 10, 338]]
    assert len(gone) and (gone[:, ::-1] >= ends.min(axis=0) - 3).all() and (gone[:, ::-1] <= ends.max(axis=0) + 3).all()
    assert not shows(after, (10, 200, 10))[0].any()
    for place, drawn in (
        ((0.0, 300.0), True),
        ((512.0, 300.0), True),
        ((512.001, 300.0), False),
        ((-1e-9, 9.0), False),
    ):
        corner = face.copy()
        corner[33] = place  # of the right eye
        lit = shows(picture(face_drawing([corner], 512, 512, "mediapipe-face")), (180, 200, 10))
        assert (lit[:, 0].any() or lit[:, 511].any()) == drawn


def test_pupils_at_the_border() -> None:
    """A square that would cross the upper or left border is left out, one at the others is cut; as published."""
    for place, count in (((2, 300), 16), ((1, 300), 0), ((300, 1), 0), ((511, 300), 12), ((300, 510.5), 16),
                         ((511.9, 511.9), 9), ((512, 300), 0), ((-1, 300), 0)):  # fmt: skip
        face = ASTRONAUT * 400 + 50
        face[468] = place
        pixels = picture(face_drawing([face], 512, 512, "mediapipe-face"))
        assert shows(pixels, (250, 200, 10)).sum() == count, place


def test_dots_are_pillows_ellipses() -> None:
    rng = np.random.default_rng(5)
    faces = [(ASTRONAUT * 200 + (20, 30)).round(), (HOPPER * 300 + (400, 150)).round(), rng.integers(3, 512, (478, 2))]
    image = Image.new("RGB", (640, 512))
    for face in faces:
        for x, y in face[list(DLIB_68)].tolist():
            ImageDraw.Draw(image).ellipse((x - 2.5, y - 2.5, x + 2.5, y + 2.5), fill="white")
    assert np.array_equal(picture(face_drawing(faces, 512, 640, "dots-68")), np.asarray(image))


def test_the_68_dots() -> None:
    """In dlib's order: the sides mirror each other, and the parts are where they belong."""
    assert len(set(DLIB_68)) == 68 and set(DLIB_68[:17]) <= set(JAW) and DLIB_68[8] == 152
    assert set(DLIB_68[17:22]) == set(RIGHT_BROW[0]) and set(DLIB_68[22:27]) == set(LEFT_BROW[0])
    assert set(DLIB_68[36:42]) < set(RIGHT_EYE) and set(DLIB_68[42:48]) < set(LEFT_EYE)
    middle = HOPPER[[168, 4, 152], 0].mean()
    for start, end in ((0, 16), (17, 26), (31, 35), (36, 45), (48, 54), (60, 64)):
        assert HOPPER[DLIB_68[start], 0] < middle < HOPPER[DLIB_68[end], 0]
    for size in (64, 128, 512, 1024):
        pixels = picture(pose_image(HOPPER * 0.9, size, "dots-68"))
        assert set(np.unique(pixels)) == {0, 255} and (pixels[..., :1] == pixels).all()
        for x, y in np.round(HOPPER[list(DLIB_68)] * 0.9 * size).astype(int):
            assert pixels[max(y - 1, 0) : y + 1, max(x - 1, 0) : x + 1].any()


@pytest.mark.parametrize("style", POSE_STYLES)
def test_one_face_of_a_square_picture_is_the_drawing_of_a_canvas(style: str) -> None:
    for size in (128, 333, 512):
        whole = face_drawing([ASTRONAUT * size], size, size, style)
        assert np.array_equal(pose_image(ASTRONAUT, size, style), whole) and whole.any()
    far = np.full((478, 2), 1e12)
    assert not face_drawing([far, -far], 64, 96, style).any()  # no overflow brings them back
    with pytest.raises(ShapeError, match=r"expected \(478, 2\) finite"):
        face_drawing([ASTRONAUT, ASTRONAUT * np.nan], 64, 64, style)
    with pytest.raises(ShapeError, match=r"landmarks are \(68, 2\)"):
        face_drawing([np.zeros((68, 2))], 64, 64, style)


def test_our_own_style_draws_whole_pictures_too() -> None:
    """Two faces far from each other, and one cut by the border: each as on a picture of its own."""
    faces = [ASTRONAUT * 200 + (30, 40), HOPPER * 250 + (400, 100), ASTRONAUT * 150 + (700, 380)]
    together = face_drawing(faces, 512, 768, "realisid-v1")
    assert np.array_equal(together, sum(face_drawing([face], 512, 768, "realisid-v1") for face in faces))
    square = face_drawing([faces[0]], 512, 512, "realisid-v1")
    assert np.array_equal(face_drawing([faces[0]], 512, 768, "realisid-v1")[..., :512], square)


def test_golden_pictures() -> None:
    """Equal in OpenCV 4.13 and 5.0."""
    faces = [ASTRONAUT * 300 + (20, 80), HOPPER * 280 + (430, 240)]
    found = {style: sha256(face_drawing(faces, 512, 768, style)) for style in POSE_STYLES}
    assert found == {
        "realisid-v1": "dbf1b8a6e8c557b8",
        "mediapipe-face": "d0e077481196649f",
        "dots-68": "0b9b06c31ac46a08",
    }
    assert sha256(pose_image(ASTRONAUT * 0.8 + 0.1, 512)) == "f4bb3134f7da54da"
