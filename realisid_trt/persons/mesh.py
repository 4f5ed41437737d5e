"""MediaPipe's face mesh: the number and the names of its points, and the check of a caller's landmarks.

Indices are MediaPipe's (Apache-2.0), as ordered paths along its FACEMESH_* edges. Left and right are the person's own;
the right eye stands on the left of an unmirrored photo.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..checks import own_array
from ..errors import RequestError

NUM_LANDMARKS = 478
NUM_SKIN_LANDMARKS = 468  # the last ten are the irises

# fmt: off
JAW = (21, 162, 127, 234, 93, 132, 58, 172, 136, 150, 149, 176, 148, 152, 377, 400, 378, 379, 365, 397, 288, 361, 323,
       454, 356, 389, 251)
FACE_OVAL = (10, 338, 297, 332, 284, 251, 389, 356, 454, 323, 361, 288, 397, 365, 379, 378, 400, 377, 152, 148, 176,
             149, 150, 136, 172, 58, 132, 93, 234, 127, 162, 21, 54, 103, 67, 109)
RIGHT_BROW = ((70, 63, 105, 66, 107), (46, 53, 52, 65, 55))  # upper, lower edge
LEFT_BROW = ((300, 293, 334, 296, 336), (276, 283, 282, 295, 285))
RIGHT_EYE = (33, 7, 163, 144, 145, 153, 154, 155, 133, 173, 157, 158, 159, 160, 161, 246)
LEFT_EYE = (263, 249, 390, 373, 374, 380, 381, 382, 362, 398, 384, 385, 386, 387, 388, 466)
NOSE_RIDGE, NOSE_BASE = (168, 6, 197, 195, 5, 4), (98, 97, 2, 326, 327)
OUTER_LIPS = (61, 146, 91, 181, 84, 17, 314, 405, 321, 375, 291, 409, 270, 269, 267, 0, 37, 39, 40, 185)
INNER_LIPS = (78, 95, 88, 178, 87, 14, 317, 402, 318, 324, 308, 415, 310, 311, 312, 13, 82, 81, 80, 191)
RIGHT_IRIS, LEFT_IRIS = (468, 469, 470, 471, 472), (473, 474, 475, 476, 477)  # centre, then four points of the rim
NOSE_TIP = NOSE_RIDGE[-1]
RIGHT_EAR, LEFT_EAR = 234, 454  # where the outline of the face meets them; the mesh has no ears
# Landmarks that stand for MTCNN's five points, in its order: eyes, nose, corners of the mouth. Not the same points.
FIVE = (RIGHT_IRIS[0], LEFT_IRIS[0], NOSE_TIP, OUTER_LIPS[0], OUTER_LIPS[10])
# Landmarks that stand for the 68 points of dlib's predictor, in its order. Picked by eye: approximate.
DLIB_68 = (
    127, 234, 132, 58, 172, 136, 149, 148, 152, 377, 378, 365, 397, 288, 361, 454, 356,  # jaw, from the person's right
    70, 63, 105, 66, 107, 336, 296, 334, 293, 300,  # brows
    168, 197, 195, 4, 98, 97, 2, 326, 327,  # nose
    33, 160, 158, 133, 153, 144, 362, 385, 387, 263, 373, 380,  # eyes
    61, 40, 37, 0, 267, 270, 291, 321, 314, 17, 84, 91,  # outer rim of the lips
    78, 81, 13, 311, 308, 402, 14, 178,  # inner rim
)
# fmt: on
OUTER_EYE_CORNERS = (RIGHT_EYE[0], LEFT_EYE[0])

LEAST, MOST = -1.0, 2.0  # a chin may lie a little outside the square; values in pixels lie far outside


def checked_landmarks(landmarks: Any, what: str) -> NDArray[np.float64]:
    """Landmarks in units of the squared face box, as a (478, 2) float64 copy.

    Raises RequestError for another shape, for NaN, and for numbers far from [0, 1]: pixels would draw a black pose.
    """
    return _in_the_square(own_array(landmarks, (NUM_LANDMARKS, 2), what, np.float64), what)


def checked_keypoints(keypoints: Any, what: str) -> NDArray[np.float64]:
    """Five points in units of the squared face box, as a (5, 2) float64 copy. Raises RequestError as above."""
    return _in_the_square(own_array(keypoints, (len(FIVE), 2), what, np.float64), what)


def _in_the_square(points: NDArray[np.float64], what: str) -> NDArray[np.float64]:
    if points.min() < LEAST or points.max() > MOST:
        raise RequestError(
            f"{what} run from {points.min():.4g} to {points.max():.4g}, expected about 0 to 1 across the squared face "
            "box. Subtract its corner and divide by its side."
        )
    return points
