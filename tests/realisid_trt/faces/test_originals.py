"""The nets against MTCNN's and MediaPipe's own answers, recorded by tests/faces_oracle.py."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from realisid_trt.persons.faces import FaceFinder
from realisid_trt.persons.faces.landmarks import AttentionMesh, Roi, roi_from_landmarks, roi_from_points
from realisid_trt.persons.faces.mtcnn import Mtcnn, area_resize
from realisid_trt.persons.photo import LoadedPhoto
from tests.realisid_trt.faces.photographs import EXPECTED, NAMES

Pictures = dict[str, LoadedPhoto]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("min_face_px", [20, 40])
def test_boxes_equal_facenet_pytorchs(name: str, min_face_px: int, pictures: Pictures, face_models: Path) -> None:
    expected = EXPECTED[name][f"mtcnn_{min_face_px}"]
    found = Mtcnn(face_models, min_face_px=min_face_px, max_side_px=None).detect(pictures[name].rgb)
    np.testing.assert_allclose(found.boxes, expected["boxes"], rtol=0, atol=0.01)
    np.testing.assert_allclose(found.points, expected["points"], rtol=0, atol=0.01)
    np.testing.assert_allclose(found.scores, expected["scores"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_finder_returns_facenet_pytorchs_box(name: str, pictures: Pictures, finder: FaceFinder) -> None:
    face = finder.find(pictures[name], name)
    np.testing.assert_allclose(face.box, EXPECTED[name]["mtcnn_40"]["boxes"][0], rtol=0, atol=0.01)
    x0, y0, x1, y1 = face.square
    assert x1 - x0 == pytest.approx(y1 - y0) == pytest.approx(max(face.box[2] - face.box[0], face.box[3] - face.box[1]))
    assert (x0 + x1, y0 + y1) == pytest.approx((face.box[0] + face.box[2], face.box[1] + face.box[3]))
    assert face.num_found == 1 and face.turns == 0 and face.notes == ()


@pytest.mark.parametrize("name", NAMES)
def test_landmarks_equal_mediapipes_for_the_same_region(name: str, pictures: Pictures, face_models: Path) -> None:
    """MediaPipe's graph was given these regions, upright and tilted by 0.6 rad, then those of its own second pass."""
    model, rgb = AttentionMesh(face_models), pictures[name].rgb
    for (x, y, side, angle), look in zip(EXPECTED[name]["rois"], EXPECTED[name]["looks"], strict=True):
        first = model(rgb, Roi((x, y), side, angle), 1)
        assert first.shape == (478, 2)
        np.testing.assert_allclose(first, look["first"], rtol=0, atol=0.1)
        following = roi_from_landmarks(first)
        np.testing.assert_allclose(
            [*following.center, following.side_px, following.angle], look["next_roi"], rtol=0, atol=0.1
        )
        np.testing.assert_allclose(model(rgb, Roi((x, y), side, angle), 2), look["second"], rtol=0, atol=0.1)


@pytest.mark.parametrize("name", NAMES)
def test_found_landmarks_equal_mediapipes_second_look(name: str, pictures: Pictures, finder: FaceFinder) -> None:
    """Our boxes and points give the recorded region, and two passes give MediaPipe's landmarks."""
    detections = finder.detector.detect(pictures[name].rgb)
    roi = roi_from_points(detections.boxes[0], detections.points[0])
    np.testing.assert_allclose([*roi.center, roi.side_px, roi.angle], EXPECTED[name]["rois"][0], rtol=0, atol=0.01)
    face = finder.find(pictures[name], name)
    np.testing.assert_allclose(face.points_px, EXPECTED[name]["looks"][0]["second"], rtol=0, atol=0.1)


@pytest.mark.parametrize("name", NAMES)
def test_person_mask_equals_mediapipes(name: str, pictures: Pictures, finder: FaceFinder) -> None:
    """256×256 px of the photo, so that nothing is resampled. Recorded to five digits at every 16th px."""
    top, left = EXPECTED[name]["person"]["corner"]
    patch = pictures[name].rgb[top : top + 256, left : left + 256].astype(np.float32) / np.float32(255)
    mask = finder.person_mask.net(patch.transpose(2, 0, 1)[None])["person"].reshape(256, 256)
    np.testing.assert_allclose(mask[8::16, 8::16], EXPECTED[name]["person"]["every_16th"], rtol=0, atol=1e-3)


@pytest.mark.parametrize("size", [(7, 5), (24, 24), (3, 90)])
def test_area_resize_is_adaptive_average_pooling(size: tuple[int, int]) -> None:
    torch = pytest.importorskip("torch")
    rgb = np.random.default_rng(0).integers(0, 256, (31, 47, 3)).astype(np.uint8)
    planes = torch.from_numpy(rgb.astype(np.float64)).permute(2, 0, 1)[None]
    expected = torch.nn.functional.interpolate(planes, size, mode="area")[0].permute(1, 2, 0).numpy()
    np.testing.assert_allclose(area_resize(rgb, *size), expected, rtol=1e-6)
