"""A face, turned and scaled so that its five points lie where a face encoder was trained to see them.

Footgun: OpenCV's own estimators of this map (`estimateAffinePartial2D`) leave out some of the five points at random and
move the face by several px. The encoder's training did not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray

from ...errors import RequestError
from ..photo import LoadedPhoto
from . import Face
from .squares import Affine

# name → x, y in a square of 112 px: the eye on the picture's left, the other eye, nose, corners of the mouth.
# deepinsight/insightface, face_align.py (MIT).
TEMPLATES = {
    "arcface-112": ((38.2946, 51.6963), (73.5318, 51.5014), (56.0252, 71.7366), (41.5493, 92.3655), (70.7299, 92.2041)),
}
TEMPLATE_PX = 112
LEAST_SPREAD_PX = 1e-3  # of the five points about their mean; five equal points have no scale


@dataclass(frozen=True)
class Alignment:
    """How a face is aligned.

    template: name in TEMPLATES. size: side of the aligned face, px. whole: the five points are cut to whole photo px
              first, as by the MTCNN that an encoder was used with.
    """

    template: str
    size: int
    whole: bool

    @classmethod
    def of(cls, face_encoder: Mapping[str, Any]) -> Alignment:
        """face_encoder: `model.face_encoder` of a manifest."""
        return cls(face_encoder["template"], face_encoder["size"], face_encoder["points"] == "mtcnn-whole")

    def __call__(self, photo: LoadedPhoto, face: Face) -> NDArray[np.uint8]:
        """(size, size, 3) uint8 RGB, 0 beyond the photo.

        photo: as given to `FaceFinder.find`, not turned. Raises RequestError if the five points of the face coincide.
        """
        photo = photo.turned(face.turns)
        keypoints = np.trunc(face.keypoints) if self.whole else face.keypoints
        template = np.array(TEMPLATES[self.template]) * (self.size / TEMPLATE_PX)
        return warped(photo.rgb, similarity(keypoints / photo.scale, template), self.size)


def similarity(points: ArrayLike, template: ArrayLike) -> Affine:
    """The rotation, scale and shift that bring points closest to a template, by least squares.

        z, t  → points and template as complex numbers x + iy, mean(z), mean(t) their means
        a     = Σ conj(z - mean(z)) (t - mean(t)) / Σ |z - mean(z)|²
        z'    = a z + mean(t) - a mean(z)

    points, template: (n, 2) float. It is Umeyama's solution (1991) without a reflection.

    Returns (2, 3). Raises RequestError if the points coincide.
    """
    x_y, wanted = np.asarray(points, np.float64), np.asarray(template, np.float64)
    z, t = x_y @ (1, 1j), wanted @ (1, 1j)
    centred = z - z.mean()
    spread = float((np.abs(centred) ** 2).sum())
    if spread < LEAST_SPREAD_PX**2:
        raise RequestError(
            "the eyes, the nose and the corners of the mouth are one point, so the face cannot be aligned. Give other "
            "landmarks, or leave them out."
        )
    a = (centred.conj() * (t - t.mean())).sum() / spread
    shift = t.mean() - a * z.mean()
    return np.array([[a.real, -a.imag, shift.real], [a.imag, a.real, shift.imag]])


def warped(rgb: NDArray[np.uint8], affine: Affine, size: int) -> NDArray[np.uint8]:
    """The picture through an affine map: four pixels are read for each, and nothing is averaged where it shrinks, as in
    the encoders' training.

    rgb: (H, W, 3) uint8. affine: (2, 3), its pixels → pixels of the result. Returns (size, size, 3) uint8, 0 beyond it.
    """
    crop = cv2.warpAffine(rgb, affine, (size, size), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT)
    return np.asarray(crop, np.uint8)
