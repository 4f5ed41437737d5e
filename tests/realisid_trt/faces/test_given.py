"""Boxes and landmarks of the caller's own, in pixels of the photo as the caller sees it."""

from __future__ import annotations

import io
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from realisid_trt.errors import RequestError
from realisid_trt.persons.faces import FaceFinder
from realisid_trt.persons.photo import LoadedPhoto, load_photo
from tests.realisid_trt.faces.photographs import enlarged, refusal, same_face


def test_given_box_needs_no_detector(finder: FaceFinder, hopper: LoadedPhoto) -> None:
    """MTCNN finds no face in a drawing, but its box is used. On a photo, the landmarks are those of the found face."""
    found = finder.find(hopper)
    face = finder.find(hopper, box=(160, 110, 350, 345))
    assert face.box == (160.0, 110.0, 350.0, 345.0) and face.num_found == 0
    assert np.abs(face.points_px - found.points_px).max() < 0.05 * 238
    cartoon = np.full((300, 300, 3), 230, np.uint8)
    cv2.circle(cartoon, (150, 150), 90, (250, 200, 160), -1)
    for x in (115, 185):
        cv2.circle(cartoon, (x, 130), 12, (20, 20, 20), -1)
    cv2.ellipse(cartoon, (150, 195), (35, 12), 0, 0, 180, (180, 20, 20), 4)
    drawing = load_photo(cartoon)
    refusal("no_face", finder.find, drawing)
    drawn = finder.find(drawing, box=(60, 60, 240, 240))
    crop, source = finder.crop(drawing, drawn, 128)
    assert source == "hull"  # the person net sees no person, and must not leave a black picture
    assert "the person mask finds no person" in finder.notes_on(source)[0]
    assert (crop.sum(axis=2) > 0).mean() > 0.5


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_boxes_are_pixels_of_the_upright_original(
    finder: FaceFinder, hopper: LoadedPhoto, kind: str, orientation: int
) -> None:
    """A camera's photo of 4608 × 5400 px is worked on at 2048; a box is in pixels of the original."""
    large = enlarged(hopper, 9)
    stored = large if orientation == 1 else large.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stream = io.BytesIO()
    stored.save(stream, kind, exif=exif)
    photo = load_photo(stream.getvalue())
    assert photo.size == (5400, 4608) and max(photo.rgb.shape) == 2048

    by_hand = np.array((160, 110, 350, 345)) * 9
    face = finder.find(photo, box=by_hand)
    np.testing.assert_array_equal(face.box, by_hand)
    small = finder.find(hopper, box=(160, 110, 350, 345))
    assert np.abs(face.landmarks - small.landmarks).max() < 0.03
    assert np.abs(face.points_px / 9 - small.points_px).max() < 0.03 * 235
    crop, small_crop = (finder.crop(*pair, 128)[0].ravel() for pair in ((photo, face), (hopper, small)))
    assert np.corrcoef(crop, small_crop)[0, 1] > 0.98  # 2 px further on it would be 0.967

    found = finder.find(photo)
    assert same_face(np.array(found.box) / 9, finder.find(hopper).box)
    again = finder.find(photo, box=found.box)  # a reported box can be given again
    assert again.box == found.box and np.abs(again.landmarks - found.landmarks).max() < 0.05
    assert "4608×5400" in refusal("box_outside", finder.find, photo, box=(4700, 0, 4800, 100))
    assert "169 are needed" in refusal("face_too_small", finder.find, photo, box=(0, 0, 100, 160))


def test_given_landmarks_are_taken_as_they_are(finder: FaceFinder, hopper: LoadedPhoto) -> None:
    landmarks = np.random.default_rng(0).random((478, 2))
    face = finder.find(hopper, landmarks=landmarks)
    np.testing.assert_array_equal(face.landmarks, landmarks)
    assert face.box == finder.find(hopper).box
    assert not face.landmarks.flags.writeable and landmarks.flags.writeable
    black = load_photo(np.zeros((200, 200, 3), np.uint8))
    both = finder.find(black, box=(10, 10, 110, 110), landmarks=landmarks.tolist())
    np.testing.assert_array_equal(both.landmarks, landmarks)


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ((1, 2, 3), "four finite numbers"),
        ((0, 0, float("nan"), 9), "four finite numbers"),
        ("somewhere", "four finite numbers"),
        ((0, 0, float("inf"), 9), "four finite numbers"),
        ((100, 0, 100, 90), "is empty"),
        ((100, 100, 20, 200), "is empty"),
    ],
)
def test_box_that_is_none(finder: FaceFinder, hopper: LoadedPhoto, box: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        finder.find(hopper, box=box)


def test_box_outside_or_tiny_or_doubled(finder: FaceFinder, hopper: LoadedPhoto) -> None:
    assert "512×600" in refusal("box_outside", finder.find, hopper, box=(600, 0, 700, 100))
    assert "64 are needed" in refusal("face_too_small", finder.find, hopper, box=(100, 100, 120, 130))
    with pytest.raises(RequestError, match="not both"):
        finder.find(hopper, box=(0, 0, 100, 100), face=0)
    assert finder.find(hopper, box=(-50, 400, 250, 700)).box == (-50.0, 400.0, 250.0, 700.0)  # partly inside is fine


@pytest.mark.parametrize(
    ("landmarks", "message"),
    [
        (np.zeros((468, 2)), r"\(468, 2\), expected \(478, 2\)"),
        (np.zeros((478, 3)), r"expected \(478, 2\)"),
        (np.full((478, 2), np.nan), "NaN or infinity"),
        (np.linspace(0, 300, 956).reshape(478, 2), "divide by its side"),
        ("smile", r"Expected shape \(478, 2\)"),
    ],
)
def test_landmarks_that_are_none(finder: FaceFinder, hopper: LoadedPhoto, landmarks: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        finder.find(hopper, landmarks=landmarks)
