"""The networks' inputs for a person: pixels, drawings and masks, by their properties."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from realisid_trt.config import OPTIONS
from realisid_trt.errors import BoxError, RequestError, ShapeError
from realisid_trt.persons.conditions import CYAN, GREEN, POSE_STYLES, YELLOW, id_pixels, location_mask, pose_image
from realisid_trt.persons.mesh import JAW, LEFT_EYE, LEFT_IRIS, RIGHT_EYE, RIGHT_IRIS

Landmarks = NDArray[np.float64]
EXPECTED: dict[str, Any] = json.loads((Path(__file__).parent.parent / "data" / "faces_expected.json").read_text())


@pytest.fixture(params=["astronaut.png", "hopper.jpg"])
def landmarks(request: pytest.FixtureRequest) -> Landmarks:
    """MediaPipe's landmarks of a photograph, in units of the squared MTCNN box."""
    x0, y0, x1, y1 = EXPECTED[request.param]["mtcnn_40"]["boxes"][0]
    side = max(x1 - x0, y1 - y0)
    corner = np.array([x0 + x1 - side, y0 + y1 - side]) / 2
    return np.asarray((np.array(EXPECTED[request.param]["looks"][0]["second"]) - corner) / side, np.float64)


def shows(drawing: NDArray[np.float32], color: tuple[int, int, int]) -> NDArray[np.bool_]:
    """Where a drawing has exactly this colour."""
    return np.asarray(np.all(np.round(drawing * 255).transpose(1, 2, 0) == color, axis=2), np.bool_)


def test_id_pixels_is_the_feature_extractors_formula() -> None:
    crop = np.random.default_rng(0).integers(0, 256, (7, 7, 3)).astype(np.uint8)
    mean, std = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
    pixels = id_pixels(crop, mean, std)
    assert pixels.shape == (3, 7, 7) and pixels.dtype == np.float32 and pixels.flags.c_contiguous
    expected = (crop.astype(np.float64) / 255 - mean) / std
    np.testing.assert_allclose(pixels, expected.transpose(2, 0, 1), rtol=0, atol=4e-7 / min(std))
    black = id_pixels(np.zeros((4, 4, 3), np.uint8), mean, std)
    np.testing.assert_allclose(black[:, 0, 0], -np.array(mean) / std, rtol=1e-6)


@pytest.mark.parametrize("shape", [(7, 5, 3), (7, 7), (7, 7, 4)])
def test_id_pixels_refuses_other_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match=r"expected \(S, S, 3\) uint8"):
        id_pixels(np.zeros(shape, np.uint8), (0, 0, 0), (1, 1, 1))
    with pytest.raises(ShapeError, match="float32"):
        id_pixels(np.zeros((7, 7, 3), np.float32), (0, 0, 0), (1, 1, 1))


def test_every_style_of_the_config_can_be_drawn(landmarks: Landmarks) -> None:
    assert set(OPTIONS["pose_style"]) == set(POSE_STYLES)
    with pytest.raises(RequestError, match="realisid-v1"):
        pose_image(landmarks, 64, "realisid-v9")


@pytest.mark.parametrize("size", [64, 512, 1024, 333])
def test_drawing_is_lines_on_black(landmarks: Landmarks, size: int) -> None:
    drawing = pose_image(landmarks, size)
    assert drawing.shape == (3, size, size) and drawing.dtype == np.float32 and drawing.flags.c_contiguous
    assert drawing.min() == 0 and drawing.max() == 1
    empty = (drawing == 0).all(axis=0)
    assert empty.mean() > (0.8 if size > 64 else 0.6)
    np.testing.assert_array_equal(drawing, pose_image(landmarks.tolist(), size))  # the same call, the same drawing


def test_each_part_has_its_colour_and_each_side_its_own(landmarks: Landmarks) -> None:
    drawing = pose_image(landmarks, 512)
    for line in POSE_STYLES["realisid-v1"].lines:
        places = np.round(landmarks[list(line.path)] * 512).astype(int)
        near = [shows(drawing, line.color)[max(y - 2, 0) : y + 3, max(x - 2, 0) : x + 3].any() for x, y in places]
        inside = ((places >= 2) & (places < 510)).all(axis=1)
        assert np.array(near)[inside].mean() > 0.9  # corners lie under the ends of other lines
    right = landmarks[list(RIGHT_EYE)].mean(axis=0) * 512
    left = landmarks[list(LEFT_EYE)].mean(axis=0) * 512
    assert right[0] < left[0]  # the person's right stands on the left of an unmirrored photo
    assert np.nonzero(shows(drawing, CYAN))[1].max() < np.nonzero(shows(drawing, GREEN))[1].min()


