"""Face landmarks: a photo and a rough place → 478 points, including lids and lips, which carry the expression.

Two models with one interface: MediaPipe's attention mesh (landmarks_body.onnx + landmarks_heads.onnx, 192 px) and the
net inside its face_landmarker.task (landmarks_v2.onnx, 256 px). landmarks.json, written beside them by the build, holds
the constants of the model. A third one, `mediapipe_tasks`, runs the mediapipe package itself. The plain 468-point mesh
is not offered: it draws closed eyes open.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np
from numpy.typing import NDArray

from ...errors import EngineDamaged
from ..mesh import NUM_LANDMARKS, NUM_SKIN_LANDMARKS, OUTER_EYE_CORNERS
from .cv_net import CvNet, Floats, rebuild
from .squares import Affine, Points, apply, inverse

ROI_SCALE = 1.5  # side of the region the net sees over the extent of the face in it, MediaPipe's face_landmark graph


@dataclass(frozen=True)
class Roi:
    """A turned square of a picture, in its pixels.

    center: (x, y).  side_px: its edge.  angle: radians, clockwise on the screen, of the line between the eyes.
    """

    center: tuple[float, float]
    side_px: float
    angle: float = 0.0

    def to_crop(self, size: int) -> Affine:
        """Pixels of the picture → pixels of the size × size upright crop of this square."""
        cosine, sine = np.cos(self.angle), np.sin(self.angle)
        linear = np.array([[cosine, sine], [-sine, cosine]]) * (size / self.side_px)
        return np.column_stack([linear, size / 2 - linear @ self.center])


class LandmarkModel(Protocol):
    """A model that finds landmarks."""

    @property
    def model_id(self) -> str: ...

    def __call__(self, rgb: NDArray[np.uint8], roi: Roi, num_passes: int = 2) -> Points:
        """The landmarks of the face in a region of a picture.

        rgb:        (H, W, 3) uint8.
        num_passes: runs of the net; each after the first uses the region around the previous landmarks.

        Returns (478, 2) in pixels of `rgb`; points may lie outside of it.
        """

    def scored(self, rgb: NDArray[np.uint8], roi: Roi, num_passes: int = 2) -> tuple[Points, float | None]:
        """The landmarks, and the model's confidence that this is a face, in [0, 1]; None if it gives none."""


def roi_from_points(box: NDArray[np.float64], points: Points) -> Roi:
    """From MTCNN: box (4,) and its five points (5, 2), all in pixels of the picture.

    The square of 1.5 × the box, turned with the eyes. Its centre is the mean of eyes, nose and mouth corners, which
    sits lower and steadier than the box's.
    """
    eyes = points[1] - points[0]
    x, y = points.mean(axis=0)
    return Roi((float(x), float(y)), ROI_SCALE * float(max(box[2:] - box[:2])), float(np.arctan2(eyes[1], eyes[0])))


def roi_from_box(box: NDArray[np.float64]) -> Roi:
    """From a box alone (4,), in pixels of the picture: upright."""
    x, y = (box[:2] + box[2:]) / 2
    return Roi((float(x), float(y)), ROI_SCALE * float(max(box[2:] - box[:2])))


def roi_from_landmarks(landmarks: Points) -> Roi:
    """The region of the next pass: MediaPipe's FaceLandmarkLandmarksToRoi. landmarks: (478, 2) px.

    1.5 × the longer edge of the points' extent along the picture's axes, then turned with the eyes.
    """
    eyes = landmarks[OUTER_EYE_CORNERS[1]] - landmarks[OUTER_EYE_CORNERS[0]]
    low, high = landmarks.min(axis=0), landmarks.max(axis=0)
    x, y = (low + high) / 2
    return Roi((float(x), float(y)), ROI_SCALE * float((high - low).max()), float(np.arctan2(eyes[1], eyes[0])))


