"""Face landmarks: a photo and a rough place → 478 points, of the lids and lips too, so that expression survives.

Two models with one interface: MediaPipe's attention mesh (landmarks_body.onnx + landmarks_heads.onnx, 192 px) and the
net inside its face_landmarker.task (landmarks_v2.onnx, 256 px). landmarks.json, written beside them by the build, holds
what is a constant of the model and not of this code. A third one, `tasks_landmarks`, runs the mediapipe package itself.
The plain 468-point mesh is not among them: it draws closed eyes open.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np
from numpy.typing import NDArray

from .cv_net import CvNet, Floats
from .errors import EngineDamaged

Points = NDArray[np.float64]  # (n, 2)
Affine = NDArray[np.float64]  # (2, 3): column vectors (x, y, 1) → (x', y')

NUM_LANDMARKS = 478
NUM_SKIN_LANDMARKS = 468  # the last ten are the irises
OUTER_EYE_CORNERS = (33, 263)  # on the photo's left and right, MediaPipe's mesh topology
ROI_SCALE = 1.5  # side of the region the net sees over the extent of the face in it, MediaPipe's face_landmark graph


@dataclass(frozen=True)
class Roi:
    """A turned square of the photo.

    center: (x, y) photo px.  side_px: its edge.  angle: radians, clockwise on the screen, of the line between the eyes.
    """

    center: tuple[float, float]
    side_px: float
    angle: float = 0.0

    def to_crop(self, size: int) -> Affine:
        """Photo px → px of the size × size upright crop of this square."""
        cosine, sine = np.cos(self.angle), np.sin(self.angle)
        linear = np.array([[cosine, sine], [-sine, cosine]]) * (size / self.side_px)
        return np.column_stack([linear, size / 2 - linear @ self.center])


class LandmarkModel(Protocol):
    """Anything that finds landmarks. `num_passes` > 1 lets it look again at the region its first answer implies."""

    @property
    def model_id(self) -> str: ...

    def __call__(self, rgb: NDArray[np.uint8], roi: Roi, num_passes: int = 2) -> Points: ...


def load_landmark_model(folder: Path) -> AttentionMesh | MeshV2:
    """The landmark model of an engine's faces/ folder: landmarks_v2.onnx if there is one, else the attention mesh.

    Raises EngineDamaged for a missing or unreadable file.
    """
    if (folder / "landmarks_v2.onnx").is_file():
        return MeshV2(folder)
    return AttentionMesh(folder)


def roi_from_points(box: NDArray[np.float64], points: Points) -> Roi:
    """From MTCNN: box (4,) and its five points (5, 2), all photo px. The square of 1.5 × the box, turned with the eyes.

    Its centre is the mean of eyes, nose and mouth corners, which sits lower and steadier than the box's.
    """
    eyes = points[1] - points[0]
    x, y = points.mean(axis=0)
    return Roi((float(x), float(y)), ROI_SCALE * float(max(box[2:] - box[:2])), float(np.arctan2(eyes[1], eyes[0])))


def roi_from_box(box: NDArray[np.float64]) -> Roi:
    """From a box alone (4,), photo px: upright."""
    x, y = (box[:2] + box[2:]) / 2
    return Roi((float(x), float(y)), ROI_SCALE * float(max(box[2:] - box[:2])))


def roi_from_landmarks(landmarks: Points) -> Roi:
    """The region of the next look: MediaPipe's FaceLandmarkLandmarksToRoi. landmarks: (478, 2) photo px.

    1.5 × the longer edge of the points' extent along the photo's axes, then turned with the eyes.
    """
    eyes = landmarks[OUTER_EYE_CORNERS[1]] - landmarks[OUTER_EYE_CORNERS[0]]
    low, high = landmarks.min(axis=0), landmarks.max(axis=0)
    x, y = (low + high) / 2
    return Roi((float(x), float(y)), ROI_SCALE * float((high - low).max()), float(np.arctan2(eyes[1], eyes[0])))


class MeshV2:
    """The landmark net of face_landmarker.task as one ONNX graph."""

    def __init__(self, folder: Path) -> None:
        """Raises EngineDamaged for a missing, unreadable or foreign file."""
        facts = _read_facts(folder, "v2")
        self.size = int(facts["size_px"])
        self.net = CvNet(folder / "landmarks_v2.onnx")

    @property
    def model_id(self) -> str:
        return f"v2-{self.net.sha256[:8]}"

    def __call__(self, rgb: NDArray[np.uint8], roi: Roi, num_passes: int = 2) -> Points:
        """rgb: (H, W, 3) uint8. Returns (478, 2) photo px; points may lie outside the photo."""
        for remaining in reversed(range(num_passes)):
            to_crop = roi.to_crop(self.size)
            landmarks = self.net(_net_input(rgb, to_crop, self.size))["landmarks"]
            points = _apply(_inverse(to_crop), landmarks.reshape(NUM_LANDMARKS, 3)[:, :2])
            if remaining:
                roi = roi_from_landmarks(points)
        return points


class AttentionMesh:
    """MediaPipe's face mesh with attention: a body finds 468 points, three heads look again at lips and eyes.

    Between body and heads stand two custom operators of the TFLite file, a third behind the heads; they are a few lines
    of NumPy here: `_region_affine`, `_sample` and `_apply`. For the same region of a photo the landmarks equal
    MediaPipe 0.10.21's to 0.03 px.
    """

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

    def __call__(self, rgb: NDArray[np.uint8], roi: Roi, num_passes: int = 2) -> Points:
        """rgb: (H, W, 3) uint8. Returns (478, 2) photo px; points may lie outside the photo."""
        for remaining in reversed(range(num_passes)):
            to_crop = roi.to_crop(self.size)
            points = _apply(_inverse(to_crop), self._in_crop(_net_input(rgb, to_crop, self.size)))
            if remaining:
                roi = roi_from_landmarks(points)
        return points

    def _in_crop(self, pixels: Floats) -> Points:
        """(1, 3, size, size) → (478, 2) in px of the crop."""
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
                landmarks[indices] = _apply(affine, cells) / cells_per_px
        return landmarks


@dataclass(frozen=True)
class _Region:
    """One head's region, from landmarks.json.

    left, right: indices of the two landmarks whose line is made level.
    subset:      indices whose extent the region covers, times `scale`.
    size:        cells per side of what the head sees.
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
    x, y = _apply(affine, np.column_stack([columns.ravel(), rows.ravel()])).T - 0.5
    inside = (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)
    x0, y0 = np.clip(np.floor(x).astype(int), 0, width - 1), np.clip(np.floor(y).astype(int), 0, height - 1)
    x1, y1 = np.minimum(x0 + 1, width - 1), np.minimum(y0 + 1, height - 1)
    right, lower = x - x0, y - y0
    upper_row = features[:, y0, x0] * (1 - right) + features[:, y0, x1] * right
    lower_row = features[:, y1, x0] * (1 - right) + features[:, y1, x1] * right
    sampled = (upper_row * (1 - lower) + lower_row * lower) * inside
    return np.asarray(sampled.reshape(-1, size, size), np.float32)


