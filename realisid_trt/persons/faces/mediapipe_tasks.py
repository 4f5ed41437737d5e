"""Landmarks by the `mediapipe` package's own FaceLandmarker, for users who have it and its face_landmarker.task.

Only this file imports that package, and only on request. The region still comes from MTCNN: MediaPipe's own detector
misses small and grouped faces that MTCNN finds, so it gets one face at a time.
(An "Exception ignored in FaceLandmarker.__del__" when Python exits is mediapipe's own and harmless.)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import BackendError, PhotoError, RequestError
from ...files import sha256
from ..mesh import NUM_LANDMARKS
from .landmarks import LandmarkModel, Roi
from .squares import Points, crop_square

CROP_PX = 512
FRAMES = (1.6, 2.4, 1.2)  # sides of the crops that are tried in turn, over the side of the region


class TasksLandmarks(LandmarkModel):
    """face_landmarker.task through the Tasks API: same call as the other landmark models."""

    def __init__(self, face_landmarker: Path) -> None:
        """Raises RequestError if the file is missing, BackendError if the package is missing or refuses the file."""
        convert = f"or build the engine with --face-landmarker {face_landmarker.name}, which converts it once."
        try:
            content = face_landmarker.read_bytes()
        except OSError as error:
            raise RequestError(
                f"face_landmarker is {face_landmarker}, which cannot be read ({error.strerror}). Correct the path."
            ) from error
        try:
            import mediapipe
            import mediapipe.tasks.python as tasks
        except ImportError as error:
            raise BackendError(
                f"face_landmarker needs the mediapipe package, which cannot be imported here ({error}). "
                f"Either `pip install 'realisid_trt[mediapipe]'`, {convert}"
            ) from error
        self._mediapipe: Any = mediapipe
        self._id = f"tasks-{sha256(content)[:8]}"
        try:
            options = tasks.vision.FaceLandmarkerOptions(
                base_options=tasks.BaseOptions(model_asset_buffer=content), num_faces=1
            )
            self._landmarker: Any = tasks.vision.FaceLandmarker.create_from_options(options)
        except (RuntimeError, ValueError, OSError) as error:
            raise BackendError(
                f"mediapipe {getattr(mediapipe, '__version__', '')} does not accept {face_landmarker} ({error}). "
                f"Use Google's face_landmarker.task with it, {convert}"
            ) from error

    @property
    def model_id(self) -> str:
        return self._id

    def scored(self, rgb: NDArray[np.uint8], roi: Roi, num_passes: int = 2) -> tuple[Points, float | None]:
        """The landmarks without a score: MediaPipe reports only faces that it is sure of."""
        return self(rgb, roi, num_passes), None

    def __call__(self, rgb: NDArray[np.uint8], roi: Roi, num_passes: int = 2) -> Points:
        """As the other models; MediaPipe looks for the face in the crop itself, so num_passes has no effect.

        Raises PhotoError(no_landmarks) when it finds no face in the crop.
        """
        for frame in FRAMES:
            half = roi.side_px * frame / 2
            x, y = roi.center
            crop, to_crop = crop_square(rgb, (x - half, y - half, x + half, y + half), CROP_PX)
            picture = self._mediapipe.Image(image_format=self._mediapipe.ImageFormat.SRGB, data=crop)
            faces = self._landmarker.detect(picture).face_landmarks
            if faces:
                in_crop = np.array([(point.x, point.y) for point in faces[0][:NUM_LANDMARKS]]) * CROP_PX
                return np.asarray((in_crop - to_crop[:, 2]) / to_crop[0, 0], np.float64)
        raise PhotoError(
            "no_landmarks",
            "MediaPipe's FaceLandmarker finds no face where MTCNN does. Load without face_landmarker=, use a clearer "
            "photo, or give landmarks= of your own.",
        )
