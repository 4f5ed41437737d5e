"""MediaPipe's landmark models → ONNX: the mesh with attention out of a wheel, or the net of face_landmarker.task."""

from __future__ import annotations

import io
import json
import zipfile

import numpy as np

from realisid_trt.errors import BuildError
from realisid_trt.persons.mesh import NUM_LANDMARKS, NUM_SKIN_LANDMARKS

from .tflite_to_onnx import Operator, TfliteModel, tflite_to_onnx

Files = dict[str, bytes]  # file name → content, in an engine's faces/ folder

TASK_MEMBER = "face_landmarks_detector.tflite"


def attention_to_onnx(content: bytes) -> Files:
    """MediaPipe's mesh with attention → body, heads and the facts that join them.

    The file's three custom operators cut it in two: the body computes 468 points and a feature map; per region (lips,
    two eyes) Landmarks2TransformMatrix places a window on the map, TransformTensorBilinear reads it, a head refines the
    points, and TransformLandmarks maps them back. The options of these operators go into landmarks.json, and
    `realisid_trt.persons.faces.landmarks` computes the operators in NumPy.
    """
    model = TfliteModel(content, "face_landmark_with_attention.tflite")
    matrices = [operator for operator in model.operators if operator.kind == "Landmarks2TransformMatrix"]
    readers = [operator for operator in model.operators if operator.kind == "TransformTensorBilinear"]
    finals = [operator for operator in model.operators if operator.kind == "TransformLandmarks"]
    if not (len(matrices) == len(readers) == 3 and len(finals) == 5):
        raise BuildError("face_landmark_with_attention.tflite: its regions are not lips, two eyes and two irises.")

    features = readers[0].inputs[0]
    body = tflite_to_onnx(
        model,
        {model.inputs[0]: "image"},
        {model.tensor("output_mesh"): "mesh", features: "features", model.tensor("conv_faceflag"): "face_flag"},
        planes=frozenset([features]),
    )

    regions, head_inputs, head_outputs = [], {}, {}
    next_iris = NUM_SKIN_LANDMARKS
    for matrix, reader in zip(matrices, readers, strict=True):
        options = matrix.custom_options()
        if reader.inputs[1] != matrix.outputs[0] or options["scale_x"] != options["scale_y"]:
            raise BuildError("face_landmark_with_attention.tflite: its attention regions are wired in an unknown way.")
        outputs: dict[str, list[int]] = {}
        for final in finals:
            points, scaled_matrix = final.inputs
            if model.producer(scaled_matrix).inputs[0] != matrix.outputs[0]:
                continue
            name = _result_name(model, final)
            if name.endswith("iris"):  # five points each; MediaPipe counts the irises after the skin
                outputs[name] = list(range(next_iris, next_iris + 5))
                next_iris += 5
            else:
                outputs[name] = options["subset_idxs"]
            head_outputs[points] = name
        region = next(name for name in outputs if not name.endswith("iris"))
        head_inputs[reader.outputs[0]] = f"features_{region}"
        regions.append(
            {
                "name": region,
                "left": options["left_rotation_idx"],
                "right": options["right_rotation_idx"],
                "subset": options["subset_idxs"],
                "scale": options["scale_x"],
                "size": options["output_width"],
                "outputs": outputs,
            }
        )
    heads = tflite_to_onnx(model, head_inputs, head_outputs)
    facts = {"model": "attention", "size_px": model.shapes[model.inputs[0]][1], "regions": regions}
    return {
        "landmarks_body.onnx": body.SerializeToString(),
        "landmarks_heads.onnx": heads.SerializeToString(),
        "landmarks.json": json.dumps(facts).encode(),
    }


def task_to_onnx(content: bytes, name: str = "face_landmarker.task") -> Files:
    """The landmark net inside MediaPipe's face_landmarker.task (a zip). Raises BuildError when there is none."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            graph = archive.read(TASK_MEMBER)
    except (zipfile.BadZipFile, KeyError) as error:
        raise BuildError(
            f"{name} holds no {TASK_MEMBER} ({error}). Give MediaPipe's face_landmarker.task, as Google publishes it."
        ) from error
    model = TfliteModel(graph, f"{name}/{TASK_MEMBER}")
    size = model.shapes[model.inputs[0]]
    landmarks = [number for number in model.outputs if np.prod(model.shapes[number]) == NUM_LANDMARKS * 3]
    if len(model.inputs) != 1 or len(size) != 4 or size[1] != size[2] or size[3] != 3 or len(landmarks) != 1:
        raise BuildError(
            f"{name}: {TASK_MEMBER} takes {size} and returns {[model.shapes[number] for number in model.outputs]}, "
            f"expected a square RGB picture and {NUM_LANDMARKS} × 3 numbers. Give the .task of 2023 or later."
        )
    flags = [number for number in model.outputs if np.prod(model.shapes[number]) == 1]
    outputs = {landmarks[0]: "landmarks", **dict(zip(flags[:1], ["face_flag"], strict=False))}  # the other is a tongue
    graph_v2 = tflite_to_onnx(model, {model.inputs[0]: "image"}, outputs)
    facts = {"model": "v2", "size_px": size[1]}
    return {"landmarks_v2.onnx": graph_v2.SerializeToString(), "landmarks.json": json.dumps(facts).encode()}


def _result_name(model: TfliteModel, final: Operator) -> str:
    """The graph's name of the output of one TransformLandmarks: output_left_eye → left_eye."""
    consumer = next(operator for operator in model.operators if final.outputs[0] in operator.inputs)
    return model.names[consumer.outputs[0]].removeprefix("output_")