class Mesh(LandmarkModel):
    """A net of the faces/ folder that finds landmarks in an upright crop, in one or several passes."""

    size: int  # side of the crop, px

    @abstractmethod
    def in_crop(self, pixels: Floats) -> tuple[Points, float | None]:
        """pixels: (1, 3, size, size) from 0 to 1. Returns (478, 2) in px of the crop, and the face's score."""

    def __call__(self, rgb: NDArray[np.uint8], roi: Roi, num_passes: int = 2) -> Points:
        return self.scored(rgb, roi, num_passes)[0]

    def scored(self, rgb: NDArray[np.uint8], roi: Roi, num_passes: int = 2) -> tuple[Points, float | None]:
        points, score = self._look(rgb, roi)
        for _ in range(num_passes - 1):
            points, score = self._look(rgb, roi_from_landmarks(points))
        return points, score

    def _look(self, rgb: NDArray[np.uint8], roi: Roi) -> tuple[Points, float | None]:
        to_crop = roi.to_crop(self.size)
        points, score = self.in_crop(_net_input(rgb, to_crop, self.size))
        return apply(inverse(to_crop), points), score


class MeshV2(Mesh):
    """The landmark net of face_landmarker.task as one ONNX graph."""

    FILES = ("landmarks_v2.onnx", "landmarks.json")

    def __init__(self, folder: Path) -> None:
        """Raises EngineDamaged for a missing, unreadable or foreign file."""
        facts = _read_facts(folder, "v2")
        self.size = int(facts["size_px"])
        self.net = CvNet(folder / "landmarks_v2.onnx")

    @property
    def model_id(self) -> str:
        return f"v2-{self.net.sha256[:8]}"

    def in_crop(self, pixels: Floats) -> tuple[Points, float | None]:
        output = self.net(pixels)
        return np.asarray(output["landmarks"].reshape(NUM_LANDMARKS, 3)[:, :2], np.float64), _score(output)


class AttentionMesh(Mesh):
    """MediaPipe's face mesh with attention: a body finds 468 points, three heads refine lips and eyes.

    The TFLite file has two custom operators between body and heads and a third after the heads. They are a few lines of
    NumPy here: `_region_affine`, `_sample` and `apply`. For the same region of a photo the landmarks equal
    MediaPipe 0.10.21's to 0.03 px.
    """

    FILES = ("landmarks_body.onnx", "landmarks_heads.onnx", "landmarks.json")

    def __init__(self, folder: Path) -> None:
        """Raises EngineDamaged for a missing, unreadable or foreign file."""
        facts = _read_facts(folder, "attention")
        self.size = int(facts["size_px"])
        self.regions = [_Region(**region) for region in facts["regions"]]
        self.body = CvNet(folder / "landmarks_body.onnx")
        self.heads = CvNet(folder / "landmarks_heads.onnx")

    @property
    def model_id(self) -> str:
        return f"attention-{self.body.sha256[:4]}{self.heads.sha256[:4]}"

    def in_crop(self, pixels: Floats) -> tuple[Points, float | None]:
        output = self.body(pixels)
        landmarks = np.zeros((NUM_LANDMARKS, 2))
        landmarks[:NUM_SKIN_LANDMARKS] = output["mesh"].reshape(NUM_SKIN_LANDMARKS, 3)[:, :2]
        features = output["features"][0]  # (C, h, w)
        cells_per_px = features.shape[1] / self.size
        affines = [_region_affine(landmarks * cells_per_px, region) for region in self.regions]
        looks = {
            f"features_{region.name}": _sample(features, affine, region.size)[None]
            for region, affine in zip(self.regions, affines, strict=True)
        }
        refined = self.heads(**looks)
        for region, affine in zip(self.regions, affines, strict=True):
            for output_name, indices in region.outputs.items():
                cells = refined[output_name].reshape(-1, 2) * cells_per_px  # heads, too, answer in px
                landmarks[indices] = apply(affine, cells) / cells_per_px
        return landmarks, _score(output)


