"""The face front end against MTCNN's and MediaPipe's own answers, and on every kind of photo people hand in.

The recorded answers in tests/data/faces_expected.json come from tests/faces_oracle.py.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from export.face_models import fetch_face_models
from realisid_trt.errors import BackendError, EngineDamaged, PhotoError, RequestError
from realisid_trt.face_mask import CLASSES, KEPT_CLASSES, PARSING_CONTEXT, FaceParser, crop_square, grown, hull_mask
from realisid_trt.faces import Face, FaceFinder
from realisid_trt.landmarks import Roi, load_landmark_model, roi_from_landmarks, roi_from_points
from realisid_trt.mtcnn import Mtcnn, area_resize
from realisid_trt.photo import load_photo

Rgb = NDArray[np.uint8]

EXPECTED: dict[str, Any] = json.loads((Path(__file__).parent.parent / "data" / "faces_expected.json").read_text())
NAMES = ("astronaut.png", "hopper.jpg")
GREY = (120, 120, 120)


@pytest.fixture(scope="session")
def finder(face_models: Path) -> FaceFinder:
    return FaceFinder.load(face_models)


@pytest.fixture(scope="session")
def pictures(photos: Any) -> dict[str, Rgb]:
    return {name: load_photo(path) for name, path in zip(NAMES, photos, strict=True)}


@pytest.fixture(scope="session")
def astronaut(pictures: dict[str, Rgb]) -> Rgb:
    return pictures["astronaut.png"]


@pytest.fixture(scope="session")
def hopper(pictures: dict[str, Rgb]) -> Rgb:
    return pictures["hopper.jpg"]


def refusal(code: str, call: Any, *arguments: Any, **options: Any) -> str:
    with pytest.raises(PhotoError) as caught:
        call(*arguments, **options)
    assert caught.value.code == code, str(caught.value)
    return str(caught.value)


def on_grey(rgb: Rgb, scale: float, canvas: int = 400) -> Rgb:
    """The photo, scaled, in the corner of a grey picture."""
    size = (round(rgb.shape[1] * scale), round(rgb.shape[0] * scale))
    small = Image.fromarray(rgb).resize(size, Image.Resampling.LANCZOS)
    wide = Image.new("RGB", (canvas, canvas), GREY)
    wide.paste(small, (30, 30))
    return np.array(wide)


def beside(*pictures: Rgb) -> Rgb:
    height = max(len(rgb) for rgb in pictures)
    return np.hstack([np.pad(rgb, ((0, height - len(rgb)), (0, 0), (0, 0))) for rgb in pictures])


def in_photo(face: Face) -> NDArray[np.float64]:
    """Landmarks in px of the (turned) photo."""
    x0, y0, x1, _ = face.square
    return face.landmarks * (x1 - x0) + (x0, y0)


def same_face(box: Any, other: Any) -> bool:
    """Whether two boxes share more of their union than MTCNN's own suppression lets two faces share."""
    x0, y0 = np.maximum(box[:2], other[:2])
    x1, y1 = np.minimum(box[2:], other[2:])
    shared = (x1 - x0) * (y1 - y0)
    areas = [(b[2] - b[0]) * (b[3] - b[1]) for b in (box, other)]
    return bool(x1 > x0 and y1 > y0 and shared / (sum(areas) - shared) > 0.7)


