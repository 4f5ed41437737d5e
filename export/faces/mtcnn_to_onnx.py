"""facenet-pytorch's MTCNN weights → three ONNX graphs."""

from __future__ import annotations

import io
import pickle
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from realisid_trt.errors import BuildError

Weights = dict[str, NDArray[np.float32]]

OPSET, IR_VERSION = 17, 9  # OpenCV reads these since 4.10


def read_torch_weights(content: bytes) -> Weights:
    """The state dict of a torch file of float32 tensors. No code in it is executed.

    Raises BuildError when it is another format or holds anything else.
    """
    try:
        tensors: Any = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        if wrong := [name for name, tensor in tensors.items() if tensor.dtype != torch.float32]:
            raise ValueError(f"{wrong[0]} is {tensors[wrong[0]].dtype}, expected torch.float32")
        return {name: tensor.numpy() for name, tensor in tensors.items()}
    except (pickle.UnpicklingError, EOFError, RuntimeError, ValueError, AttributeError) as error:
        raise BuildError(
            f"the MTCNN weights cannot be read ({error}). They must be the .pt files of facenet-pytorch 2.6.0."
        ) from error


def mtcnn_to_onnx(weights: Weights, net: str) -> onnx.ModelProto:
    """One of MTCNN's three nets as an ONNX graph.

    weights: the state dict of that net.  net: "pnet", "rnet" or "onet".

    Input `image` (n, 3, h, w) float32; h = w = 24 for rnet, 48 for onet, any from 12 for pnet.
    Outputs `offset` (n, 4), `probability` (n, 2) [no face, face], onet also `points` (n, 10): five x, then five y;
    pnet's have two more axes: one answer per 12×12 window, 2 px apart.
    """
    graph = _Graph(weights)
    if net == "pnet":
        graph.conv(1).prelu(1, dense=False).pool(2).conv(2).prelu(2, dense=False).conv(3).prelu(3, dense=False)
        outputs = {"offset": graph.branch("Conv", "conv4_2"), "probability": graph.branch("Conv", "conv4_1")}
        sizes: tuple[str | int, str | int] = ("h", "w")
    else:
        graph.conv(1).prelu(1, dense=False).pool(3).conv(2).prelu(2, dense=False).pool(3).conv(3).prelu(3, dense=False)
        if net == "onet":
            graph.pool(2).conv(4).prelu(4, dense=False).flatten().dense(5).prelu(5, dense=True)
            outputs = {
                "offset": graph.branch("Gemm", "dense6_2"),
                "points": graph.branch("Gemm", "dense6_3"),
                "probability": graph.branch("Gemm", "dense6_1"),
            }
            sizes = (48, 48)
        else:
            graph.flatten().dense(4).prelu(4, dense=True)
            outputs = {"offset": graph.branch("Gemm", "dense5_2"), "probability": graph.branch("Gemm", "dense5_1")}
            sizes = (24, 24)
    return graph.finish(net, outputs, sizes)


class _Graph:
    """A chain of layers with named weights; every layer's method appends it and returns the graph."""

    def __init__(self, weights: Weights) -> None:
        self.weights = weights
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.tail = "image"

    def _append(self, kind: str, inputs: list[str], **attributes: Any) -> str:
        output = f"{kind.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [output], **attributes))
        return output

    def _weight(self, name: str, shape: tuple[int, ...] | None = None) -> str:
        values = self.weights[name] if shape is None else self.weights[name].reshape(shape)
        self.initializers.append(numpy_helper.from_array(np.ascontiguousarray(values), name))
        return name

    def branch(self, kind: str, name: str) -> str:
        """A Conv or Gemm on the tail that leaves the tail where it is. Returns the name of its result."""
        inputs = [self.tail, self._weight(f"{name}.weight"), self._weight(f"{name}.bias")]
        if kind == "Gemm":
            return self._append("Gemm", inputs, transB=1)
        return self._append("Conv", inputs, kernel_shape=list(self.weights[f"{name}.weight"].shape[2:]))

    def conv(self, index: int) -> _Graph:
        self.tail = self.branch("Conv", f"conv{index}")
        return self

    def dense(self, index: int) -> _Graph:
        self.tail = self.branch("Gemm", f"dense{index}")
        return self

    def prelu(self, index: int, *, dense: bool) -> _Graph:
        slope = self._weight(f"prelu{index}.weight", (-1,) if dense else (-1, 1, 1))
        self.tail = self._append("PRelu", [self.tail, slope])
        return self

    def pool(self, size: int) -> _Graph:
        self.tail = self._append("MaxPool", [self.tail], kernel_shape=[size, size], strides=[2, 2], ceil_mode=1)
        return self

    def flatten(self) -> _Graph:
        # The weights come from a net that ran on Matlab's (n, w, h, c); Reshape would fail in cv2.dnn for n > 1.
        turned = self._append("Transpose", [self.tail], perm=[0, 3, 2, 1])
        self.tail = self._append("Flatten", [turned], axis=1)
        return self

    def finish(self, net: str, outputs: dict[str, str], sizes: tuple[str | int, str | int]) -> onnx.ModelProto:
        spatial = ["rows", "columns"] if net == "pnet" else []
        channels = {"offset": 4, "points": 10, "probability": 2}
        declared = []
        for output, result in outputs.items():
            if output == "probability":
                self.nodes.append(helper.make_node("Softmax", [result], [output], axis=1))
            else:
                self.nodes.append(helper.make_node("Identity", [result], [output]))
            shape: list[str | int] = ["n", channels[output], *spatial]
            declared.append(helper.make_tensor_value_info(output, TensorProto.FLOAT, shape))
        image = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["n", 3, *sizes])
        graph = helper.make_graph(self.nodes, f"mtcnn_{net}", [image], declared, self.initializers)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)])
        model.ir_version = IR_VERSION
        onnx.checker.check_model(model, full_check=True)
        return model
