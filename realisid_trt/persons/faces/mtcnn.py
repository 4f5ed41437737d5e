"""MTCNN: RGB → face boxes, scores and five points (Zhang et al. 2016), with facenet-pytorch's weights and rounding.

Three nets in a row: P looks at 12×12 px windows of every scale, R (24×24) and O (48×48) re-examine the candidates.
RealisID's photos were boxed by MTCNN, so ours must be too: boxes equal facenet-pytorch 2.6.0's to 0.0002 px.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from .cv_net import CvNet, Floats
from .squares import squared

Ints = NDArray[np.intp]

WINDOW_PX, STRIDE_PX = 12, 2  # of the P net
SCALE_STEP = 0.709  # from one level of the pyramid to the next: half the area
THRESHOLDS = (0.6, 0.7, 0.7)  # face probability after P, R, O


@dataclass(frozen=True)
class Detections:
    """Faces of one picture; the detector gives the best score first.

    boxes:  (n, 4) float64, x0, y0, x1, y1 in pixels of the picture; may leave it.
    scores: (n,) float64, probability of being a face.
    points: (n, 5, 2) float64, pixels: the eye on the picture's left, the other eye, nose, the two mouth corners.
    """

    boxes: NDArray[np.float64]
    scores: NDArray[np.float64]
    points: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.boxes)

    def take(self, order: Ints) -> Detections:
        """The detections at these indices, in this order."""
        return Detections(self.boxes[order], self.scores[order], self.points[order])


class Mtcnn:
    """The detector over FILES of a folder.

    min_face_px: smallest face looked for, in pixels of the searched picture.
    max_side_px: a picture with a longer side is reduced to it first; None never reduces.
    """

    FILES = ("pnet.onnx", "rnet.onnx", "onet.onnx")

    def __init__(self, folder: Path, *, min_face_px: int = 40, max_side_px: int | None = 1024) -> None:
        """Raises EngineDamaged for a missing or unreadable file."""
        self.min_face_px = min_face_px
        self.max_side_px = max_side_px
        self.pnet, self.rnet, self.onet = (CvNet(folder / name) for name in self.FILES)
        self.nets = (self.pnet, self.rnet, self.onet)

    def detect(self, rgb: NDArray[np.uint8], *, min_face_px: int | None = None) -> Detections:
        """All faces of a picture. rgb: (H, W, 3) uint8, upright. min_face_px: another one for this call."""
        height, width = rgb.shape[:2]
        shrink = 1.0
        if self.max_side_px is not None and max(height, width) > self.max_side_px:
            shrink = self.max_side_px / max(height, width)
            size = (max(1, round(width * shrink)), max(1, round(height * shrink)))
            rgb = np.asarray(cv2.resize(rgb, size, interpolation=cv2.INTER_AREA), np.uint8)
        boxes = self._propose(rgb, min_face_px or self.min_face_px)
        boxes = self._refine(rgb, boxes)
        boxes, scores, points = self._decide(rgb, boxes)
        return Detections(boxes / shrink, scores.astype(np.float64), points / shrink)

    def _propose(self, rgb: NDArray[np.uint8], min_face_px: int) -> NDArray[np.float64]:
        """P net over the pyramid → (n, 4) squared windows."""
        height, width = rgb.shape[:2]
        scale = WINDOW_PX / min_face_px
        found = []
        shorter = min(height, width) * scale
        while shorter >= WINDOW_PX:
            level = area_resize(rgb, int(height * scale + 1), int(width * scale + 1))
            output = self.pnet(_normalised(level[None]))
            face = output["probability"][0, 1]
            rows, columns = np.nonzero(face >= THRESHOLDS[0])
            first = STRIDE_PX * np.stack([columns, rows], axis=1)
            windows = np.floor(np.concatenate([first + 1, first + WINDOW_PX], axis=1) / scale)
            scores, offsets = face[rows, columns], output["offset"][0, :, rows, columns]
            kept = suppress(windows, scores, 0.5)
            found.append((windows[kept], scores[kept], offsets[kept]))
            scale *= SCALE_STEP
            shorter *= SCALE_STEP
        if not found:
            return np.zeros((0, 4))
        windows, scores, offsets = (np.concatenate(parts) for parts in zip(*found, strict=True))
        kept = suppress(windows, scores, 0.7)
        return squared(_moved(windows[kept], offsets[kept], border=0))

    def _refine(self, rgb: NDArray[np.uint8], boxes: NDArray[np.float64]) -> NDArray[np.float64]:
        """R net: (n, 4) candidates → (m, 4) squared boxes, m ≤ n."""
        boxes, patches = _patches(rgb, boxes, 24)
        if not len(boxes):
            return boxes
        output = self.rnet(_normalised(patches))
        scores = output["probability"][:, 1]
        good = scores > THRESHOLDS[1]
        boxes, scores, offsets = boxes[good], scores[good], output["offset"][good]
        kept = suppress(boxes, scores, 0.7)
        return squared(_moved(boxes[kept], offsets[kept], border=1))

    def _decide(
        self, rgb: NDArray[np.uint8], boxes: NDArray[np.float64]
    ) -> tuple[NDArray[np.float64], Floats, NDArray[np.float64]]:
        """O net: (n, 4) candidates → boxes (m, 4), scores (m,), points (m, 5, 2)."""
        boxes, patches = _patches(rgb, boxes, 48)
        if not len(boxes):
            return boxes, np.zeros(0, np.float32), np.zeros((0, 5, 2))
        output = self.onet(_normalised(patches))
        scores = output["probability"][:, 1]
        good = scores > THRESHOLDS[2]
        boxes, scores, offsets, places = boxes[good], scores[good], output["offset"][good], output["points"][good]
        sides = boxes[:, 2:] - boxes[:, :2] + 1
        points = places.reshape(-1, 2, 5).transpose(0, 2, 1) * sides[:, None] + boxes[:, None, :2] - 1
        boxes = _moved(boxes, offsets, border=1)
        kept = suppress(boxes, scores, 0.7, over="smaller", border=1)
        return boxes[kept], scores[kept], points[kept]


def area_resize(rgb: NDArray[np.uint8], height: int, width: int) -> Floats:
    """Adaptive average pooling, exactly: cell i averages the whole pixels from ⌊i·n/m⌋ to ⌈(i+1)·n/m⌉.

    This is torch's `interpolate(mode="area")`. cv2.INTER_AREA weighs pixels by fractions instead, which moves the
    final boxes by up to 10 px, so the sums are taken from an integral image here.
    rgb: (H, W, C) uint8. Returns (height, width, C) float32.
    """
    rows, columns = rgb.shape[:2]
    integral = cv2.integral(rgb, sdepth=cv2.CV_64F)
    top, bottom = np.arange(height) * rows // height, -(-(np.arange(1, height + 1) * rows) // height)
    left, right = np.arange(width) * columns // width, -(-(np.arange(1, width + 1) * columns) // width)
    below, above = integral[bottom], integral[top]
    sums = below[:, right] - above[:, right] - below[:, left] + above[:, left]
    return np.asarray(sums / ((bottom - top)[:, None, None] * (right - left)[None, :, None]), np.float32)


def suppress(
    boxes: NDArray[np.float64],
    scores: NDArray[np.floating],
    threshold: float,
    *,
    over: str = "union",
    border: float = 0.0,
) -> Ints:
    """Non-maximum suppression: indices of the boxes to keep, best score first.

    over:   the overlap is divided by the "union" of both areas or by the "smaller" of them.
    border: added to widths and heights (1 counts the last pixel, as the O stage does).
    """
    order = np.argsort(scores)[::-1]
    x0, y0, x1, y1 = boxes.T
    areas = (x1 - x0 + border) * (y1 - y0 + border)
    kept = []
    while order.size:
        best, rest = order[0], order[1:]
        kept.append(best)
        width = np.maximum(0, np.minimum(x1[best], x1[rest]) - np.maximum(x0[best], x0[rest]) + border)
        height = np.maximum(0, np.minimum(y1[best], y1[rest]) - np.maximum(y0[best], y0[rest]) + border)
        shared = width * height
        whole = areas[best] + areas[rest] - shared if over == "union" else np.minimum(areas[best], areas[rest])
        order = rest[shared / whole <= threshold]
    return np.array(kept, np.intp)


def _normalised(pixels: Floats) -> Floats:
    """(B, h, w, 3) from 0 to 255 → (B, 3, h, w) from about -1 to 1, with the factor the nets were trained with."""
    return np.asarray(((pixels - 127.5) * 0.0078125).transpose(0, 3, 1, 2), np.float32)


def _moved(boxes: NDArray[np.float64], offsets: NDArray[np.floating], *, border: float) -> NDArray[np.float64]:
    """Boxes with each edge moved by its predicted share of the width or height (plus border)."""
    sides = np.tile(boxes[:, 2:] - boxes[:, :2] + border, 2)
    return np.asarray(boxes + offsets * sides, np.float64)


def _patches(rgb: NDArray[np.uint8], boxes: NDArray[np.float64], size: int) -> tuple[NDArray[np.float64], Floats]:
    """The picture under each box, pooled to size × size; empty boxes are dropped. Boxes count from 1, as in Matlab.

    Returns boxes (m, 4) and patches (m, size, size, 3) float32 from 0 to 255.
    """
    height, width = rgb.shape[:2]
    kept, patches = [], []
    for index, (x0, y0, x1, y1) in enumerate(np.trunc(boxes).astype(int)):
        x0, y0, x1, y1 = max(x0, 1), max(y0, 1), min(x1, width), min(y1, height)
        if x1 > x0 - 1 and y1 > y0 - 1:
            kept.append(index)
            patches.append(area_resize(rgb[y0 - 1 : y1, x0 - 1 : x1], size, size))
    return boxes[kept], np.array(patches, np.float32).reshape(-1, size, size, 3)
