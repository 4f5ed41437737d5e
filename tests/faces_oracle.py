"""Records tests/data/faces_expected.json: what facenet-pytorch and MediaPipe themselves find in the two photographs.

They need packages of which this project installs none, so each half runs in an environment of its own. To re-record:

    python -c "from pathlib import Path; from export.wheels import demo_photos; demo_photos(Path('photos'))"

    python3.11 -m venv .venv-facenet && .venv-facenet/bin/pip install torch==2.13.0 numpy pillow requests tqdm
    .venv-facenet/bin/pip install --no-deps facenet-pytorch==2.6.0
    .venv-facenet/bin/python tests/faces_oracle.py mtcnn photos

    python3.11 -m venv .venv-mp
    .venv-mp/bin/pip install numpy==2.4.6 'protobuf<5' matplotlib absl-py attrs flatbuffers opencv-python-headless
    .venv-mp/bin/pip install --no-deps mediapipe==0.10.21
    .venv-mp/bin/python tests/faces_oracle.py landmarks photos

The second half starts from regions (centre, side, angle) that the first half derived from facenet-pytorch's points. It
runs MediaPipe's FaceLandmarkCpu graph with each region, asks FaceLandmarkLandmarksToRoi for the next one, and looks
again, as MediaPipe does from one frame of a video to the next.
"""

from __future__ import annotations

import json
import math
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

EXPECTED = Path(__file__).parent / "data" / "faces_expected.json"
PHOTOS = ("astronaut.png", "hopper.jpg")
PERSON_CORNER = {"astronaut.png": (0, 100), "hopper.jpg": (80, 130)}  # of the 256×256 px that the person net is shown
TILTED = 0.6  # radians added to the eyes' angle, so that rotation is tested on upright portraits too


def record_mtcnn(folder: Path) -> None:
    """facenet-pytorch's boxes, probabilities and points, for two sizes of the smallest face."""
    _stand_in_for_torchvision()
    import torch  # type: ignore[import-not-found, unused-ignore]
    from facenet_pytorch import MTCNN  # type: ignore[import-not-found]

    expected = json.loads(EXPECTED.read_text()) if EXPECTED.exists() else {}
    expected["facenet-pytorch"] = {"version": "2.6.0", "torch": torch.__version__}
    for photo in PHOTOS:
        picture = Image.open(folder / photo).convert("RGB")
        entry = expected.setdefault(photo, {})
        for min_face_px in (20, 40):
            detector = MTCNN(keep_all=True, min_face_size=min_face_px, thresholds=[0.6, 0.7, 0.7], device="cpu")
            boxes, scores, points = detector.detect(picture, landmarks=True)
            entry[f"mtcnn_{min_face_px}"] = {
                "boxes": boxes.tolist(),
                "scores": scores.tolist(),
                "points": points.tolist(),
            }
        largest = int(np.argmax((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])))
        eyes = points[largest][1] - points[largest][0]
        x, y = points[largest].mean(axis=0)
        side = 1.5 * float(max(boxes[largest, 2:] - boxes[largest, :2]))
        angle = math.atan2(eyes[1], eyes[0])
        entry["rois"] = [[float(x), float(y), side, angle + more] for more in (0.0, TILTED)]
    _write(expected)


def record_landmarks(folder: Path) -> None:
    """MediaPipe's 478 points in px of the photo for every recorded region and for the next; its person mask."""
    import mediapipe  # type: ignore[import-not-found, unused-ignore]

    expected = json.loads(EXPECTED.read_text())
    expected["mediapipe"] = {"version": mediapipe.__version__}
    for photo in PHOTOS:
        rgb = np.asarray(Image.open(folder / photo).convert("RGB"))
        looks = []
        for roi in expected[photo]["rois"]:
            first, next_roi = _look(rgb, roi)
            second, _ = _look(rgb, next_roi)
            looks.append(
                {"first": np.round(first, 4).tolist(), "next_roi": next_roi, "second": np.round(second, 4).tolist()}
            )
        expected[photo]["looks"] = looks
        top, left = PERSON_CORNER[photo]
        with mediapipe.solutions.selfie_segmentation.SelfieSegmentation(model_selection=0) as person:
            mask = person.process(np.ascontiguousarray(rgb[top : top + 256, left : left + 256])).segmentation_mask
        expected[photo]["person"] = {"corner": [top, left], "every_16th": np.round(mask[8::16, 8::16], 5).tolist()}
    _write(expected)


LANDMARK_GRAPH = """
input_stream: "image"
input_stream: "roi"
input_side_packet: "with_attention"
node {
  calculator: "FaceLandmarkCpu"
  input_stream: "IMAGE:image" input_stream: "ROI:roi"
  input_side_packet: "WITH_ATTENTION:with_attention"
  output_stream: "LANDMARKS:landmarks"
}
node {
  calculator: "ImagePropertiesCalculator"
  input_stream: "IMAGE:image"
  output_stream: "SIZE:size"
}
node {
  calculator: "FaceLandmarkLandmarksToRoi"
  input_stream: "LANDMARKS:landmarks" input_stream: "IMAGE_SIZE:size"
  output_stream: "ROI:next_roi"
}
"""


