"""RGB → face: its box, its landmarks, its crop with the background zeroed. This file accepts or refuses faces.

photo ─► mtcnn.py: boxes ─► choice.py: one of them ─► landmarks.py: 478 points ─► Face ─► mask.py ─► crop
                                                                                    └──► alignment.py ─► face_encoder.py

Everything a caller gives or gets is in **photo px**, pixels of the upright original. The nets work on an array of at
most 2048 px (photo.py); only this file and choice.py use both units.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray

from ...errors import EngineDamaged, RequestError
from ...files import sha256
from ..mesh import FIVE, checked_landmarks
from ..photo import LoadedPhoto
from .choice import CHOOSE_WITH, Seen, checked_box, choose, usable
from .cv_net import rebuild
from .landmarks import AttentionMesh, LandmarkModel, MeshV2, roi_from_box, roi_from_points
from .mask import FaceParser, PersonMask, hull_mask
from .mediapipe_tasks import TasksLandmarks
from .mtcnn import Detections, Mtcnn
from .squares import Box, Points, apply, as_box, crop_square, from_square, grown, squared

__all__ = ["Face", "FaceFinder", "Seen"]

LAST_RESORT_FACE_PX = 20  # searched only to report "too small" instead of "no face"
# MTCNN mistakes some upside-down portraits for upright ones (measured: 0.9991, the same photo upright 0.99999). A face
# above SURE_SCORE is accepted. Below it the photo is tried in all four positions, and the best score wins. A turned
# face replaces an upright one only if it has half the doubt, 1 - score.
SURE_SCORE, LESS_DOUBT = 0.9995, 2
# Two positions whose faces point the same way within SAME_FACE_DEG see the same face. The one with less tilt is taken
# if the difference is more than LEAST_GAIN_DEG: a tilt from five points is not more exact.
SAME_FACE_DEG, LEAST_GAIN_DEG = 25, 10
BORDER, GREY = 4, (128, 128, 128)  # the photo's longer side over the border that is added where no face was found
EYE_OUTSIDE = 0.06  # of the width of a face that the border cuts; a third cut off: 0.03, half of it: 0.11 and more
LEAST_BELIEVED = 0.5  # score of the landmark net; photographs of faces have 0.99 and more, other things under 0.1
PASSES_WITH_EYES, PASSES_FROM_BOX = 2, 3  # passes of the landmark net; without the eyes' tilt it needs one more
LEAST_FACE = 0.25  # a mask that keeps less of the mesh hull than this has missed the face


@dataclass(frozen=True, eq=False)
class Face:
    """One face of one photo.

    box:       x0, y0, x1, y1 float, photo px, as detected or given; may leave the photo.
    landmarks: (478, 2) float64 in units of `square`: 0..1 across it; may leave it. Read-only.
    keypoints: (5, 2) float64, photo px: the eye on the picture's left, the other eye, the tip of the nose, the corners
               of the mouth in the order of the eyes. MTCNN's, or the landmarks' where the box was given. Read-only.
    num_found: faces found in the photo; 0 when the box was given: nothing was detected.
    score:     the landmark net's confidence that this is a face, in [0, 1]; None for given landmarks, or a net without
               a score.
    turns:     quarter turns counter-clockwise, `numpy.rot90(photo, turns)`, after which the face is most upright.
               Photo px of this face are those of the *turned* photo; `FaceFinder.crop` turns it by itself.
    notes:     decisions, in sentences.
    """

    box: Box
    landmarks: Points
    keypoints: Points
    num_found: int
    turns: int = 0
    notes: tuple[str, ...] = ()
    score: float | None = None

    @property
    def square(self) -> Box:
        """The box squared on its longer edge about its centre, photo px; may leave the photo."""
        return as_box(squared(self.box))

    @property
    def points_px(self) -> Points:
        """The landmarks, (478, 2) photo px."""
        return from_square(self.landmarks, self.box)


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
        cls, folder: Path, *, face_landmarker: Path | None = None, files: Collection[str] | None = None
    ) -> FaceFinder:
        """The finder over `folder`, which `export.face_models` wrote.

        face_landmarker: MediaPipe's face_landmarker.task, run by the mediapipe package instead of the folder's net.
        files:           names of the folder's files that may be opened, from the engine's manifest; they decide which
                         landmark model and whether a parser is used. None: every file there.

        Raises EngineDamaged for a missing, unlisted or unreadable file, BackendError when mediapipe is asked for and
        absent, RequestError for a wrong argument.
        """
        folder = Path(folder)

        def has(name: str) -> bool:
            return (folder / name).is_file() if files is None else name in files

        mesh = MeshV2 if has(MeshV2.FILES[0]) else AttentionMesh
        needed = [*Mtcnn.FILES, PersonMask.FILE, *(mesh.FILES if face_landmarker is None else ())]
        if missing := [name for name in needed if not has(name)]:
            raise EngineDamaged(
                f"{folder / missing[0]} is missing{'' if files is None else ' from the manifest'}; faces cannot be "
                f"found without it. {rebuild(folder)}"
            )
        return cls(
            Mtcnn(folder),
            mesh(folder) if face_landmarker is None else TasksLandmarks(Path(face_landmarker)),
            PersonMask(folder),
            FaceParser(folder) if has(FaceParser.FILE) else None,
        )

    @property
    def model_id(self) -> str:
        """An id of the models: two finders with the same id give the same results."""
        nets = [*self.detector.nets, self.person_mask.net, *([self.parser.net] if self.parser else [])]
        digest = sha256(" ".join(net.sha256 for net in nets).encode())
        return f"mtcnn+{self.landmark_model.model_id}+{digest[:12]}"

    def see(self, photo: LoadedPhoto) -> Seen:
        """Every usable face of a photo, in the order of `face=`.

        A photo without a sure upright face is tried turned by 90°, 180° and 270° too.
        """
        best = self._best_turn(photo, self._detect) or self._best_turn(photo, self._detect_within_border)
        best = best or Seen(photo, 0, self._detect(photo, LAST_RESORT_FACE_PX))
        from_left = np.argsort(best.detections.boxes[:, 0])
        return Seen(best.photo, best.turns, best.detections.take(from_left))

    def _best_turn(self, photo: LoadedPhoto, detect: Callable[[LoadedPhoto], Detections]) -> Seen | None:
        """The photo turned so that its surest face is seen with the least tilt; None if no face is found."""
        seen: list[Seen] = []
        for turns in range(4):
            turned = photo.turned(turns)
            if len(detections := detect(turned)):
                seen.append(Seen(turned, turns, detections))
            if turns == 0 and seen and _score(seen[0]) >= SURE_SCORE:
                return seen[0]
        if not seen:
            return None
        surest = max(seen, key=_score)
        if seen[0].turns == 0 and 1 - _score(seen[0]) < LESS_DOUBT * (1 - _score(surest)):
            surest = seen[0]
        same = [each for each in seen if _same_way_up(each, surest)]
        return min(same, key=lambda each: abs(_tilt(each)) + (LEAST_GAIN_DEG if each is not surest else 0))

    def find(
        self,
        photo: LoadedPhoto,
        name: str = "photo",
        *,
        face: int | None = None,
        box: Sequence[float] | None = None,
        landmarks: ArrayLike | None = None,
        choose_with: str = CHOOSE_WITH,
    ) -> Face:
        """The face of a photo.

        photo:       from `load_photo`.
        name:        of the photo in error messages.
        face:        which one, counted from the left from 0, when there are several.
        box:         x0, y0, x1, y1 in photo px: skips detection (drawn characters have no MTCNN box).
        landmarks:   (478, 2) in [0, 1] of the squared box: skips the landmark net.
        choose_with: how an error tells the caller to choose among several faces.

        Without `face` there must be one face, or one of more than twice the next one's area. If the face is upright in
        the turned photo, `Face.turns` and a note say so.

        Raises PhotoError: no_face, many_faces, face_too_small, face_index, box_outside, no_landmarks; RequestError: a
        wrong argument.
        """
        given = None if landmarks is None else checked_landmarks(landmarks, f"landmarks of {name}")
        if box is not None and face is not None:
            raise RequestError(f"{name}: give face= or box=, not both: a box already says which face is meant.")
        turns, num_found, notes, keypoints = 0, 0, list[str](), None
        if box is not None:
            chosen = checked_box(box, photo, name)
            roi, num_passes = roi_from_box(np.array(chosen) / photo.scale), PASSES_FROM_BOX
        else:
            seen = self.see(photo)
            index, notes = choose(seen, face, name, choose_with)
            photo, turns, num_found = seen.photo, seen.turns, len(seen.detections)
            chosen = as_box(seen.boxes[index])
            keypoints = seen.detections.points[index] * photo.scale
            roi = roi_from_points(seen.detections.boxes[index], seen.detections.points[index])
            num_passes = PASSES_WITH_EYES
        score = None
        if given is None:
            with self._lock:
                found, score = self.landmark_model.scored(photo.rgb, roi, num_passes)
            if score is not None and score < LEAST_BELIEVED:
                notes.append(
                    f"the landmark net finds no face in this {'box' if box is not None else 'detection'} (score "
                    f"{score:.2f}). That is normal for a drawn face; for a photograph, check the box."
                )
            x0, y0, x1, _ = squared(chosen) / photo.scale
            given = np.asarray((found - (x0, y0)) / (x1 - x0), np.float64)
        if keypoints is None:
            keypoints = from_square(given[list(FIVE)], chosen)
        for points in (given, keypoints):
            points.setflags(write=False)
        return Face(chosen, given, keypoints, num_found, turns, tuple(notes), score)

    def crop(self, photo: LoadedPhoto, face: Face, size: int, margin: float = 1.0) -> tuple[NDArray[np.uint8], str]:
        """The face alone, for the ID encoder.

        photo:  as given to `find`, not turned.
        size:   side of the crop, px.
        margin: side of the crop over the side of `face.square`.

        Returns the crop (size, size, 3) uint8, zero where there is no face or no photo, and the source of its mask:
        "bisenet", "hull+person", or "hull" alone where the person net does not find a person (drawings).
        """
        if size < 1 or not (np.isfinite(margin) and margin > 0):
            raise RequestError(f"size is {size}, margin {margin}; expected a size of at least 1 px and a margin > 0.")
        photo = photo.turned(face.turns)
        square = as_box(np.array(face.square) / photo.scale)
        crop, to_crop = crop_square(photo.rgb, grown(square, margin), size)
        hull = hull_mask(apply(to_crop, face.points_px / photo.scale), size)
        mask, source = hull, "hull"
        with self._lock:
            parsed = self.parser(photo.rgb, square, to_crop, size) if self.parser else None
            if parsed is not None and _agrees(parsed, hull):
                mask, source = parsed, "bisenet"
            else:
                person = self.person_mask(photo.rgb, square, to_crop, size)
                if _agrees(person, hull):
                    mask, source = np.minimum(hull, person), "hull+person"
        return np.round(crop * mask[..., None]).astype(np.uint8), source

    def notes_on(self, mask_source: str) -> tuple[str, ...]:
        """Notes on a crop, by the source of its mask that `crop` returned."""
        how = {
            "hull+person": "mesh hull and person mask (no hair, no ears)",
            "hull": "the mesh hull alone (no hair, no ears; the person mask finds no person)",
        }
        if mask_source not in how:
            return ()
        why = "BiSeNet finds no face here" if self.parser else "for BiSeNet's parsing build with --face-parser"
        return (f"background removed by {how[mask_source]}; {why}.",)

    def _detect_within_border(self, photo: LoadedPhoto) -> Detections:
        """Faces that fill the photo or are cut by its border. The detector finds them when a border is added.

        Both eyes must be in the photo: the detector also completes half faces, which identify no one.
        """
        height, width = photo.rgb.shape[:2]
        border = max(height, width) // BORDER
        framed = cv2.copyMakeBorder(photo.rgb, border, border, border, border, cv2.BORDER_CONSTANT, value=GREY)
        with self._lock:
            found = self.detector.detect(np.asarray(framed, np.uint8))
        eyes = found.points[:, :2] - border
        outside_px = np.maximum(-eyes, eyes - (width, height)).max(axis=(1, 2), initial=0)
        seen = np.flatnonzero(outside_px <= EYE_OUTSIDE * np.ptp(found.boxes[:, ::2], axis=1))
        inside = Detections(found.boxes - border, found.scores, found.points - border).take(seen)
        return usable(inside, photo.rgb)

    def _detect(self, photo: LoadedPhoto, min_face_px: int | None = None) -> Detections:
        with self._lock:
            return usable(self.detector.detect(photo.rgb, min_face_px=min_face_px), photo.rgb)


def _score(seen: Seen) -> float:
    return float(seen.detections.scores[0])


def _tilt(seen: Seen) -> float:
    """The tilt of the surest face, from its eyes to the corners of its mouth: degrees counter-clockwise of upright."""
    points = seen.detections.points[0]
    right, down = points[3:5].mean(axis=0) - points[:2].mean(axis=0)
    return float(np.degrees(np.arctan2(right, down)))


def _same_way_up(one: Seen, other: Seen) -> bool:
    difference = (_tilt(one) - 90 * one.turns) - (_tilt(other) - 90 * other.turns)
    return abs((difference + 180) % 360 - 180) <= SAME_FACE_DEG


def _agrees(mask: NDArray[np.float32], hull: NDArray[np.float32]) -> bool:
    """Whether a mask keeps a fair share of the mesh: a net keeps almost nothing of an unfamiliar picture."""
    return float((mask * hull).sum()) >= LEAST_FACE * float(hull.sum())
