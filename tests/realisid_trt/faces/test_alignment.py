"""The five points of a face, and the square in which a face encoder sees it."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from PIL import Image

from realisid_trt.errors import RequestError
from realisid_trt.persons.faces import Face, FaceFinder
from realisid_trt.persons.faces.alignment import TEMPLATES, Alignment, similarity, warped
from realisid_trt.persons.faces.squares import apply
from realisid_trt.persons.photo import LoadedPhoto, load_photo
from tests.realisid_trt.faces.photographs import EXPECTED, NAMES, beside, enlarged

TEMPLATE = np.array(TEMPLATES["arcface-112"])
EXACT, WHOLE = Alignment("arcface-112", 112, whole=False), Alignment("arcface-112", 112, whole=True)


def umeyama(points: Any, template: Any) -> Any:
    """Umeyama (1991), equations 40 to 43, by a singular value decomposition."""
    means = points.mean(axis=0), template.mean(axis=0)
    centred = points - means[0]
    covariance = (template - means[1]).T @ centred / len(points)
    left, singular, right = np.linalg.svd(covariance)
    sign = np.array([1, np.sign(np.linalg.det(left) * np.linalg.det(right))])
    rotation = left @ np.diag(sign) @ right
    scale = (singular * sign).sum() / (centred**2).sum(axis=1).mean()
    return np.column_stack([scale * rotation, means[1] - scale * rotation @ means[0]])


def sampled(rgb: Any, affine: Any, size: int) -> Any:
    """Every pixel of the result by itself: where it lies in the photo, and the four pixels around, 0 beyond."""
    height, width = rgb.shape[:2]
    whole = np.vstack([affine, (0, 0, 1)])
    back = np.linalg.inv(whole)[:2]
    result = np.zeros((size, size, 3))
    for row in range(size):
        for column in range(size):
            x, y = back @ (column, row, 1)
            left, top = int(np.floor(x)), int(np.floor(y))
            for i, j in ((0, 0), (0, 1), (1, 0), (1, 1)):
                if 0 <= top + i < height and 0 <= left + j < width:
                    weight = (1 - abs(y - top - i)) * (1 - abs(x - left - j))
                    result[row, column] += weight * rgb[top + i, left + j]
    return result


@pytest.mark.parametrize("name", NAMES)
def test_the_face_has_mtcnns_points(name: str, pictures: dict[str, LoadedPhoto], finder: FaceFinder) -> None:
    face = finder.find(pictures[name])
    np.testing.assert_allclose(face.keypoints, EXPECTED[name]["mtcnn_40"]["points"][0], rtol=0, atol=0.01)
    left_eye, right_eye, nose, left_mouth, right_mouth = face.keypoints
    assert left_eye[0] < nose[0] < right_eye[0] and left_mouth[0] < right_mouth[0]
    assert left_eye[1] < nose[1] < left_mouth[1]
    with pytest.raises(ValueError, match="read-only"):
        face.keypoints[0] = 0


def test_points_of_a_turned_and_of_a_large_photo(hopper: LoadedPhoto, finder: FaceFinder) -> None:
    """They are in photo px of the photo as it was turned, and the aligned face stands upright."""
    upright, lying = finder.find(hopper), hopper.turned(3)
    found = finder.find(lying)
    assert found.turns == 1
    np.testing.assert_allclose(found.keypoints, upright.keypoints, rtol=0, atol=1e-9)
    assert np.array_equal(EXACT(lying, found), EXACT(hopper, upright))
    large = load_photo(enlarged(hopper, 9))
    assert large.scale > 2
    big = finder.find(large)
    assert np.abs(big.keypoints / 9 - upright.keypoints).max() < 0.03 * 235
    same = dataclasses.replace(big, keypoints=9 * upright.keypoints)
    aligned = [EXACT(hopper, upright).ravel(), EXACT(large, same).ravel()]
    assert np.corrcoef(aligned)[0, 1] > 0.97


def test_points_of_the_chosen_face_and_of_a_close_up(
    hopper: LoadedPhoto, astronaut: LoadedPhoto, finder: FaceFinder
) -> None:
    group = beside(hopper, astronaut)
    alone, second = finder.find(astronaut).keypoints, finder.find(group, face=1).keypoints
    np.testing.assert_allclose(second - (hopper.rgb.shape[1], 0), alone, rtol=0, atol=3)
    x0, y0, x1, y1 = (round(value) for value in finder.find(hopper).square)
    close_up = load_photo(hopper.rgb[y0 + 10 : y1 - 10, x0 + 10 : x1 - 10])
    found = finder.find(close_up)  # within a grey border of 52 px, which must not count
    np.testing.assert_allclose(
        found.keypoints + (x0 + 10, y0 + 10), finder.find(hopper).keypoints, rtol=0, atol=0.1 * 235
    )


def test_a_given_box_takes_the_meshs_points(hopper: LoadedPhoto, finder: FaceFinder) -> None:
    face = finder.find(hopper, box=(160, 110, 350, 345))
    np.testing.assert_array_equal(face.keypoints, face.points_px[[468, 473, 4, 61, 291]])
    assert face.num_found == 0
    # Other points than MTCNN's, though not far away.
    assert 0.5 < np.abs(face.keypoints - finder.find(hopper).keypoints).max() < 16


def test_closed_form_is_umeyamas(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(300):
        angle, scale = rng.uniform(-0.6, 0.6), rng.uniform(0.3, 6)
        turn = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        points = TEMPLATE @ turn.T + rng.uniform(-500, 2000, 2) + 3 * scale * rng.standard_normal((5, 2))
        found = similarity(points, TEMPLATE)
        expected = umeyama(points, TEMPLATE)
        corners = np.array([(0, 0), (112, 0), (0, 112), (112, 112)]) @ turn.T + points.mean(axis=0)
        np.testing.assert_allclose(apply(found, corners), apply(expected, corners), rtol=0, atol=1e-9)


def test_known_maps() -> None:
    np.testing.assert_allclose(similarity(TEMPLATE, TEMPLATE), [[1, 0, 0], [0, 1, 0]], atol=1e-12)
    points = [(438.5, 402.25), (584, 410.75), (509.5, 498), (447.25, 571.5), (570, 577)]
    golden = [[0.241059228, 0.008601321, -71.1088773], [-0.008601321, 0.241059228, -42.290870663]]
    np.testing.assert_allclose(similarity(points, TEMPLATE), golden, atol=1e-8)


def test_five_equal_points_are_refused() -> None:
    with pytest.raises(RequestError, match="are one point, so the face cannot be aligned. Give other landmarks"):
        similarity(np.full((5, 2), 70.25), TEMPLATE)


@pytest.mark.parametrize("name", NAMES)
def test_the_warp_reads_four_pixels_and_0_beyond(
    name: str, pictures: dict[str, LoadedPhoto], finder: FaceFinder
) -> None:
    """Within one grey level of arithmetic by hand, and OpenCV 4's grid of 1/32 px: 255/32 levels at a hard edge."""
    photo = pictures[name]
    face = finder.find(photo)
    affine = similarity(face.keypoints, TEMPLATE)
    found, expected = EXACT(photo, face), sampled(photo.rgb, affine, 112)
    assert found.shape == (112, 112, 3) and found.dtype == np.uint8
    apart = np.abs(found - expected)
    assert apart.mean() < 0.6 and apart.max() <= 1 + 255 / 32
    shifted = np.abs(found - sampled(photo.rgb, affine + [[0, 0, 0.5], [0, 0, 0]], 112))
    assert shifted.mean() > 3 * apart.mean()  # half a px is seen
    corner = np.column_stack([affine[:, :2], (56, 56)])  # the photo begins in the middle; before it is black
    found, expected = warped(photo.rgb, corner, 112), sampled(photo.rgb, corner, 112)
    assert (found[:40, :40] == 0).all() and found[60:, 60:].mean() > 20
    assert np.abs(found - expected).max() <= 1 + 255 / 32


def test_points_are_cut_to_whole_photo_px(hopper: LoadedPhoto, finder: FaceFinder) -> None:
    face = finder.find(hopper)
    cut = Face(face.box, face.landmarks, np.floor(face.keypoints), face.num_found)
    assert np.array_equal(WHOLE(hopper, face), EXACT(hopper, cut))
    assert not np.array_equal(WHOLE(hopper, face), EXACT(hopper, face))


def test_a_turned_photo_gives_the_same_face(hopper: LoadedPhoto, finder: FaceFinder) -> None:
    """Rotated by 12 degrees and reduced: the aligned face stays."""
    face = finder.find(hopper)
    picture = Image.fromarray(hopper.rgb).rotate(12, Image.Resampling.BICUBIC)
    height, width = hopper.rgb.shape[:2]
    angle = np.deg2rad(12)
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    middle = np.array([(width - 1) / 2, (height - 1) / 2])
    points = (face.keypoints - middle) @ turn.T + middle
    turned = Face(face.box, face.landmarks, points, 1)
    pair = [EXACT(hopper, face).ravel(), EXACT(load_photo(picture), turned).ravel()]
    assert np.corrcoef(pair)[0, 1] > 0.99
