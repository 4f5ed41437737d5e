"""The choice of one face in a photo, and the error texts for photos where the choice is not clear.

All boxes here are in photo px, pixels of the upright original. `scale` is photo px per pixel of the working array: a
face is too small when it has too few working pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...checks import own_array, whole
from ...errors import PhotoError, RequestError
from ..photo import LoadedPhoto
from .mtcnn import Detections, suppress
from .squares import Box, as_box

MIN_FACE_PX = 64  # of the working array; a smaller face shows too little identity
CLEARLY_LARGER = 2.0  # times the area of the next face: then it is the one that was meant
LEAST_INSIDE = 0.5  # of the box; a face cut off further is a guess of the detector
MOST_SHARED = 0.5  # of the smaller box; blur and beards cause a second box; boxes of two people share less
LARGEST_BOX = 100.0  # side of a caller's box over the longer side of the photo
CHOOSE_WITH = "face={}"  # how a caller says which face is meant


@dataclass(frozen=True, eq=False)
class Seen:
    """The faces of one photo in the order of `face=`: from the left, in the position in which they are most upright.

    photo:      as it was turned, by `turns` quarter turns counter-clockwise.
    detections: in pixels of `photo.rgb`.
    """

    photo: LoadedPhoto
    turns: int
    detections: Detections

    @property
    def boxes(self) -> NDArray[np.float64]:
        """(n, 4) x0, y0, x1, y1, photo px of the turned photo."""
        return self.detections.boxes * self.photo.scale


def usable(detections: Detections, rgb: NDArray[np.uint8]) -> Detections:
    """The detections without faces that lie mostly outside the picture, and without second boxes around one face."""
    height, width = rgb.shape[:2]
    x0, y0, x1, y1 = detections.boxes.T
    seen = np.clip(x1, 0, width) - np.clip(x0, 0, width), np.clip(y1, 0, height) - np.clip(y0, 0, height)
    inside = detections.take(np.flatnonzero(seen[0] * seen[1] >= LEAST_INSIDE * (x1 - x0) * (y1 - y0)))
    return inside.take(suppress(inside.boxes, inside.scores, MOST_SHARED, over="smaller"))


def choose(seen: Seen, which: int | None, name: str, choose_with: str = CHOOSE_WITH) -> tuple[int, list[str]]:
    """The face that is meant.

    which:       its number, counted from the left from 0, or None: the only or the clearly largest one.
    name:        of the photo in error messages.
    choose_with: how errors tell the caller to choose, with {} for the number.

    Returns the number, and notes. Raises PhotoError: no_face, face_index, many_faces, face_too_small; RequestError
    when `which` is not a whole number.
    """
    which = checked_face(which, name)
    boxes = seen.boxes
    count = len(boxes)
    if count == 0:
        raise PhotoError(
            "no_face",
            f"{name}: no face was found, upright or turned. Use a photo that shows the whole face, at least "
            f"{MIN_FACE_PX} pixels wide; for a drawn character give its box=(x0, y0, x1, y1).",
        )
    sides = boxes[:, 2:] - boxes[:, :2]
    areas = sides.prod(axis=1)
    notes = []
    if which is not None:
        if not 0 <= which < count:
            raise PhotoError(
                "face_index",
                f"{name}: face={which} was asked for, but {count} face{'s were' if count > 1 else ' was'} found. "
                f"{f'Use face=0 to face={count - 1}, left to right.' if count > 1 else 'Leave face= out.'}",
            )
        index = which
    else:
        index = int(areas.argmax())
        runner_up = float(np.delete(areas, index).max(initial=0.0))
        if runner_up * CLEARLY_LARGER > areas[index]:
            centres = ", ".join(f"{centre:.0f}" for centre in boxes[:, [0, 2]].mean(axis=1))
            raise PhotoError(
                "many_faces",
                f"{name}: {count} faces, and none is clearly the largest. Choose one with "
                f"{choose_with.format(f'0…{count - 1}')}, left to right (centres at x = {centres} px), or crop the "
                "photo to one face.",
            )
        if count > 1:
            notes.append(f"{count} faces; the clearly largest was taken, face={index} from the left.")
    if seen.turns:
        notes.append(
            f"the photo was turned by {seen.turns * 90}° to the left, where the face is upright; its box is in pixels "
            "of the turned photo."
        )
    _check_side(float(sides[index].max()), seen.photo.scale, f"{name}: the face")
    return index, notes


def checked_face(which: object, name: str) -> int | None:
    """The number of a face as a Python int, or None. Raises RequestError for anything else."""
    number = whole(which)
    if which is not None and number is None:
        raise RequestError(f"{name}: face is {which!r}, expected a whole number, counted from the left from 0.")
    return number


def checked_box(box: Sequence[float], photo: LoadedPhoto, name: str) -> Box:
    """The caller's own box, x0, y0, x1, y1 in photo px: pixels of the upright original, however large it is.

    Raises RequestError, PhotoError(box_outside, face_too_small).
    """
    try:
        numbers = own_array(box, (4,), "box", np.float64)
    except RequestError:
        raise RequestError(
            f"{name}: box is {box!r}, expected four finite numbers x0, y0, x1, y1 in photo pixels."
        ) from None
    x0, y0, x1, y1 = checked = as_box(numbers)
    shown = f"box ({x0:g}, {y0:g}, {x1:g}, {y1:g})"
    if x1 <= x0 or y1 <= y0:
        raise RequestError(f"{name}: {shown} is empty, expected x0 < x1 and y0 < y1.")
    height, width = photo.size
    if max(x1 - x0, y1 - y0) > LARGEST_BOX * max(photo.size):
        raise RequestError(f"{name}: {shown} is many times as large as the photo, which is {width}×{height} px.")
    if x1 <= 0 or y1 <= 0 or x0 >= width or y0 >= height:
        raise PhotoError(
            "box_outside",
            f"{name}: {shown} lies outside the photo, which is {width}×{height} px. Coordinates are pixels of the "
            "upright photo, EXIF orientation applied.",
        )
    _check_side(max(x1 - x0, y1 - y0), photo.scale, f"{name}: {shown}")
    return checked


def _check_side(side_px: float, scale: float, what: str) -> None:
    """Raises PhotoError(face_too_small)."""
    if side_px >= MIN_FACE_PX * scale:
        return
    if scale == 1:
        advice = f"at least {MIN_FACE_PX} are needed. Use a larger version of the photo or another one; enlarging this "
        advice += "one does not help."
    else:
        advice = f"at least {MIN_FACE_PX * scale:.0f} are needed in a photo this large, of which the front end keeps "
        advice += f"{1 / scale:.0%}. Crop the photo around the face."
    raise PhotoError("face_too_small", f"{what} is only {side_px:.0f} pixels, {advice}")
