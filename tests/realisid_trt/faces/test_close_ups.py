"""Faces that fill the photo or are cut by its border; boxes and detections where no face is; faces that are tilted."""

from __future__ import annotations

import itertools
from typing import Any

import cv2
import numpy as np
import pytest

from realisid_trt.errors import PhotoError
from realisid_trt.persons.faces import FaceFinder
from realisid_trt.persons.photo import LoadedPhoto, load_photo
from tests.realisid_trt.faces.photographs import NAMES, same_face

CUTS = ("0.9", "0.8", "left", "right", "top", "bottom")


def cut(photo: LoadedPhoto, box: Any, how: str) -> tuple[LoadedPhoto, tuple[float, float]]:
    """The photo cropped to 0.9 or 0.8 of a face's box, or so that 30 % of the face are cut off at one side; enlarged to
    at least 512 px. Returns it, and where its corner was."""
    x0, y0, x1, y1 = (round(value) for value in box)
    width, height = x1 - x0, y1 - y0
    if how in ("0.9", "0.8"):
        side = (1 - float(how)) / 2
        x0, y0, x1, y1 = (
            x0 + int(side * width),
            y0 + int(side * height),
            x1 - int(side * width),
            y1 - int(side * height),
        )
    else:
        x0, y0 = max(0, x0 - width // 2), max(0, y0 - height // 2)
        x1, y1 = min(photo.rgb.shape[1], x1 + width // 2), min(photo.rgb.shape[0], y1 + height // 2)
        part = round(0.3 * (width if how in ("left", "right") else height))
        x0 = round(box[0]) + part if how == "left" else x0
        x1 = round(box[2]) - part if how == "right" else x1
        y0 = round(box[1]) + part if how == "top" else y0
        y1 = round(box[3]) - part if how == "bottom" else y1
    return load_photo(np.ascontiguousarray(photo.rgb[y0:y1, x0:x1])), (x0, y0)


@pytest.mark.parametrize("how", CUTS)
@pytest.mark.parametrize("name", NAMES)
def test_found_where_it_is(finder: FaceFinder, pictures: dict[str, LoadedPhoto], name: str, how: str) -> None:
    whole = finder.find(pictures[name])
    photo, (x, y) = cut(pictures[name], whole.box, how)
    face = finder.find(photo)
    box, expected = np.array(face.box) + (x, y, x, y), np.array(whole.box)
    common = np.minimum(box[2:], expected[2:]) - np.maximum(box[:2], expected[:2])
    union = np.prod(box[2:] - box[:2]) + np.prod(expected[2:] - expected[:2]) - np.prod(common)
    assert np.prod(common) / union > 0.6 and face.turns == 0
    points, whole_points = face.points_px + (x, y), whole.points_px
    side = expected[2] - expected[0]
    assert np.median(np.linalg.norm(points - whole_points, axis=1)) < 0.1 * side


def test_a_photo_without_a_face_stays_one(finder: FaceFinder) -> None:
    for side in (80, 300):
        with pytest.raises(PhotoError, match="no face was found") as caught:
            finder.find(load_photo(np.full((side, side, 3), 128, np.uint8)))
        assert caught.value.code == "no_face"


def test_the_landmark_net_believes_photographs(finder: FaceFinder, pictures: dict[str, LoadedPhoto]) -> None:
    for photo in pictures.values():
        face = finder.find(photo)
        assert face.score is not None and face.score > 0.95 and face.notes == ()
        given = finder.find(photo, box=face.box)
        assert given.score is not None and given.score > 0.95 and given.notes == ()


def nothing(kind: str) -> LoadedPhoto:
    rgb = np.full((400, 400, 3), 128, np.uint8)
    if kind == "noise":
        rgb = np.random.default_rng(0).integers(0, 256, rgb.shape).astype(np.uint8)
    if kind == "stripes":
        rgb[::20] = rgb[1::20] = rgb[2::20] = (200, 30, 30)
    return load_photo(rgb)


@pytest.mark.parametrize("kind", ["grey", "noise", "stripes", "suit"])
def test_a_box_without_a_face_is_told(finder: FaceFinder, astronaut: LoadedPhoto, kind: str) -> None:
    photo, box = (astronaut, (300, 330, 430, 460)) if kind == "suit" else (nothing(kind), (100, 100, 300, 300))
    face = finder.find(photo, box=box)  # drawn faces, which the net does not know, must stay possible
    assert face.score is not None and face.score < 0.5
    assert any("the landmark net finds no face in this box (score 0." in note for note in face.notes)


def test_given_landmarks_are_believed(finder: FaceFinder, astronaut: LoadedPhoto) -> None:
    points = finder.find(astronaut).landmarks
    face = finder.find(nothing("grey"), box=(100, 100, 300, 300), landmarks=points)
    assert face.score is None and face.notes == ()


def tilted(photo: LoadedPhoto, angle: float, scale: float) -> tuple[LoadedPhoto, Any]:
    """The photo turned by so many degrees counter-clockwise about its middle, and the map of its points."""
    height, width = photo.rgb.shape[:2]
    turn = cv2.getRotationMatrix2D((width / 2, height / 2), angle, scale)
    rgb = cv2.warpAffine(photo.rgb, turn, (width, height), borderMode=cv2.BORDER_REPLICATE)
    return load_photo(np.asarray(rgb, np.uint8)), turn


@pytest.mark.parametrize("angle", [-40, -30, -15, 15, 30, 40])
@pytest.mark.parametrize("name", NAMES)
def test_a_tilted_face_stays_as_it_is(
    finder: FaceFinder, pictures: dict[str, LoadedPhoto], name: str, angle: int
) -> None:
    photo, turn = tilted(pictures[name], angle, 0.8)
    face = finder.find(photo)
    assert face.turns == 0
    corners = np.array(finder.find(pictures[name]).box).reshape(2, 2).mean(axis=0)
    centre = np.array(face.box).reshape(2, 2).mean(axis=0)
    assert np.linalg.norm(turn @ (*corners, 1) - centre) < 0.2 * (face.box[2] - face.box[0])


@pytest.mark.parametrize(
    ("name", "angle"),
    [*itertools.product(NAMES, [60, 80, 100, 115, 150, 210, 240, 260]), (NAMES[0], 50), (NAMES[0], 230)],
)
def test_the_quarter_turn_that_leaves_the_least_tilt_wins(
    finder: FaceFinder, pictures: dict[str, LoadedPhoto], name: str, angle: int
) -> None:
    """This holds too if the detector is surer of the face in another position, as in the last two cases."""
    photo, _ = tilted(pictures[name], angle, 0.7)
    assert finder.find(photo).turns == -round(angle / 90) % 4


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_a_lying_photo_is_turned(finder: FaceFinder, pictures: dict[str, LoadedPhoto], turns: int) -> None:
    for photo in pictures.values():
        face = finder.find(photo.turned(turns))
        assert face.turns == 4 - turns and same_face(np.array(face.box), np.array(finder.find(photo).box))
