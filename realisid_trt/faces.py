"""RGB → face: its box, its landmarks, its crop with the background zeroed. Read this for what is decided and refused.

photo ─► mtcnn.py: boxes ─► one face chosen ─► landmarks.py: 478 points ─► Face ─► face_mask.py ─► crop
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .errors import RequestError
from .face_choice import Box, as_box, checked_box, checked_landmarks, choose, usable
from .face_mask import KEPT_CLASSES, FaceParser, PersonMask, crop_square, grown, hull_mask
from .landmarks import LandmarkModel, Points, Roi, load_landmark_model, roi_from_box, roi_from_points
from .mtcnn import Detections, Mtcnn
from .tasks_landmarks import TasksLandmarks

LAST_RESORT_FACE_PX = 20  # looked for only to say "too small" instead of "no face"
# MTCNN takes some portraits upside down for upright ones (measured: 0.9991, the same photo upright 0.99999). A face
# above this score is believed; below it the photo is tried in all four positions, and the best score wins.
SURE_SCORE = 0.9995
PASSES_WITH_EYES, PASSES_FROM_BOX = 2, 3  # looks of the landmark net; without the eyes' tilt it needs one more
LEAST_FACE = 0.25  # a mask that keeps less of the mesh hull than this has not seen the face


@dataclass(frozen=True, eq=False)
class Face:
    """One face of one photo.

    box:       x0, y0, x1, y1 float, photo px, as detected or given; may leave the photo.
    landmarks: (478, 2) float64 in units of `square`: 0..1 across it; may leave it. Read-only.
    num_found: faces found in the photo; 0 when the box was given and nobody looked.
    turns:     quarter turns counter-clockwise, `numpy.rot90(photo, turns)`, after which the face is most upright.
               "Photo px" of this face are those of the *turned* photo; `FaceFinder.crop` turns it by itself.
    notes:     sentences for people: what was decided.
    """

    box: Box
    landmarks: Points
    num_found: int
    turns: int = 0
    notes: tuple[str, ...] = ()

    @property
    def square(self) -> Box:
        """The box squared on its longer edge about its centre, photo px; may leave the photo."""
        x0, y0, x1, y1 = self.box
        half = max(x1 - x0, y1 - y0) / 2
        return (x0 + x1) / 2 - half, (y0 + y1) / 2 - half, (x0 + x1) / 2 + half, (y0 + y1) / 2 + half


class FaceFinder:
    """The models of an engine's faces/ folder, loaded once. Safe to share between threads: one call at a time runs."""

    def __init__(
        self, detector: Mtcnn, landmark_model: LandmarkModel, person_mask: PersonMask, parser: FaceParser | None
    ) -> None:
        self.detector = detector
        self.landmark_model = landmark_model
        self.person_mask = person_mask
        self.parser = parser
        self._lock = threading.Lock()  # cv2.dnn nets hold state

    @classmethod
    def load(
        cls,
        folder: Path,
        *,
        landmarker_task: Path | None = None,
        kept_classes: Sequence[str] = KEPT_CLASSES,
    ) -> FaceFinder:
        """The finder over `folder`, which `export.face_models` wrote.

        landmarker_task: MediaPipe's face_landmarker.task, run by the mediapipe package instead of the folder's net.
        kept_classes:    what of BiSeNet's classes counts as face, when the folder has a face_parsing.onnx.

        Raises EngineDamaged for a missing or unreadable file, BackendError when mediapipe is asked for and absent,
        RequestError for a wrong argument.
        """
        folder = Path(folder)
        parsing = folder / "face_parsing.onnx"
        return cls(
            Mtcnn(folder),
            load_landmark_model(folder) if landmarker_task is None else TasksLandmarks(Path(landmarker_task)),
            PersonMask(folder),
            FaceParser(parsing, kept_classes) if parsing.is_file() else None,
        )

    @property
    def model_id(self) -> str:
        """Names the models and what is kept of their answers: part of the key under which results are cached."""
        nets = [*self.detector.nets, self.person_mask.net, *([self.parser.net] if self.parser else [])]
        parts = [net.sha256 for net in nets] + list(self.parser.kept_classes if self.parser else ())
        return f"mtcnn+{self.landmark_model.model_id}+{hashlib.sha256(' '.join(parts).encode()).hexdigest()[:12]}"

    def find(
        self,
        rgb: NDArray[np.uint8],
        name: str = "photo",
        *,
        face: int | None = None,
        box: Sequence[float] | None = None,
        landmarks: ArrayLike | None = None,
    ) -> Face:
        """The face of a photo.

        rgb:       (H, W, 3) uint8, from `load_photo`.
        name:      what error messages call it.
        face:      which one, counted from the left from 0, when there are several.
        box:       x0, y0, x1, y1 in photo px: skips detection (drawn characters have no MTCNN box).
        landmarks: (478, 2) in [0, 1] of the squared box: skips the landmark net.

        Without `face` there must be one face, or one of more than twice the next one's area. A photo without a sure
        upright face is tried turned by 90°, 180° and 270° too; if that is better, `Face.turns` and a note say so.

        Raises PhotoError: no_face, many_faces, face_too_small, face_index, box_outside; RequestError: a wrong argument.
        """
        given = None if landmarks is None else checked_landmarks(landmarks, name)
        notes: list[str] = []
        if box is not None and face is not None:
            raise RequestError(f"{name}: give face= or box=, not both: a box already says which face is meant.")
        if box is not None:
            chosen, turns, num_found = checked_box(box, rgb, name), 0, 0
            roi, num_passes = roi_from_box(np.array(chosen)), PASSES_FROM_BOX
        else:
            with self._lock:
                rgb, turns, detections = self._detect(rgb)
            index, notes = choose(detections, face, name)
            if turns:
                notes.append(f"{name}: the face is upright in the photo turned by {turns * 90}° to the left; so used.")
            num_found = len(detections)
            chosen = as_box(detections.boxes[index])
            roi, num_passes = roi_from_points(detections.boxes[index], detections.points[index]), PASSES_WITH_EYES
        if given is None:
            given = self._landmarks(rgb, chosen, roi, num_passes)
        given.setflags(write=False)
        if self.parser is None:
            notes.append(
                f"{name}: background removed by mesh hull and person mask (no hair, no ears); for BiSeNet's parsing "
                "build with --face-parser."
            )
        return Face(chosen, given, num_found, turns, tuple(notes))

    def crop(self, rgb: NDArray[np.uint8], face: Face, size: int, margin: float = 1.0) -> tuple[NDArray[np.uint8], str]:
        """The face alone, for the ID encoder.

        rgb:    the photo given to `find`, not turned. (H, W, 3) uint8.
        size:   side of the crop, px.
        margin: side of the crop over the side of `face.square`.

        Returns the crop (size, size, 3) uint8, zero where there is no face or no photo, and what told face from
        background: "bisenet", "hull+person", or "hull" alone where the person net does not see a person (drawings).
        """
        if size < 1 or not (np.isfinite(margin) and margin > 0):
            raise RequestError(f"size is {size}, margin {margin}; expected a size of at least 1 px and a margin > 0.")
        rgb = np.ascontiguousarray(np.rot90(rgb, face.turns))
        crop, to_crop = crop_square(rgb, grown(face.square, margin), size)
        x0, y0, x1, _ = face.square
        in_photo = face.landmarks * (x1 - x0) + (x0, y0)
        hull = hull_mask(in_photo @ to_crop[:, :2].T + to_crop[:, 2], size)
        mask, source = hull, "hull"
        with self._lock:
            parsed = self.parser(rgb, face.square, to_crop, size) if self.parser else None
            if parsed is not None and _agrees(parsed, hull):
                mask, source = parsed, "bisenet"
            else:
                person = self.person_mask(rgb, face.square, to_crop, size)
                if _agrees(person, hull):
                    mask, source = np.minimum(hull, person), "hull+person"
        return np.round(crop * mask[..., None]).astype(np.uint8), source

    def _detect(self, rgb: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], int, Detections]:
        """The photo as it was turned, by how many quarter turns, and the faces in it."""
        best: tuple[NDArray[np.uint8], int, Detections] | None = None
        for turns in range(4):
            turned = np.ascontiguousarray(np.rot90(rgb, turns))
            detections = usable(self.detector.detect(turned), turned)
            if len(detections) and (best is None or detections.scores[0] > best[2].scores[0]):
                best = turned, turns, detections
            if best and best[1] == 0 and best[2].scores[0] >= SURE_SCORE:
                break
        return best or (rgb, 0, usable(self.detector.detect(rgb, min_face_px=LAST_RESORT_FACE_PX), rgb))

    def _landmarks(self, rgb: NDArray[np.uint8], box: Box, roi: Roi, num_passes: int) -> Points:
        """(478, 2) in units of the squared box."""
        with self._lock:
            points = self.landmark_model(rgb, roi, num_passes)
        x0, y0, x1, _ = Face(box, points, 0).square
        return np.asarray((points - (x0, y0)) / (x1 - x0), np.float64)


def _agrees(mask: NDArray[np.float32], hull: NDArray[np.float32]) -> bool:
    """Whether a mask keeps a fair share of the mesh: a net keeps almost nothing of what it does not know."""
    return float((mask * hull).sum()) >= LEAST_FACE * float(hull.sum())
