"""The user's own face_landmarker.task and BiSeNet: files that are taken, and files that are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from onnx import TensorProto, helper

from export.faces.landmarks_to_onnx import task_to_onnx
from export.faces.parser_to_onnx import parser_to_onnx
from realisid_trt.errors import BuildError
from tests.export.faces.tflite_sketch import face_landmarker_task


def test_task_with_another_number_of_landmarks_is_refused() -> None:
    with pytest.raises(BuildError, match="expected a square RGB picture and 478 × 3 numbers"):
        task_to_onnx(face_landmarker_task(468)[0])


def test_parser_of_other_shapes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "parser.onnx"
    with pytest.raises(BuildError, match="not a valid ONNX"):
        parser_to_onnx(b"neither", path)
    for inputs, kind in (([1, 3, 256, 256], TensorProto.FLOAT), ([1, 3, 512, 512], TensorProto.FLOAT16)):
        image, classes = (helper.make_tensor_value_info(name, kind, inputs) for name in ("i", "o"))
        graph = helper.make_graph([helper.make_node("Relu", ["i"], ["o"])], "relu", [image], [classes])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
        with pytest.raises(BuildError, match=r"expected one input \(1, 3, 512, 512\) float32"):
            parser_to_onnx(model.SerializeToString(), path)
