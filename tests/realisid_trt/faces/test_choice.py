"""The choice of a face, on every kind of photo that people hand in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from realisid_trt.errors import RequestError
from realisid_trt.persons.faces import FaceFinder
from realisid_trt.persons.photo import LoadedPhoto, load_photo
from tests.realisid_trt.faces.photographs import GREY, NAMES, beside, enlarged, on_grey, refusal, same_face


def test_no_face(finder: FaceFinder) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (300, 300, 3)).astype(np.uint8)
    for rgb in (np.full((300, 400, 3), 128, np.uint8), noise, np.zeros((64, 2048, 3), np.uint8)):
        text = refusal("no_face", finder.find, load_photo(rgb), "wall.jpg")
        assert text.startswith("wall.jpg: no face was found") and "box=(x0, y0, x1, y1)" in text


def test_several_faces_of_similar_size(finder: FaceFinder, astronaut: LoadedPhoto, hopper: LoadedPhoto) -> None:
    trio = beside(hopper, astronaut, hopper)
    text = refusal("many_faces", finder.find, trio, "friends.jpg")
    assert "3 faces" in text and "face=0…2, left to right" in text and "x = " in text
    centers = [np.mean(finder.find(trio, face=index).box[0::2]) for index in range(3)]
    assert centers == sorted(centers)
    second = finder.find(trio, face=1)
    assert second.num_found == 3
    assert same_face(np.array(second.box) - (512, 0, 512, 0), finder.find(astronaut).box)


def test_one_face_clearly_larger_is_taken_and_said(
    finder: FaceFinder, astronaut: LoadedPhoto, hopper: LoadedPhoto
) -> None:
    face = finder.find(beside(astronaut, hopper), "pair.jpg")
    assert face.box[0] > 512 and face.num_found == 2
    assert face.notes == ("2 faces; the clearly largest was taken, face=1 from the left.",)
    smaller = finder.find(beside(astronaut, hopper), face=0)
    assert smaller.box[2] < 512


@pytest.mark.parametrize("index", [2, -1, 7])
def test_face_that_is_not_there(finder: FaceFinder, hopper: LoadedPhoto, index: int) -> None:
    text = refusal("face_index", finder.find, beside(hopper, hopper), face=index)
    assert f"face={index}" in text and "face=0 to face=1" in text
    assert "Leave face= out" in refusal("face_index", finder.find, hopper, face=index)


@pytest.mark.parametrize("index", [1.0, "left", True])
def test_face_is_a_whole_number(finder: FaceFinder, hopper: LoadedPhoto, index: Any) -> None:
    with pytest.raises(RequestError, match="counted from the left"):
        finder.find(hopper, face=index)
    assert finder.find(hopper, face=np.int64(0)).num_found == 1  # type: ignore[arg-type]


@pytest.mark.parametrize(("face_px", "code"), [(8, "no_face"), (24, "face_too_small"), (50, "face_too_small")])
def test_tiny_face(finder: FaceFinder, hopper: LoadedPhoto, face_px: int, code: str) -> None:
    text = refusal(code, finder.find, on_grey(hopper, face_px / 238))
    assert "64" in text
    if code == "face_too_small":
        size = int(text.split("only ")[1].split(" pixels")[0])
        assert abs(size - face_px) <= 0.2 * face_px


def test_face_of_just_enough_pixels(finder: FaceFinder, hopper: LoadedPhoto) -> None:
    assert finder.find(on_grey(hopper, 75 / 238)).num_found == 1


def test_small_face_of_a_large_photo_is_told_in_its_own_pixels(finder: FaceFinder, hopper: LoadedPhoto) -> None:
    """Of 8192 px, a quarter is kept: 200 px of the photo are 50 px for the nets."""
    large = load_photo(enlarged(on_grey(hopper, 50 / 238, canvas=2048), 4))
    text = refusal("face_too_small", finder.find, large, "crowd.jpg")
    size = int(text.split("only ")[1].split(" pixels")[0])
    assert abs(size - 200) <= 0.2 * 200
    assert "at least 256 are needed" in text and "keeps 25%. Crop the photo around the face." in text


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("turned", [1, 2, 3])
def test_photo_turned_by_quarters(name: str, turned: int, pictures: dict[str, LoadedPhoto], finder: FaceFinder) -> None:
    """MTCNN takes this hopper upside down for upright; the finder must not, and its crop must be the upright one."""
    upright = finder.find(pictures[name])
    photo = pictures[name].turned(turned)
    face = finder.find(photo, "turned.jpg")
    assert face.turns == 4 - turned
    [note] = face.notes
    assert f"turned by {face.turns * 90}° to the left" in note
    assert face.box == upright.box
    np.testing.assert_array_equal(face.landmarks, upright.landmarks)
    np.testing.assert_array_equal(finder.crop(photo, face, 128)[0], finder.crop(pictures[name], upright, 128)[0])


@pytest.mark.parametrize("degrees", [35, -35])
def test_head_on_one_side(degrees: int, astronaut: LoadedPhoto, finder: FaceFinder) -> None:
    picture = Image.fromarray(astronaut.rgb)
    face = finder.find(load_photo(picture.rotate(degrees, Image.Resampling.BICUBIC, expand=True, fillcolor=GREY)))
    assert face.turns == 0
    right_eye, left_eye = face.points_px[[468, 473]]
    tilt = np.degrees(np.arctan2(*(left_eye - right_eye)[::-1]))
    upright = finder.find(astronaut).points_px[[468, 473]]
    assert tilt == pytest.approx(np.degrees(np.arctan2(*(upright[1] - upright[0])[::-1])) - degrees, abs=3)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", NAMES)
def test_half_a_face(name: str, side: str, pictures: dict[str, LoadedPhoto], finder: FaceFinder) -> None:
    rgb = pictures[name].rgb
    middle = int(np.mean(finder.find(pictures[name]).box[0::2]))
    half = rgb[:, :middle] if side == "left" else rgb[:, middle:]
    assert "whole face" in refusal("no_face", finder.find, load_photo(half))


def test_bad_light_and_blur(finder: FaceFinder, hopper: LoadedPhoto) -> None:
    """Blur earns the face a second, larger box; it is still one person."""
    box = finder.find(hopper).box
    for rgb in ((hopper.rgb * 0.1).astype(np.uint8), cv2.GaussianBlur(hopper.rgb, (0, 0), 8)):
        face = finder.find(load_photo(np.asarray(rgb, np.uint8)))
        assert face.num_found == 1
        assert same_face(face.box, box)


def test_grey_and_turned_by_exif_photos_go_all_the_way(finder: FaceFinder, photos: Any, tmp_path: Path) -> None:
    upright = Image.open(photos.hopper).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "phone.png", exif=exif)
    assert finder.find(load_photo(tmp_path / "phone.png")).box == finder.find(load_photo(upright)).box
    grey = np.array(upright.convert("L")).astype(np.uint16) * 257
    Image.fromarray(grey).save(tmp_path / "grey16.png")
    upright.convert("L").save(tmp_path / "grey.png")
    assert finder.find(load_photo(tmp_path / "grey16.png")).box == finder.find(load_photo(tmp_path / "grey.png")).box


def test_large_photo_is_searched_small_and_answered_large(finder: FaceFinder, hopper: LoadedPhoto) -> None:
    large = load_photo(enlarged(hopper, 3))
    assert same_face(np.array(finder.find(large).box) / 3, finder.find(hopper).box)


def test_faces_are_seen_in_the_order_of_their_numbers(
    finder: FaceFinder, astronaut: LoadedPhoto, hopper: LoadedPhoto
) -> None:
    """Also when the photo lies on its side, and in photo px of a photo that had to be reduced."""
    group = beside(hopper, astronaut, hopper)
    seen = finder.see(group)
    np.testing.assert_array_equal(seen.boxes, [finder.find(group, face=index).box for index in range(3)])
    lying = finder.see(load_photo(enlarged(group.turned(1), 3)))
    assert lying.turns == 3 and lying.photo.size == (1800, 4608)
    assert all(same_face(box / 3, other) for box, other in zip(lying.boxes, seen.boxes, strict=True))
