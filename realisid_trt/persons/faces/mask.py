"""The mask of the face in a crop: BiSeNet's classes if the user has that net, else mesh hull ∧ person.

In a profile the hull alone includes a wedge of background; the person mask alone includes the whole head and the
neighbours. Their product avoids both. Compared with BiSeNet it lacks hair, and keeps a hand in front of the face.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from ...errors import EngineDamaged
from ..mesh import NUM_SKIN_LANDMARKS
from .cv_net import CvNet, Floats, rebuild
from .squares import Affine, Points, crop_square, grown, inverse

# The 19 classes of CelebAMask-HQ in the order of the public BiSeNet face-parsing weights.
CLASSES = (
    "background", "skin", "left_brow", "right_brow", "left_eye", "right_eye", "glasses", "left_ear", "right_ear",
    "earring", "nose", "mouth", "upper_lip", "lower_lip", "neck", "necklace", "cloth", "hair", "hat",
)  # fmt: skip
KEPT_CLASSES = (
    "skin", "left_brow", "right_brow", "left_eye", "right_eye", "glasses", "nose", "mouth", "upper_lip", "lower_lip",
)  # fmt: skip

HULL_GROWTH = 1.04  # the mesh ends a little inside the face
FEATHER = 1 / 256  # standard deviation of the hull's soft edge over the side of the crop
PERSON_CONTEXT, PERSON_SIZE = 3.0, 256  # the person net sees 3 × the face, in 256 × 256 px
PARSING_CONTEXT, PARSING_SIZE = 2.0, 512  # CelebAMask-HQ's framing: a face fills half of the picture


def hull_mask(landmarks: Points, size: int) -> Floats:
    """Convex hull of the mesh, 4 % larger, with a soft edge.

    landmarks: (478, 2) in crop px. Convex because the face oval alone cuts nose and lips off a profile.
    Returns (size, size) float32 from 0 to 1.
    """
    hull = cv2.convexHull(landmarks[:NUM_SKIN_LANDMARKS].astype(np.float32))[:, 0].astype(np.float64)
    center = hull.mean(axis=0)
    corners = np.round((center + (hull - center) * HULL_GROWTH) * 16).astype(np.int32)  # 4 bits of sub-pixel
    mask = np.zeros((size, size), np.uint8)
    cv2.fillPoly(mask, [corners], 255, cv2.LINE_AA, 4)
    return np.asarray(cv2.GaussianBlur(mask.astype(np.float32) / 255, (0, 0), max(size * FEATHER, 0.3)), np.float32)


class PersonMask:
    """MediaPipe's selfie segmentation: where people are, softly."""

    FILE = "person_mask.onnx"

    def __init__(self, folder: Path) -> None:
        """Raises EngineDamaged for a missing or unreadable file."""
        self.net = CvNet(folder / self.FILE)

    def __call__(self, rgb: NDArray[np.uint8], square: Sequence[float], to_crop: Affine, size: int) -> Floats:
        """The mask of the people in a crop.

        rgb:     (H, W, 3) uint8.
        square:  of the face, in pixels of `rgb`.
        to_crop: pixels of `rgb` → pixels of the crop.

        Returns (size, size) float32 from 0 to 1.
        """
        wide, to_wide = crop_square(rgb, grown(square, PERSON_CONTEXT), PERSON_SIZE, repeat_edge=True)
        person = self.net(_planes(wide))["person"].reshape(PERSON_SIZE, PERSON_SIZE)
        # The net is uncertain in a wide band at the outline; stretching its middle gives an edge of a few pixels.
        return np.asarray(np.clip(_carry(person, to_wide, to_crop, size) * 1.6 - 0.3, 0, 1), np.float32)


class FaceParser:
    """BiSeNet face parsing from the user's own ONNX file: (1, 3, 512, 512) RGB → logits of the 19 classes."""

    FILE = "face_parsing.onnx"

    def __init__(self, folder: Path) -> None:
        """Raises EngineDamaged for a missing or unreadable file."""
        self.kept = [CLASSES.index(kept) for kept in KEPT_CLASSES]
        self.net = CvNet(folder / self.FILE)

    def __call__(self, rgb: NDArray[np.uint8], square: Sequence[float], to_crop: Affine, size: int) -> Floats:
        """As PersonMask. Raises EngineDamaged when the net's output is not that of a face parser."""
        wide, to_wide = crop_square(rgb, grown(square, PARSING_CONTEXT), PARSING_SIZE, repeat_edge=True)
        mean = np.array([0.485, 0.456, 0.406], np.float32).reshape(3, 1, 1)  # ImageNet's, as BiSeNet is trained
        deviation = np.array([0.229, 0.224, 0.225], np.float32).reshape(3, 1, 1)
        logits = next(iter(self.net((_planes(wide) - mean) / deviation).values()))
        if logits.shape != (1, len(CLASSES), PARSING_SIZE, PARSING_SIZE):
            raise EngineDamaged(
                f"{self.net.path}: its first output is {logits.shape}, expected "
                f"(1, {len(CLASSES)}, {PARSING_SIZE}, {PARSING_SIZE}). Export BiSeNet with that output first. "
                f"{rebuild(self.net.path.parent)} --face-parser FILE.onnx"
            )
        is_face = np.isin(logits[0].argmax(axis=0), self.kept).astype(np.float32)
        return np.clip(_carry(is_face, to_wide, to_crop, size), 0, 1)


def _planes(rgb: NDArray[np.uint8]) -> Floats:
    """(h, w, 3) uint8 → (1, 3, h, w) float32 from 0 to 1."""
    return np.asarray(rgb.astype(np.float32) / 255, np.float32).transpose(2, 0, 1)[None]


def _carry(mask: Floats, to_mask: Affine, to_crop: Affine, size: int) -> Floats:
    """A mask made in one frame, resampled in another. Both affines start from pixels of the photo."""
    crop_to_mask = to_mask @ np.vstack([inverse(to_crop), [0, 0, 1]])
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return np.asarray(cv2.warpAffine(mask, crop_to_mask, (size, size), flags=flags), np.float32)