def _net_input(rgb: NDArray[np.uint8], to_crop: Affine, size: int) -> Floats:
    """The crop as the nets want it: (1, 3, size, size), 0..1; the photo's edge repeats outside of it.

    Sampled at 32nds of a pixel, as OpenCV 4 and with it MediaPipe do. OpenCV 5's warpAffine samples exactly, and the
    nets answer that with landmarks up to 0.1 px away (0.4 px in a badly placed region).
    """
    columns, rows = np.meshgrid(np.arange(size), np.arange(size))
    places = _apply(_inverse(to_crop), np.column_stack([columns.ravel(), rows.ravel()])).reshape(size, size, 2)
    steps = np.rint(places * 32).astype(np.int64)
    whole = np.clip(steps >> 5, -(2**15), 2**15 - 1).astype(np.int16)
    fraction = ((steps[..., 1] & 31) * 32 + (steps[..., 0] & 31)).astype(np.uint16)
    crop = cv2.remap(rgb, whole, fraction, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    return np.asarray(crop.astype(np.float32) / 255, np.float32).transpose(2, 0, 1)[None]


def _apply(affine: Affine, points: NDArray[np.floating]) -> Points:
    """(n, 2) points through a (2, 3) affine; also TFLite custom op TransformLandmarks."""
    return np.asarray(points @ affine[:, :2].T + affine[:, 2], np.float64)


def _inverse(affine: Affine) -> Affine:
    return np.asarray(cv2.invertAffineTransform(affine), np.float64)


def _read_facts(folder: Path, model: str) -> dict[str, Any]:
    path = folder / "landmarks.json"
    again = "Build the engine again: python -m export.build (it fetches the face models)."
    try:
        facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise EngineDamaged(f"{path} is missing or unreadable ({error.strerror}). {again}") from error
    except ValueError as error:
        raise EngineDamaged(f"{path} is not JSON ({error}). {again}") from error
    if facts.get("model") != model:
        raise EngineDamaged(f"{path} is about the model {facts.get('model')!r}, expected {model!r}. {again}")
    return facts