@dataclass(frozen=True)
class _Region:
    """One head's region, from landmarks.json.

    left, right: indices of the two landmarks whose line is made level.
    subset:      indices whose extent the region covers, times `scale`.
    size:        cells per side of the head's input.
    outputs:     {output of the heads' graph: indices of the landmarks it refines}.
    """

    name: str
    left: int
    right: int
    subset: list[int]
    scale: float
    size: int
    outputs: dict[str, list[int]]


def _region_affine(landmarks: Points, region: _Region) -> Affine:
    """TFLite custom op Landmarks2TransformMatrix: cells of the head's input → cells of the body's feature map.

    landmarks: (478, 2) in cells of the feature map.
    """
    across = landmarks[region.right] - landmarks[region.left]
    cosine, sine = across / np.linalg.norm(across)
    rotation = np.array([[cosine, sine], [-sine, cosine]])
    turned = landmarks[region.subset] @ rotation.T
    low, high = turned.min(axis=0), turned.max(axis=0)
    linear = rotation.T @ np.diag(region.scale * (high - low) / region.size)
    center = rotation.T @ ((low + high) / 2)
    return np.column_stack([linear, center - linear @ np.full(2, region.size / 2)])


def _sample(features: Floats, affine: Affine, size: int) -> Floats:
    """TFLite custom op TransformTensorBilinear: half-pixel centres, zero outside. (C, h, w) → (C, size, size)."""
    _, height, width = features.shape
    centers = np.arange(size) + 0.5
    columns, rows = np.meshgrid(centers, centers)
    x, y = apply(affine, np.column_stack([columns.ravel(), rows.ravel()])).T - 0.5
    inside = (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)
    x0, y0 = np.clip(np.floor(x).astype(int), 0, width - 1), np.clip(np.floor(y).astype(int), 0, height - 1)
    x1, y1 = np.minimum(x0 + 1, width - 1), np.minimum(y0 + 1, height - 1)
    right, lower = x - x0, y - y0
    upper_row = features[:, y0, x0] * (1 - right) + features[:, y0, x1] * right
    lower_row = features[:, y1, x0] * (1 - right) + features[:, y1, x1] * right
    sampled = (upper_row * (1 - lower) + lower_row * lower) * inside
    return np.asarray(sampled.reshape(-1, size, size), np.float32)


def _net_input(rgb: NDArray[np.uint8], to_crop: Affine, size: int) -> Floats:
    """The crop as the nets' input: (1, 3, size, size), 0..1; the picture's edge repeats outside of it.

    Sampled at 32nds of a pixel, as OpenCV 4 and with it MediaPipe do. OpenCV 5's warpAffine samples exactly, and the
    nets answer that with landmarks up to 0.1 px away (0.4 px in a badly placed region).
    """
    columns, rows = np.meshgrid(np.arange(size), np.arange(size))
    places = apply(inverse(to_crop), np.column_stack([columns.ravel(), rows.ravel()])).reshape(size, size, 2)
    steps = np.rint(places * 32).astype(np.int64)
    whole = np.clip(steps >> 5, -(2**15), 2**15 - 1).astype(np.int16)
    fraction = ((steps[..., 1] & 31) * 32 + (steps[..., 0] & 31)).astype(np.uint16)
    crop = cv2.remap(rgb, whole, fraction, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    return np.asarray(crop.astype(np.float32) / 255, np.float32).transpose(2, 0, 1)[None]


def _score(output: Mapping[str, Floats]) -> float | None:
    """The sigmoid of the net's face flag; None for a net that was converted without it."""
    if "face_flag" not in output:
        return None
    return float(1 / (1 + np.exp(-np.clip(float(output["face_flag"].reshape(())), -60, 60))))


def _read_facts(folder: Path, model: str) -> dict[str, Any]:
    path = folder / "landmarks.json"
    advice = rebuild(folder)
    try:
        facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise EngineDamaged(f"{path} is missing or unreadable ({error.strerror}). {advice}") from error
    except ValueError as error:
        raise EngineDamaged(f"{path} is not JSON ({error}). {advice}") from error
    if facts.get("model") != model:
        raise EngineDamaged(f"{path} is about the model {facts.get('model')!r}, expected {model!r}. {advice}")
    return facts