# -- against the originals ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("min_face_px", [20, 40])
def test_boxes_equal_facenet_pytorchs(name: str, min_face_px: int, pictures: dict[str, Rgb], face_models: Path) -> None:
    expected = EXPECTED[name][f"mtcnn_{min_face_px}"]
    found = Mtcnn(face_models, min_face_px=min_face_px, max_side_px=None).detect(pictures[name])
    np.testing.assert_allclose(found.boxes, expected["boxes"], rtol=0, atol=0.01)
    np.testing.assert_allclose(found.points, expected["points"], rtol=0, atol=0.01)
    np.testing.assert_allclose(found.scores, expected["scores"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_finder_returns_facenet_pytorchs_box(name: str, pictures: dict[str, Rgb], finder: FaceFinder) -> None:
    face = finder.find(pictures[name], name)
    np.testing.assert_allclose(face.box, EXPECTED[name]["mtcnn_40"]["boxes"][0], rtol=0, atol=0.01)
    x0, y0, x1, y1 = face.square
    assert x1 - x0 == pytest.approx(y1 - y0) == pytest.approx(max(face.box[2] - face.box[0], face.box[3] - face.box[1]))
    assert (x0 + x1, y0 + y1) == pytest.approx((face.box[0] + face.box[2], face.box[1] + face.box[3]))
    assert face.num_found == 1 and face.turns == 0


@pytest.mark.parametrize("name", NAMES)
def test_landmarks_equal_mediapipes_for_the_same_region(name: str, pictures: dict[str, Rgb], face_models: Path) -> None:
    """MediaPipe's graph was given these regions, upright and tilted by 0.6 rad, then those of its own second look."""
    model = load_landmark_model(face_models)
    for (x, y, side, angle), look in zip(EXPECTED[name]["rois"], EXPECTED[name]["looks"], strict=True):
        first = model(pictures[name], Roi((x, y), side, angle), 1)
        assert first.shape == (478, 2)
        np.testing.assert_allclose(first, look["first"], rtol=0, atol=0.1)
        following = roi_from_landmarks(first)
        np.testing.assert_allclose(
            [*following.center, following.side_px, following.angle], look["next_roi"], rtol=0, atol=0.1
        )
        np.testing.assert_allclose(model(pictures[name], Roi((x, y), side, angle), 2), look["second"], rtol=0, atol=0.1)


@pytest.mark.parametrize("name", NAMES)
def test_found_landmarks_equal_mediapipes_second_look(name: str, pictures: dict[str, Rgb], finder: FaceFinder) -> None:
    """The whole way: our boxes and points give the recorded region, two looks give MediaPipe's landmarks."""
    detections = finder.detector.detect(pictures[name])
    roi = roi_from_points(detections.boxes[0], detections.points[0])
    np.testing.assert_allclose([*roi.center, roi.side_px, roi.angle], EXPECTED[name]["rois"][0], rtol=0, atol=0.01)
    face = finder.find(pictures[name], name)
    np.testing.assert_allclose(in_photo(face), EXPECTED[name]["looks"][0]["second"], rtol=0, atol=0.1)


@pytest.mark.parametrize("name", NAMES)
def test_person_mask_equals_mediapipes(name: str, pictures: dict[str, Rgb], finder: FaceFinder) -> None:
    """256×256 px of the photo, so that nothing is resampled. Recorded to five digits at every 16th px."""
    top, left = EXPECTED[name]["person"]["corner"]
    patch = pictures[name][top : top + 256, left : left + 256].astype(np.float32) / np.float32(255)
    mask = finder.person_mask.net(patch.transpose(2, 0, 1)[None])["person"].reshape(256, 256)
    np.testing.assert_allclose(mask[8::16, 8::16], EXPECTED[name]["person"]["every_16th"], rtol=0, atol=1e-3)


@pytest.mark.parametrize("size", [(7, 5), (24, 24), (3, 90)])
def test_area_resize_is_adaptive_average_pooling(size: tuple[int, int]) -> None:
    torch = pytest.importorskip("torch")
    rgb = np.random.default_rng(0).integers(0, 256, (31, 47, 3)).astype(np.uint8)
    planes = torch.from_numpy(rgb.astype(np.float64)).permute(2, 0, 1)[None]
    expected = torch.nn.functional.interpolate(planes, size, mode="area")[0].permute(1, 2, 0).numpy()
    np.testing.assert_allclose(area_resize(rgb, *size), expected, rtol=1e-6)


# -- every kind of photo -----------------------------------------------------------------------------------------------


def test_no_face(finder: FaceFinder) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (300, 300, 3)).astype(np.uint8)
    for rgb in (np.full((300, 400, 3), 128, np.uint8), noise, np.zeros((64, 2048, 3), np.uint8)):
        text = refusal("no_face", finder.find, rgb, "wall.jpg")
        assert text.startswith("wall.jpg: no face was found") and "box=(x0, y0, x1, y1)" in text


def test_several_faces_of_similar_size(finder: FaceFinder, astronaut: Rgb, hopper: Rgb) -> None:
    trio = beside(hopper, astronaut, hopper)
    text = refusal("many_faces", finder.find, trio, "friends.jpg")
    assert "3 faces" in text and "face=0…2, left to right" in text and "x = " in text
    centers = [np.mean(finder.find(trio, face=index).box[0::2]) for index in range(3)]
    assert centers == sorted(centers)
    second = finder.find(trio, face=1)
    assert second.num_found == 3
    assert same_face(np.array(second.box) - (512, 0, 512, 0), finder.find(astronaut).box)


def test_one_face_clearly_larger_is_taken_and_said(finder: FaceFinder, astronaut: Rgb, hopper: Rgb) -> None:
    face = finder.find(beside(astronaut, hopper), "pair.jpg")
    assert face.box[0] > 512 and face.num_found == 2
    assert any("2 faces; the clearly largest was taken, face=1" in note for note in face.notes)
    smaller = finder.find(beside(astronaut, hopper), face=0)
    assert smaller.box[2] < 512


@pytest.mark.parametrize("index", [2, -1, 7])
def test_face_that_is_not_there(finder: FaceFinder, hopper: Rgb, index: int) -> None:
    text = refusal("face_index", finder.find, beside(hopper, hopper), face=index)
    assert f"face={index}" in text and "face=0 to face=1" in text
    assert "Leave face= out" in refusal("face_index", finder.find, hopper, face=index)


@pytest.mark.parametrize("index", [1.0, "left", True])
def test_face_is_a_whole_number(finder: FaceFinder, hopper: Rgb, index: Any) -> None:
    with pytest.raises(RequestError, match="counted from the left"):
        finder.find(hopper, face=index)


@pytest.mark.parametrize(("face_px", "code"), [(8, "no_face"), (24, "face_too_small"), (50, "face_too_small")])
def test_tiny_face(finder: FaceFinder, hopper: Rgb, face_px: int, code: str) -> None:
    text = refusal(code, finder.find, on_grey(hopper, face_px / 238))
    assert "64" in text
    if code == "face_too_small":
        size = int(text.split("only ")[1].split(" pixels")[0])
        assert abs(size - face_px) <= 0.2 * face_px


def test_face_of_just_enough_pixels(finder: FaceFinder, hopper: Rgb) -> None:
    assert finder.find(on_grey(hopper, 75 / 238)).num_found == 1


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("turned", [1, 2, 3])
def test_photo_turned_by_quarters(name: str, turned: int, pictures: dict[str, Rgb], finder: FaceFinder) -> None:
    """MTCNN takes this hopper upside down for upright; the finder must not, and its crop must be the upright one."""
    upright = finder.find(pictures[name])
    rgb = np.ascontiguousarray(np.rot90(pictures[name], turned))
    face = finder.find(rgb, "turned.jpg")
    assert face.turns == 4 - turned
    assert any(f"turned by {face.turns * 90}° to the left" in note for note in face.notes)
    assert face.box == upright.box
    np.testing.assert_array_equal(face.landmarks, upright.landmarks)
    np.testing.assert_array_equal(finder.crop(rgb, face, 128)[0], finder.crop(pictures[name], upright, 128)[0])


@pytest.mark.parametrize("degrees", [35, -35])
def test_head_on_one_side(degrees: int, astronaut: Rgb, finder: FaceFinder) -> None:
    rgb = np.array(Image.fromarray(astronaut).rotate(degrees, Image.Resampling.BICUBIC, expand=True, fillcolor=GREY))
    face = finder.find(rgb)
    assert face.turns == 0
    right_eye, left_eye = in_photo(face)[[468, 473]]
    tilt = np.degrees(np.arctan2(*(left_eye - right_eye)[::-1]))
    upright = in_photo(finder.find(astronaut))[[468, 473]]
    assert tilt == pytest.approx(np.degrees(np.arctan2(*(upright[1] - upright[0])[::-1])) - degrees, abs=3)


def test_tight_crop_leaves_the_photo(finder: FaceFinder, hopper: Rgb) -> None:
    face = finder.find(hopper[115:340, 170:350].copy())
    assert face.box[0] < 0 and face.box[1] < 0 and face.box[2] > 180
    crop, _ = finder.crop(hopper[115:340, 170:350].copy(), face, 256)
    scale = 256 / (face.square[2] - face.square[0])
    outside = int(-face.square[0] * scale) - 2
    assert outside > 5 and not crop[:, :outside].any()  # zero where there is no photo


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", NAMES)
def test_half_a_face(name: str, side: str, pictures: dict[str, Rgb], finder: FaceFinder) -> None:
    middle = int(np.mean(finder.find(pictures[name]).box[0::2]))
    half = pictures[name][:, :middle] if side == "left" else pictures[name][:, middle:]
    assert "whole face" in refusal("no_face", finder.find, np.ascontiguousarray(half))


def test_bad_light_and_blur(finder: FaceFinder, hopper: Rgb) -> None:
    """Blur earns the face a second, larger box; it is still one person."""
    box = finder.find(hopper).box
    for rgb in ((hopper * 0.1).astype(np.uint8), cv2.GaussianBlur(hopper, (0, 0), 8)):
        face = finder.find(np.asarray(rgb, np.uint8))
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


def test_large_photo_is_searched_small_and_answered_large(finder: FaceFinder, hopper: Rgb) -> None:
    large = np.asarray(cv2.resize(hopper, None, fx=3, fy=3, interpolation=cv2.INTER_CUBIC), np.uint8)
    assert same_face(np.array(finder.find(large).box) / 3, finder.find(hopper).box)


# -- boxes and landmarks of the user's own -----------------------------------------------------------------------------


def test_given_box_needs_no_detector(finder: FaceFinder, hopper: Rgb) -> None:
    """A drawing has no MTCNN face, but its box is honoured; on a photo the landmarks are those of the found face."""
    found = finder.find(hopper)
    face = finder.find(hopper, box=(160, 110, 350, 345))
    assert face.box == (160.0, 110.0, 350.0, 345.0) and face.num_found == 0
    assert np.abs(in_photo(face) - in_photo(found)).max() < 0.05 * 238
    cartoon = np.full((300, 300, 3), 230, np.uint8)
    cv2.circle(cartoon, (150, 150), 90, (250, 200, 160), -1)
    for x in (115, 185):
        cv2.circle(cartoon, (x, 130), 12, (20, 20, 20), -1)
    cv2.ellipse(cartoon, (150, 195), (35, 12), 0, 0, 180, (180, 20, 20), 4)
    refusal("no_face", finder.find, cartoon)
    drawn = finder.find(cartoon, box=(60, 60, 240, 240))
    crop, source = finder.crop(cartoon, drawn, 128)
    assert source == "hull"  # the person net sees nobody, and must not leave a black picture
    assert (crop.sum(axis=2) > 0).mean() > 0.5


def test_given_landmarks_are_taken_as_they_are(finder: FaceFinder, hopper: Rgb) -> None:
    landmarks = np.random.default_rng(0).random((478, 2))
    face = finder.find(hopper, landmarks=landmarks)
    np.testing.assert_array_equal(face.landmarks, landmarks)
    assert face.box == finder.find(hopper).box
    assert not face.landmarks.flags.writeable and landmarks.flags.writeable
    both = finder.find(np.zeros((200, 200, 3), np.uint8), box=(10, 10, 110, 110), landmarks=landmarks.tolist())
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
def test_box_that_is_none(finder: FaceFinder, hopper: Rgb, box: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        finder.find(hopper, box=box)


def test_box_outside_or_tiny_or_doubled(finder: FaceFinder, hopper: Rgb) -> None:
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
        ("smile", "expected"),
    ],
)
def test_landmarks_that_are_none(finder: FaceFinder, hopper: Rgb, landmarks: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        finder.find(hopper, landmarks=landmarks)


# -- the crop ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("size", "margin"), [(224, 1.0), (112, 1.5), (336, 0.8)])
def test_crop_is_the_face_on_black(
    name: str, size: int, margin: float, pictures: dict[str, Rgb], finder: FaceFinder
) -> None:
    face = finder.find(pictures[name])
    crop, source = finder.crop(pictures[name], face, size, margin)
    assert crop.shape == (size, size, 3) and crop.dtype == np.uint8 and source == "hull+person"
    plain, to_crop = crop_square(pictures[name], grown(face.square, margin), size)
    landmarks = in_photo(face) @ to_crop[:, :2].T + to_crop[:, 2]
    x, y = np.round(landmarks[4]).astype(int)  # the tip of the nose is kept as it is
    np.testing.assert_array_equal(crop[y, x], plain[y, x])
    hull = hull_mask(landmarks, size)
    assert not crop[hull == 0].any()
    if margin > 1:
        assert not crop[0].any() and not crop[-1].any() and not crop[:, 0].any() and not crop[:, -1].any()


def test_crop_is_where_the_photo_says(finder: FaceFinder) -> None:
    """A square of whole pixels, cropped at its own size, is the photo itself; outside the photo it is zero."""
    rgb = np.random.default_rng(0).integers(0, 256, (90, 120, 3)).astype(np.uint8)
    crop, to_crop = crop_square(rgb, (20, 10, 84, 74), 64)
    np.testing.assert_array_equal(crop, rgb[10:74, 20:84])
    np.testing.assert_array_equal(to_crop, [[1, 0, -20], [0, 1, -10]])
    crop, _ = crop_square(rgb, (100, 50, 164, 114), 64)
    np.testing.assert_array_equal(crop[:40, :20], rgb[50:, 100:])
    assert not crop[40:].any() and not crop[:, 20:].any()
    edge, _ = crop_square(rgb, (100, 50, 164, 114), 64, repeat_edge=True)
    np.testing.assert_array_equal(edge[:40, 30], rgb[50:, -1])


def test_small_crop_of_a_large_photo_is_averaged_and_in_place() -> None:
    """A ramp stays the same ramp when it is reduced eight-fold, also at odd sizes; fine stripes turn grey."""
    ramp = np.repeat(np.repeat(np.linspace(0, 255, 1023)[None, :, None], 1023, 0), 3, 2).round().astype(np.uint8)
    crop, to_crop = crop_square(ramp, (100, 100, 900, 900), 100)
    expected = (np.arange(100) / to_crop[0, 0] + 100) * 255 / 1022
    np.testing.assert_allclose(crop[50, 2:-2, 0], expected[2:-2], atol=1)
    stripes = np.zeros((1024, 1024, 3), np.uint8)
    stripes[:, ::2] = 255
    crop, _ = crop_square(stripes, (0, 0, 1024, 1024), 64)
    assert np.abs(crop[8:-8, 8:-8].astype(int) - 127).max() <= 2


@pytest.mark.parametrize(("size", "margin"), [(0, 1.0), (64, 0.0), (64, float("nan"))])
def test_crop_refuses_impossible_sizes(finder: FaceFinder, hopper: Rgb, size: int, margin: float) -> None:
    with pytest.raises(RequestError, match="margin"):
        finder.crop(hopper, finder.find(hopper), size, margin)


@pytest.fixture(scope="session")
def parsing(face_models: Path, hopper: Rgb, finder: FaceFinder, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A folder with a BiSeNet of random weights, and which classes torch sees around hopper's face."""
    torch = pytest.importorskip("torch")
    from tests.export.bisenet import export_bisenet, random_bisenet

    wide, _ = crop_square(hopper, grown(finder.find(hopper).square, PARSING_CONTEXT), 512, repeat_edge=True)
    pixels = (wide.astype(np.float32) / 255 - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225)
    example = torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1)[None]
    net = random_bisenet(example)
    folder = tmp_path_factory.mktemp("with_parser")
    export_bisenet(net, folder / "user.onnx")
    description = fetch_face_models(folder, face_parser=folder / "user.onnx")
    assert description["files"]["face_parsing.onnx"]["bytes"] > 50e6
    with torch.no_grad():
        return folder, net(example)[0][0].argmax(0).numpy()


def test_bisenet_keeps_the_asked_classes(parsing: Any, hopper: Rgb, finder: FaceFinder) -> None:
    folder, classes = parsing
    parser = FaceFinder.load(folder)
    assert parser.model_id != finder.model_id
    face = parser.find(hopper)
    assert not any("hull" in note for note in face.notes)
    inside, _ = crop_square(hopper, face.square, 256)
    _, to_wide = crop_square(hopper, grown(face.square, PARSING_CONTEXT), 512)  # the frame of `classes`
    for kept in (KEPT_CLASSES, tuple(CLASSES[1:14]), ("hair", *CLASSES[4:17])):
        parser = FaceFinder.load(folder, kept_classes=kept)
        assert parser.parser is not None
        mask = parser.parser(hopper, face.square, to_wide, 512)
        expected = np.isin(classes, [CLASSES.index(name) for name in kept])
        assert (mask == expected).mean() > 0.999  # a tie of two logits may fall either way in another runtime
        crop, source = parser.crop(hopper, face, 256)
        assert source == "bisenet"
        assert set(np.unique(crop.any(axis=2))) == {False, True} and (crop <= inside).all()


def test_bisenet_that_sees_no_face_gives_way_and_says_so(parsing: Any, hopper: Rgb) -> None:
    folder, classes = parsing
    middle = classes[128:384, 128:384]
    rare = CLASSES[int(np.bincount(middle.ravel(), minlength=19).argmin())]
    finder = FaceFinder.load(folder, kept_classes=(rare,))
    assert finder.crop(hopper, finder.find(hopper), 128)[1] == "hull+person"


def test_kept_classes_are_known_names_and_part_of_the_model_id(parsing: Any) -> None:
    folder, _ = parsing
    with pytest.raises(RequestError, match="unknown: beard"):
        FaceFinder.load(folder, kept_classes=("skin", "beard"))
    with pytest.raises(RequestError, match="expected some of"):
        FaceFinder.load(folder, kept_classes=())
    assert FaceFinder.load(folder).model_id != FaceFinder.load(folder, kept_classes=("skin",)).model_id


def test_parser_with_other_outputs_is_refused(hopper: Rgb, finder: FaceFinder, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    halves = onnx.helper.make_node("MaxPool", ["image"], ["classes"], kernel_shape=[2, 2], strides=[2, 2])
    values = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, 3, side, side])
        for name, side in (("image", 512), ("classes", 256))
    ]
    graph = onnx.helper.make_graph([halves], "other", values[:1], values[1:])
    opset = onnx.helper.make_opsetid("", 17)
    onnx.save(onnx.helper.make_model(graph, opset_imports=[opset], ir_version=9), tmp_path / "face_parsing.onnx")
    parser = FaceParser(tmp_path / "face_parsing.onnx")
    with pytest.raises(EngineDamaged, match=r"\(1, 3, 256, 256\), expected \(1, 19, 512, 512\).*--face-parser"):
        parser(hopper, finder.find(hopper).square, np.eye(2, 3), 64)


