"""Landmarks by MediaPipe's own package: geometry and refusals with a stand-in, and the real one where it is installed.

The real package cannot be a test dependency: it replaces OpenCV's files, and no wheel holds the .task.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export.face_models import fetch_face_models
from realisid_trt.errors import BackendError, RequestError
from realisid_trt.persons.faces import FaceFinder
from realisid_trt.persons.faces.landmarks import roi_from_points
from realisid_trt.persons.photo import LoadedPhoto
from tests.realisid_trt.faces.photographs import refusal

needs_no_mediapipe = pytest.mark.skipif(importlib.util.find_spec("mediapipe") is not None, reason="mediapipe is here")
REAL_TASK = os.environ.get("FACE_LANDMARKER_TASK", "")

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


def test_task_that_is_not_there(face_models: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="face_landmarker is .*cannot be read"):
        FaceFinder.load(face_models, face_landmarker=tmp_path / "face_landmarker.task")


@needs_no_mediapipe
def test_task_without_mediapipe_names_both_ways(face_models: Path, tmp_path: Path) -> None:
    (tmp_path / "face_landmarker.task").write_bytes(b"zip")
    with pytest.raises(BackendError) as caught:
        FaceFinder.load(face_models, face_landmarker=tmp_path / "face_landmarker.task")
    assert "pip install 'realisid_trt[mediapipe]'" in str(caught.value)
    assert "build the engine with --face-landmarker face_landmarker.task" in str(caught.value)


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
def test_task_through_the_tasks_api(
    face_models: Path, hopper: LoadedPhoto, tmp_path: Path, mediapipe_stand_in: Any
) -> None:
    task = tmp_path / "face_landmarker.task"
    task.write_bytes(b"not a task")
    with pytest.raises(BackendError, match="does not accept"):
        FaceFinder.load(face_models, face_landmarker=task)
    task.write_bytes(b"a task")
    finder = FaceFinder.load(face_models, face_landmarker=task)
    assert finder.model_id.startswith("mtcnn+tasks-")
    detections = finder.detector.detect(hopper.rgb)
    roi = roi_from_points(detections.boxes[0], detections.points[0])
    for misses, frame in ((0, 1.6), (1, 2.4), (2, 1.2)):
        mediapipe_stand_in.misses = misses
        expected = np.array(roi.center) + roi.side_px * frame * np.array([-0.25, 0.25])
        np.testing.assert_allclose(finder.find(hopper).points_px[0], expected, atol=1e-6)
    mediapipe_stand_in.misses = 3
    assert "Load without face_landmarker=" in refusal("no_landmarks", finder.find, hopper)


@pytest.mark.skipif(
    not (REAL_TASK and importlib.util.find_spec("mediapipe")),
    reason="needs mediapipe 1.x and FACE_LANDMARKER_TASK=path of Google's face_landmarker.task",
)
def test_real_tasks_api_agrees_with_the_converted_net(face_models: Path, hopper: LoadedPhoto, tmp_path: Path) -> None:
    """Same net, regions of two detectors: apart by about 1 % of the distance between the eyes."""
    fetch_face_models(tmp_path, face_landmarker=Path(REAL_TASK))
    converted = FaceFinder.load(tmp_path).find(hopper).points_px
    original = FaceFinder.load(face_models, face_landmarker=Path(REAL_TASK)).find(hopper).points_px
    apart = np.linalg.norm(converted - original, axis=1) / np.linalg.norm(original[468] - original[473])
    assert apart.mean() < 0.02 and apart.max() < 0.08
