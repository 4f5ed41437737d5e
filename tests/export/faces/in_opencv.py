"""ONNX graphs in OpenCV, as at run time."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import onnx
from numpy.typing import NDArray

Array = NDArray[Any]


def run(model: onnx.ModelProto, inputs: dict[str, Array]) -> dict[str, Array]:
    """{output name: value}."""
    net = cv2.dnn.readNetFromONNX(np.frombuffer(model.SerializeToString(), np.uint8))
    for name, values in inputs.items():
        net.setInput(np.ascontiguousarray(values, np.float32), name)
    names = [output.name for output in model.graph.output]
    return dict(zip(names, (np.asarray(result) for result in net.forward(names)), strict=True))
