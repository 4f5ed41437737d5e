"""Which pixels of a crop are face: BiSeNet's classes when the user has that net, else mesh hull ∧ person.

The hull alone drags a wedge of background along in a profile, the person mask alone the whole head and the neighbours;
their product is clean in both. Against BiSeNet it lacks hair, and keeps a hand before the face.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from .cv_net import CvNet, Floats
from .errors import EngineDamaged, RequestError
from .landmarks import NUM_SKIN_LANDMARKS, Affine, Points

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


def crop_square(
    rgb: NDArray[np.uint8], square: Sequence[float], size: int, *, repeat_edge: bool = False
) -> tuple[NDArray[np.uint8], Affine]:
    """A square of the photo, resized, and the way there.

    rgb:    (H, W, 3) uint8.
    square: x0, y0, x1, y1 photo px; may leave the photo, where the crop is zero (or repeats the photo's edge).

    Returns (size, size, 3) uint8 and the (2, 3) affine photo px → crop px.
    """
    scale = size / (square[2] - square[0])
    to_crop = np.array([[scale, 0, -square[0] * scale], [0, scale, -square[1] * scale]])
    warp = to_crop
    if scale < 0.5:  # warpAffine reads four pixels only, so the photo is averaged to twice the crop's scale first
        height, width = rgb.shape[:2]
        small = (max(1, round(width * 2 * scale)), max(1, round(height * 2 * scale)))
        rgb = np.asarray(cv2.resize(rgb, small, interpolation=cv2.INTER_AREA), np.uint8)
        back = np.array([width / small[0], height / small[1]])  # pixel centres: old = (new + ½)·back − ½
        warp = np.column_stack([to_crop[:, :2] * back, to_crop[:, 2] + to_crop[:, :2] @ (back / 2 - 0.5)])
    border = cv2.BORDER_REPLICATE if repeat_edge else cv2.BORDER_CONSTANT
    crop = cv2.warpAffine(rgb, warp, (size, size), flags=cv2.INTER_LINEAR, borderMode=border)
    return np.asarray(crop, np.uint8), to_crop


def grown(square: Sequence[float], scale: float) -> tuple[float, float, float, float]:
    """The square with `scale` times its side, about its centre."""
    x0, y0, x1, y1 = square
    half = (x1 - x0) / 2 * scale
    return (x0 + x1) / 2 - half, (y0 + y1) / 2 - half, (x0 + x1) / 2 + half, (y0 + y1) / 2 + half


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

    def __init__(self, folder: Path) -> None:
        """Raises EngineDamaged for a missing or unreadable file."""
        self.net = CvNet(folder / "person_mask.onnx")

    def __call__(self, rgb: NDArray[np.uint8], square: Sequence[float], to_crop: Affine, size: int) -> Floats:
        """square: of the face, photo px; to_crop: photo px → crop px. Returns (size, size) float32 from 0 to 1."""
        wide, to_wide = crop_square(rgb, grown(square, PERSON_CONTEXT), PERSON_SIZE, repeat_edge=True)
        person = self.net(_planes(wide))["person"].reshape(PERSON_SIZE, PERSON_SIZE)
        # The net hesitates over a wide band at the outline; stretching its middle gives an edge of a few pixels.
        return np.asarray(np.clip(_carry(person, to_wide, to_crop, size) * 1.6 - 0.3, 0, 1), np.float32)


class FaceParser:
    """BiSeNet face parsing from the user's own ONNX file: (1, 3, 512, 512) RGB → logits of the 19 classes.

    kept_classes: names of CLASSES that count as face.
    """

    def __init__(self, path: Path, kept_classes: Sequence[str] = KEPT_CLASSES) -> None:
        """Raises RequestError for an unknown class, EngineDamaged for a missing or unreadable file."""
        unknown = [kept for kept in kept_classes if kept not in CLASSES]
        if unknown or not kept_classes:
            raise RequestError(
                f"kept_classes is {list(kept_classes)}, expected some of {', '.join(CLASSES)}"
                + (f"; unknown: {', '.join(unknown)}." if unknown else ".")
            )
        self.kept_classes = tuple(kept_classes)
        self.kept = [CLASSES.index(kept) for kept in kept_classes]
        self.net = CvNet(path)

    def __call__(self, rgb: NDArray[np.uint8], square: Sequence[float], to_crop: Affine, size: int) -> Floats:
        """As PersonMask. Raises EngineDamaged when the net's output is not that of a face parser."""
        wide, to_wide = crop_square(rgb, grown(square, PARSING_CONTEXT), PARSING_SIZE, repeat_edge=True)
        mean = np.array([0.485, 0.456, 0.406], np.float32).reshape(3, 1, 1)  # ImageNet's, as BiSeNet is trained
        deviation = np.array([0.229, 0.224, 0.225], np.float32).reshape(3, 1, 1)
        logits = next(iter(self.net((_planes(wide) - mean) / deviation).values()))
        if logits.shape != (1, len(CLASSES), PARSING_SIZE, PARSING_SIZE):
            raise EngineDamaged(
                f"{self.net.path}: its first output is {logits.shape}, expected "
                f"(1, {len(CLASSES)}, {PARSING_SIZE}, {PARSING_SIZE}). Export BiSeNet with that output first and "
                "build again: python -m export.build --face-parser FILE.onnx"
            )
        is_face = np.isin(logits[0].argmax(axis=0), self.kept).astype(np.float32)
        return np.clip(_carry(is_face, to_wide, to_crop, size), 0, 1)


def _planes(rgb: NDArray[np.uint8]) -> Floats:
    """(h, w, 3) uint8 → (1, 3, h, w) float32 from 0 to 1."""
    return np.asarray(rgb.astype(np.float32) / 255, np.float32).transpose(2, 0, 1)[None]


def _carry(mask: Floats, to_mask: Affine, to_crop: Affine, size: int) -> Floats:
    """A mask made in one frame, resampled in another. Both affines start from photo px."""
    back = cv2.invertAffineTransform(to_crop)
    crop_to_mask = to_mask @ np.vstack([back, [0, 0, 1]])
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return np.asarray(cv2.warpAffine(mask, crop_to_mask, (size, size), flags=flags), np.float32)