def _look(rgb: np.ndarray, roi: list[float]) -> tuple[np.ndarray, list[float]]:
    """MediaPipe's landmark graph on one region (x, y, side, angle) in px. Returns (478, 2) px and the next region."""
    import mediapipe  # type: ignore[import-not-found, unused-ignore]
    from google.protobuf import text_format  # type: ignore[import-untyped, unused-ignore]
    from mediapipe.framework import calculator_pb2  # type: ignore[import-not-found, unused-ignore]
    from mediapipe.framework.formats import rect_pb2  # type: ignore[import-not-found, unused-ignore]
    from mediapipe.python import packet_creator, packet_getter  # type: ignore[import-not-found, unused-ignore]
    from mediapipe.python._framework_bindings import (  # type: ignore[import-not-found, unused-ignore]
        calculator_graph,
        image_frame,
        resource_util,
    )

    resource_util.set_resource_dir(str(Path(mediapipe.__path__[0]).parent))
    config = calculator_pb2.CalculatorGraphConfig()
    text_format.Parse(LANDMARK_GRAPH, config)
    graph = calculator_graph.CalculatorGraph(graph_config=config)
    results: dict[str, Any] = {}
    for stream in ("landmarks", "next_roi"):
        graph.observe_output_stream(
            stream, lambda name, packet: results.setdefault(name, packet_getter.get_proto(packet)), False
        )
    graph.start_run(input_side_packets={"with_attention": packet_creator.create_bool(True)})
    height, width = rgb.shape[:2]
    x, y, side, angle = roi
    rectangle = rect_pb2.NormalizedRect(
        x_center=x / width, y_center=y / height, width=side / width, height=side / height, rotation=angle
    )
    frame = packet_creator.create_image_frame(image_format=image_frame.ImageFormat.SRGB, data=np.ascontiguousarray(rgb))
    graph.add_packet_to_input_stream("image", frame.at(0))
    graph.add_packet_to_input_stream("roi", packet_creator.create_proto(rectangle).at(0))
    graph.close_all_packet_sources()
    graph.wait_until_done()
    landmarks = np.array([[point.x * width, point.y * height] for point in results["landmarks"].landmark])
    following = results["next_roi"]
    return landmarks, [
        following.x_center * width,
        following.y_center * height,
        following.width * width,
        following.rotation,
    ]


def _stand_in_for_torchvision() -> None:
    """facenet-pytorch needs one function of torchvision, whose wheel on PyPI is built against CUDA."""
    import torch

    def batched_nms(boxes: Any, scores: Any, groups: Any, threshold: float) -> Any:
        """Greedy suppression within each group, as torchvision documents it. Returns indices, best score first."""
        order = torch.argsort(scores, descending=True, stable=True)
        kept: list[int] = []
        for index in order.tolist():
            x0, y0, x1, y1 = boxes[index]
            overlaps = False
            for other in kept:
                if groups[other] != groups[index]:
                    continue
                u0, v0, u1, v1 = boxes[other]
                width = (torch.minimum(x1, u1) - torch.maximum(x0, u0)).clamp(min=0)
                height = (torch.minimum(y1, v1) - torch.maximum(y0, v0)).clamp(min=0)
                shared = width * height
                if shared / ((x1 - x0) * (y1 - y0) + (u1 - u0) * (v1 - v0) - shared) > threshold:
                    overlaps = True
                    break
            if not overlaps:
                kept.append(index)
        return torch.tensor(kept, dtype=torch.int64)

    stand_in = {
        name: types.ModuleType(name)
        for name in (
            "torchvision",
            "torchvision.transforms",
            "torchvision.transforms.functional",
            "torchvision.ops",
            "torchvision.ops.boxes",
            "torchvision.datasets",
            "torchvision.datasets.utils",
        )
    }
    stand_in["torchvision.transforms"].functional = stand_in["torchvision.transforms.functional"]  # type: ignore[attr-defined]
    stand_in["torchvision.ops.boxes"].batched_nms = batched_nms  # type: ignore[attr-defined]
    sys.modules.update(stand_in)


def _write(expected: dict[str, Any]) -> None:
    EXPECTED.parent.mkdir(exist_ok=True)
    EXPECTED.write_text(json.dumps(expected, separators=(",", ":")) + "\n")
    print(f"{EXPECTED}: {EXPECTED.stat().st_size} bytes")


if __name__ == "__main__":
    {"mtcnn": record_mtcnn, "landmarks": record_landmarks}[sys.argv[1]](Path(sys.argv[2]))
