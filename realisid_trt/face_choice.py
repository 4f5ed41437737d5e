"""Which face of a photo is meant, and the sentences for every case where that cannot be said."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .errors import PhotoError, RequestError
from .landmarks import NUM_LANDMARKS, Points
from .mtcnn import Detections, suppress

Box = tuple[float, float, float, float]  # x0, y0, x1, y1 in photo px

MIN_FACE_PX = 64  # a smaller face has no identity to speak of
CLEARLY_LARGER = 2.0  # times the area of the next face: then it is the one that was meant
LEAST_INSIDE = 0.5  # of the box; a face cut off further is a guess of the detector
MOST_SHARED = 0.5  # of the smaller box; blur and beards earn a face a second box, people's cheeks share less


def usable(detections: Detections, rgb: NDArray[np.uint8]) -> Detections:
    """The detections without faces that lie mostly outside the photo, and without second boxes around one face."""
    height, width = rgb.shape[:2]
    x0, y0, x1, y1 = detections.boxes.T
    seen = np.clip(x1, 0, width) - np.clip(x0, 0, width), np.clip(y1, 0, height) - np.clip(y0, 0, height)
    inside = np.flatnonzero(seen[0] * seen[1] >= LEAST_INSIDE * (x1 - x0) * (y1 - y0))
    boxes, scores = detections.boxes[inside], detections.scores[inside]
    kept = inside[suppress(boxes, scores, MOST_SHARED, over="smaller")]
    return Detections(detections.boxes[kept], detections.scores[kept], detections.points[kept])


def choose(detections: Detections, which: int | None, name: str) -> tuple[int, list[str]]:
    """The face that is meant. which: its number, counted from the left from 0, or None.

    Returns its index in `detections`, and notes. Raises PhotoError: no_face, face_index, many_faces, face_too_small;
    RequestError when `which` is no whole number.
    """
    count = len(detections)
    if count == 0:
        raise PhotoError(
            "no_face",
            f"{name}: no face was found, upright or turned. Use a photo in which the whole face is seen and at least "
            f"{MIN_FACE_PX} pixels wide; for a drawn character give its box=(x0, y0, x1, y1).",
        )
    boxes = detections.boxes
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    from_left = np.argsort(boxes[:, 0])
    notes = []
    if which is not None:
        if isinstance(which, bool) or not isinstance(which, (int, np.integer)):
            raise RequestError(f"{name}: face is {which!r}, expected a whole number, counted from the left from 0.")
        if not 0 <= which < count:
            raise PhotoError(
                "face_index",
                f"{name}: face={which} was asked for, but {count} face{'s were' if count > 1 else ' was'} found. "
                f"{f'Use face=0 to face={count - 1}, left to right.' if count > 1 else 'Leave face= out.'}",
            )
        index = int(from_left[which])
    else:
        index = int(areas.argmax())
        runner_up = float(np.delete(areas, index).max(initial=0.0))
        if runner_up * CLEARLY_LARGER > areas[index]:
            raise PhotoError(
                "many_faces",
                f"{name}: {count} faces, and none is clearly the largest. Choose one with face=0…{count - 1}, left to "
                f"right (centres at x = {', '.join(f'{boxes[i, [0, 2]].mean():.0f}' for i in from_left)} px), or crop "
                "the photo to one face.",
            )
        if count > 1:
            place = int(np.flatnonzero(from_left == index)[0])
            notes.append(f"{name}: {count} faces; the clearly largest was taken, face={place} from the left.")
    side = float(max(boxes[index, 2] - boxes[index, 0], boxes[index, 3] - boxes[index, 1]))
    if side < MIN_FACE_PX:
        raise PhotoError(
            "face_too_small",
            f"{name}: the face is only {side:.0f} pixels, at least {MIN_FACE_PX} are needed. Use a larger version of "
            "the photo or another one; enlarging this one does not help.",
        )
    return index, notes


def checked_box(box: Sequence[float], rgb: NDArray[np.uint8], name: str) -> Box:
    """The user's own box, x0, y0, x1, y1 in photo px. Raises RequestError, PhotoError(box_outside, face_too_small)."""
    try:
        numbers = np.asarray(box, np.float64)
    except (TypeError, ValueError):
        numbers = np.zeros(0)
    if numbers.shape != (4,) or not np.isfinite(numbers).all():
        raise RequestError(f"{name}: box is {box!r}, expected four finite numbers x0, y0, x1, y1 in photo pixels.")
    x0, y0, x1, y1 = as_box(numbers)
    if x1 <= x0 or y1 <= y0:
        raise RequestError(f"{name}: box ({x0:g}, {y0:g}, {x1:g}, {y1:g}) is empty, expected x0 < x1 and y0 < y1.")
    height, width = rgb.shape[:2]
    if x1 <= 0 or y1 <= 0 or x0 >= width or y0 >= height:
        raise PhotoError(
            "box_outside",
            f"{name}: box ({x0:g}, {y0:g}, {x1:g}, {y1:g}) lies outside the photo, which is {width}×{height} px. "
            "Coordinates are pixels of the upright photo, reduced to at most 2048 px.",
        )
    if max(x1 - x0, y1 - y0) < MIN_FACE_PX:
        raise PhotoError(
            "face_too_small",
            f"{name}: box ({x0:g}, {y0:g}, {x1:g}, {y1:g}) is only {max(x1 - x0, y1 - y0):g} pixels, at least "
            f"{MIN_FACE_PX} are needed. Use a larger version of the photo.",
        )
    return x0, y0, x1, y1


def checked_landmarks(landmarks: ArrayLike, name: str) -> Points:
    """The user's own landmarks as a (478, 2) float64 copy. Raises RequestError."""
    try:
        points = np.array(landmarks, np.float64)
    except (TypeError, ValueError):
        points = np.zeros(0)
    if points.shape != (NUM_LANDMARKS, 2):
        raise RequestError(
            f"{name}: landmarks are {np.shape(points)}, expected ({NUM_LANDMARKS}, 2): x and y of MediaPipe's "
            f"{NUM_LANDMARKS} points."
        )
    if not np.isfinite(points).all():
        raise RequestError(f"{name}: landmarks hold NaN or infinity. Leave them out, and they are found in the photo.")
    if points.min() < -1 or points.max() > 2:  # a chin may leave the square a little, pixels leave it far
        raise RequestError(
            f"{name}: landmarks run from {points.min():.4g} to {points.max():.4g}, expected about 0 to 1 across the "
            "squared face box. Subtract its corner and divide by its side."
        )
    return points


def as_box(numbers: NDArray[np.floating]) -> Box:
    """(4,) → four floats."""
    x0, y0, x1, y1 = (float(number) for number in numbers)
    return x0, y0, x1, y1