def test_mirrored_face_is_another_picture(landmarks: Landmarks) -> None:
    """Even for a perfectly symmetric face: sides are told by colour, not by shape."""
    mirrored = landmarks * (-1, 1) + (1, 0)
    assert np.abs(pose_image(mirrored, 256) - pose_image(landmarks, 256)[..., ::-1]).max() > 0.5
    right_eye = shows(pose_image(mirrored, 512), CYAN)  # keeps its colour and changes sides
    assert np.nonzero(right_eye)[1].min() > 256


def test_iris_is_seen_in_open_eyes_only(landmarks: Landmarks) -> None:
    drawing = pose_image(landmarks, 512)
    iris = shows(drawing, YELLOW)
    for center in (RIGHT_IRIS[0], LEFT_IRIS[0]):
        x, y = np.round(landmarks[center] * 512).astype(int)
        assert iris[y, x]
    closed = landmarks.copy()
    for eye in (RIGHT_EYE, LEFT_EYE):
        corner, other = closed[eye[0]], closed[eye[8]]
        share = ((closed[list(eye)] - corner) @ (other - corner) / np.sum((other - corner) ** 2))[:, None]
        closed[list(eye)] = corner + share * (other - corner)  # both lids on the line between the corners
    assert not shows(pose_image(closed, 512), YELLOW).any()
    shut_right = landmarks.copy()
    shut_right[list(RIGHT_EYE)] = closed[list(RIGHT_EYE)]
    wink = shows(pose_image(shut_right, 512), YELLOW)
    assert wink.any() and np.nonzero(wink)[1].min() > 256


def test_gaze_moves_the_iris(landmarks: Landmarks) -> None:
    looking = landmarks.copy()
    looking[list(RIGHT_IRIS)] += (0.02, 0)
    before, after = (np.nonzero(shows(pose_image(points, 512), YELLOW)[:, :256])[1] for points in (landmarks, looking))
    assert after.mean() > before.mean() + 2


def test_drawing_scales_with_its_size(landmarks: Landmarks) -> None:
    """Twice the size is the same picture at twice the resolution: line widths grow along, by whole pixels."""
    small, large = pose_image(landmarks, 512), pose_image(landmarks, 1024)
    halved = large.reshape(3, 512, 2, 512, 2).mean(axis=(2, 4))
    assert np.abs(halved - small).mean() < 0.01
    assert large.mean() == pytest.approx(small.mean(), rel=0.25)  # unscaled lines would be half of that


def test_shifted_landmarks_are_a_shifted_drawing(landmarks: Landmarks) -> None:
    """For whole pixels, away from the edge, where lines are cut."""
    centered = (landmarks - landmarks.mean(axis=0)) * 0.5 + 0.5
    shifted = pose_image(centered + (16 / 256, 8 / 256), 256)
    np.testing.assert_array_equal(np.roll(pose_image(centered, 256), (8, 16), axis=(1, 2)), shifted)


def test_landmarks_may_leave_the_picture(landmarks: Landmarks) -> None:
    assert pose_image(landmarks + 5, 256).max() == 0
    assert pose_image(landmarks + 1e9, 256).max() == 0  # no overflow brings them back
    half = pose_image(landmarks - (0.5, 0), 256)
    assert half.max() == 1 and landmarks[JAW[0], 0] < 0.5


@pytest.mark.parametrize("wrong", [np.zeros((468, 2)), np.zeros((478, 3)), np.full((478, 2), np.inf)])
def test_other_landmarks_are_refused(wrong: Landmarks) -> None:
    with pytest.raises(ShapeError, match=r"expected \(478, 2\) finite"):
        pose_image(wrong, 64)


@pytest.mark.parametrize("box", [(0, 0, 64, 48), (8, 16, 40, 48), (63, 47, 64, 48)])
def test_location_mask_is_the_box(box: tuple[int, int, int, int]) -> None:
    mask = location_mask(box, 48, 64)
    assert mask.shape == (1, 48, 64) and mask.dtype == np.float32 and set(np.unique(mask)) <= {0.0, 1.0}
    x0, y0, x1, y1 = box
    rows, columns = np.nonzero(mask[0])
    assert (rows.min(), rows.max() + 1, columns.min(), columns.max() + 1) == (y0, y1, x0, x1)
    assert mask.sum() == (x1 - x0) * (y1 - y0)


@pytest.mark.parametrize("box", [(-1, 0, 8, 8), (0, 0, 65, 8), (8, 8, 8, 16), (0, 40, 8, 49)])
def test_location_mask_refuses_boxes_outside(box: tuple[int, int, int, int]) -> None:
    with pytest.raises(BoxError, match="64×48"):
        location_mask(box, 48, 64)
