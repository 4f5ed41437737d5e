"""Face encoders of random numbers: a few kilobytes of weights in the shapes of an ArcFace."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

CONFIG = {
    "class": "onnx", "file": "arcface.onnx", "size": 112, "colour": "bgr", "mean": 127.5, "std": 127.5,
    "template": "arcface-112", "output_dim": 512, "norm": "unit", "points": "mtcnn-whole", "name": "random",
    "licence": None,
}  # fmt: skip


def random_encoder(*, side: int = 112, width: int = 512, seed: int = 0, scale: float = 0.1) -> onnx.ModelProto:
    """(N, 3, side, side) → (N, width): an affine map of the means of 16 × 16 px. scale: of its weights."""
    generator = np.random.default_rng(seed)
    cells = (side // 16) ** 2 * 3
    weights = {
        "matrix": (generator.standard_normal((cells, width)) * scale).astype(np.float32),
        "bias": generator.standard_normal(width).astype(np.float32),
    }
    nodes = [
        helper.make_node("AveragePool", ["image"], ["means"], kernel_shape=[16, 16], strides=[16, 16]),
        helper.make_node("Flatten", ["means"], ["flat"]),
        helper.make_node("Gemm", ["flat", "matrix", "bias"], ["embedding"]),
    ]
    graph = helper.make_graph(
        nodes,
        "encoder",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["n", 3, side, side])],
        [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["n", width])],
        [numpy_helper.from_array(values, name) for name, values in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def normalised(model: onnx.ModelProto) -> onnx.ModelProto:
    """The encoder with its output divided by its length."""
    graph = model.graph
    graph.node[-1].output[0] = "raw"
    graph.initializer.append(numpy_helper.from_array(np.array([1]), "axes"))
    graph.node.append(helper.make_node("ReduceL2", ["raw", "axes"], ["length"], keepdims=1))
    graph.node.append(helper.make_node("Div", ["raw", "length"], ["embedding"]))
    return model


def write_encoder(folder: Path, **changes: Any) -> Path:
    """A `face_encoder/` folder. changes: of its config; `...` removes a key."""
    folder.mkdir(parents=True, exist_ok=True)
    content = random_encoder().SerializeToString()
    (folder / "arcface.onnx").write_bytes(content)
    values = {**CONFIG, "sha256": hashlib.sha256(content).hexdigest(), **changes}
    text = json.dumps({key: value for key, value in values.items() if value is not ...})
    (folder / "config.json").write_text(text, encoding="utf-8")
    return folder