# -- loading -----------------------------------------------------------------------------------------------------------

FILES = ("pnet.onnx", "rnet.onnx", "onet.onnx", "landmarks_body.onnx", "landmarks_heads.onnx", "landmarks.json",
         "person_mask.onnx")  # fmt: skip


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_missing_or_damaged_file_is_named(file: str, damage: str, face_models: Path, tmp_path: Path) -> None:
    folder = tmp_path / "faces"
    shutil.copytree(face_models, folder)
    if damage == "missing":
        (folder / file).unlink()
    else:
        (folder / file).write_bytes((folder / file).read_bytes()[:200])
    with pytest.raises(EngineDamaged, match=file) as caught:
        FaceFinder.load(folder)
    assert "python -m export.build" in str(caught.value)


def test_landmarks_json_of_another_model_is_refused(face_models: Path, tmp_path: Path) -> None:
    shutil.copytree(face_models, tmp_path / "faces")
    (tmp_path / "faces" / "landmarks.json").write_text('{"model": "v2", "size_px": 256}')
    with pytest.raises(EngineDamaged, match="about the model 'v2', expected 'attention'"):
        FaceFinder.load(tmp_path / "faces")


def test_model_id_is_stable_and_short(face_models: Path, finder: FaceFinder) -> None:
    assert finder.model_id == FaceFinder.load(face_models).model_id
    assert finder.model_id.startswith("mtcnn+attention-") and len(finder.model_id) < 64


