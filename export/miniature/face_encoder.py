"""A small face encoder with random weights, as ONNX: a stand-in for an ArcFace."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from realisid_trt.files import file_sha256

from ..checkpoint.face_encoder import CONFIG, FaceEncoder
from .weights import draw

SIZE, WIDTH = 112, 512
# channels, kernel and stride of each convolution: 112 → 28 → 7 → 4 px
CONVOLUTIONS = ((8, 5, 4), (16, 5, 4), (32, 3, 2))
NEGATIVE_SLOPE = 0.25  # of the PReLUs, as ArcFace's begin


def write_face_encoder(folder: Path, seed: int) -> None:
    """`face_encoder/`: arcface.onnx, (N, 3, 112, 112) → (N, 512), and its config with the settings of ID-Patch's.

    The same seed gives the same bytes. It tells pictures apart, but not people.
    """
    folder.mkdir()
    file = folder / FaceEncoder.file
    file.write_bytes(_graph(seed).SerializeToString(deterministic=True))
    config = FaceEncoder(
        sha256=file_sha256(file), colour="bgr", norm="unit", points="mtcnn-whole", name="random numbers",
        licence=None,
    )  # fmt: skip
    (folder / CONFIG).write_text(json.dumps(config.to_dict(), indent=2) + "\n", encoding="utf-8")


def _graph(seed: int) -> onnx.ModelProto:
    """Convolutions, each with a PReLU, then one linear layer."""
    nodes, weights, channels, side = [], [], 3, SIZE

    def weight(name: str, *shape: int) -> str:
        weights.append(numpy_helper.from_array(draw(seed, "face_encoder", name, shape).numpy(), name))
        return name

    value = "input"
    for number, (width, kernel, stride) in enumerate(CONVOLUTIONS):
        inputs = [value, weight(f"conv{number}.weight", width, channels, kernel, kernel)]
        inputs.append(weight(f"conv{number}.bias", width))
        sizes: dict[str, Any] = {"kernel_shape": [kernel] * 2, "strides": [stride] * 2, "pads": [kernel // 2] * 4}
        nodes.append(helper.make_node("Conv", inputs, [f"conv{number}"], name=f"conv{number}", **sizes))
        slope = np.full((width, 1, 1), NEGATIVE_SLOPE, np.float32)
        weights.append(numpy_helper.from_array(slope, f"prelu{number}.slope"))
        inputs = [f"conv{number}", f"prelu{number}.slope"]
        nodes.append(helper.make_node("PRelu", inputs, [f"prelu{number}"], name=f"prelu{number}"))
        value, channels, side = f"prelu{number}", width, -(-side // stride)
    nodes.append(helper.make_node("Flatten", [value], ["flat"], name="flat", axis=1))
    linear = ["flat", weight("linear.weight", WIDTH, channels * side**2), weight("linear.bias", WIDTH)]
    nodes.append(helper.make_node("Gemm", linear, ["embedding"], name="linear", transB=1))
    graph = helper.make_graph(
        nodes,
        "face_encoder",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["N", 3, SIZE, SIZE])],
        [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["N", WIDTH])],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    model.producer_name = "export.miniature"
    onnx.checker.check_model(model, full_check=True)
    return model