def test_one_finder_serves_two_threads(finder: FaceFinder, pictures: dict[str, Rgb]) -> None:
    expected = {name: (finder.find(rgb), finder.crop(rgb, finder.find(rgb), 96)[0]) for name, rgb in pictures.items()}

    def work(name: str) -> bool:
        face = finder.find(pictures[name])
        crop, _ = finder.crop(pictures[name], face, 96)
        reference, reference_crop = expected[name]
        same = face.box == reference.box and np.array_equal(face.landmarks, reference.landmarks)
        return same and np.array_equal(crop, reference_crop)

    with ThreadPoolExecutor(2) as threads:
        assert all(threads.map(work, NAMES * 6))


def test_runtime_imports_no_builder_and_no_mediapipe() -> None:
    code = (
        "import sys, realisid_trt.photo, realisid_trt.faces, realisid_trt.conditions\n"
        "heavy = {'torch', 'onnx', 'mediapipe', 'transformers', 'tflite', 'diffusers', 'export'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root, env={**os.environ, "PYTHONPATH": str(root)})


# -- MediaPipe's own package -------------------------------------------------------------------------------------------

needs_no_mediapipe = pytest.mark.skipif(importlib.util.find_spec("mediapipe") is not None, reason="mediapipe is here")


def test_landmarker_task_that_is_not_there(face_models: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no such file"):
        FaceFinder.load(face_models, landmarker_task=tmp_path / "face_landmarker.task")


@needs_no_mediapipe
def test_landmarker_task_without_mediapipe_names_both_ways(face_models: Path, tmp_path: Path) -> None:
    (tmp_path / "face_landmarker.task").write_bytes(b"zip")
    with pytest.raises(BackendError) as caught:
        FaceFinder.load(face_models, landmarker_task=tmp_path / "face_landmarker.task")
    assert "pip install mediapipe" in str(caught.value)
    assert "python -m export.build --face-landmarker face_landmarker.task" in str(caught.value)


MEDIAPIPE_STAND_IN = """
class ImageFormat:
    SRGB = 1
class Image:
    def __init__(self, image_format, data):
        self.data = data
"""
TASKS_STAND_IN = """
import types
class BaseOptions:
    def __init__(self, model_asset_buffer):
        self.content = model_asset_buffer
class FaceLandmarkerOptions:
    def __init__(self, base_options, num_faces):
        self.base_options = base_options
class FaceLandmarker:
    misses = 1  # crops in which nothing is found, before one in which all points lie in a corner of the middle half
    @classmethod
    def create_from_options(cls, options):
        if options.base_options.content != b"a task":
            raise RuntimeError("Unable to open zip archive.")
        return cls()
    def detect(self, picture):
        assert picture.data.shape == (512, 512, 3)
        FaceLandmarker.misses -= 1
        point = types.SimpleNamespace(x=0.25, y=0.75)
        return types.SimpleNamespace(face_landmarks=[[point] * 478] if FaceLandmarker.misses < 0 else [])
vision = types.SimpleNamespace(FaceLandmarker=FaceLandmarker, FaceLandmarkerOptions=FaceLandmarkerOptions)
"""


@pytest.fixture
def mediapipe_stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A package `mediapipe` with the three classes of the Tasks API that are used; returns its FaceLandmarker."""
    package = tmp_path / "packages" / "mediapipe" / "tasks" / "python"
    package.mkdir(parents=True)
    (package.parents[1] / "__init__.py").write_text(MEDIAPIPE_STAND_IN)
    (package.parents[0] / "__init__.py").write_text("")
    (package / "__init__.py").write_text(TASKS_STAND_IN)
    monkeypatch.syspath_prepend(tmp_path / "packages")
    yield importlib.import_module("mediapipe.tasks.python").FaceLandmarker
    for name in ("mediapipe.tasks.python", "mediapipe.tasks", "mediapipe"):
        del sys.modules[name]


@needs_no_mediapipe
def test_landmarker_task_through_the_tasks_api(
    face_models: Path, hopper: Rgb, tmp_path: Path, mediapipe_stand_in: Any
) -> None:
    """Geometry and refusals of that branch. The real package is tried below; it cannot be a test dependency, since it
    replaces OpenCV's files, and no wheel holds the .task."""
    task = tmp_path / "face_landmarker.task"
    task.write_bytes(b"not a task")
    with pytest.raises(BackendError, match="does not accept"):
        FaceFinder.load(face_models, landmarker_task=task)
    task.write_bytes(b"a task")
    finder = FaceFinder.load(face_models, landmarker_task=task)
    assert finder.model_id.startswith("mtcnn+tasks-")
    detections = finder.detector.detect(hopper)
    roi = roi_from_points(detections.boxes[0], detections.points[0])
    for misses, frame in ((0, 1.6), (1, 2.4), (2, 1.2)):
        mediapipe_stand_in.misses = misses
        expected = np.array(roi.center) + roi.side_px * frame * np.array([-0.25, 0.25])
        np.testing.assert_allclose(in_photo(finder.find(hopper))[0], expected, atol=1e-6)
    mediapipe_stand_in.misses = 3
    assert "Load without landmarker_task=" in refusal("no_landmarks", finder.find, hopper)


REAL_TASK = os.environ.get("FACE_LANDMARKER_TASK", "")


@pytest.mark.skipif(
    not (REAL_TASK and importlib.util.find_spec("mediapipe")),
    reason="needs mediapipe 1.x and FACE_LANDMARKER_TASK=path of Google's face_landmarker.task",
)
def test_real_tasks_api_agrees_with_the_converted_net(face_models: Path, hopper: Rgb, tmp_path: Path) -> None:
    """Same net, regions of two detectors: apart by about 1 % of the distance between the eyes."""
    fetch_face_models(tmp_path, landmarker_task=Path(REAL_TASK))
    converted = in_photo(FaceFinder.load(tmp_path).find(hopper))
    original = in_photo(FaceFinder.load(face_models, landmarker_task=Path(REAL_TASK)).find(hopper))
    apart = np.linalg.norm(converted - original, axis=1) / np.linalg.norm(original[468] - original[473])
    assert apart.mean() < 0.02 and apart.max() < 0.08
