"""The face encoder of a checkpoint: `face_encoder/`, an ArcFace as ONNX and how its input is made."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto

from realisid_trt.checks import is_finite, is_whole
from realisid_trt.errors import CheckpointError, EngineDamaged
from realisid_trt.files import VerifiedFiles
from realisid_trt.persons.faces.cv_net import CvNet

from .files import read_json, readable

CLASS, FILE, CONFIG = "onnx", "arcface.onnx", "config.json"
WIDTH = 512  # numbers of an embedding, in every ArcFace
TEMPLATES = {"arcface-112": 112}  # name → side in px of the picture in which its five points lie
OPTIONS: dict[str, tuple[str, ...]] = {
    "file": (FILE,),
    "colour": ("rgb", "bgr"),
    "template": tuple(TEMPLATES),
    "norm": ("unit", "raw"),
    "points": ("mtcnn", "mtcnn-whole"),
}
NO_DOMAINS = ("", "ai.onnx")  # names of ONNX's own operators
TOLERANCE = 1e-4  # of the embedding's norm, between OpenCV and ONNX Runtime
UNIT_TOLERANCE = 1e-3  # of the length of an embedding that has length 1


@dataclass(frozen=True, kw_only=True)
class FaceEncoder:
    """The keys of `face_encoder/config.json`: the file, and how a photo becomes its input and its output an embedding.

    input = (aligned face in 0…255 - mean)/std, (B, 3, size, size) float32; embedding (B, output_dim).

    file:       of the graph, in the same folder. sha256: its hash, in hex.
    size:       side of the aligned face, px. colour: order of its channels, "rgb" or "bgr".
    mean, std:  of the input.
    template:   name of the five points to which a face is aligned, "arcface-112".
    output_dim: numbers of an embedding, 512.
    norm:       what the projections were trained on: "unit" embeddings, of length 1, or "raw" ones.
    points:     the five points of a photo: "mtcnn", or "mtcnn-whole": cut to whole px.
    name:       of the encoder, for people. licence: its terms; None where nobody stated them.
    """

    sha256: str
    colour: str
    norm: str
    name: str
    licence: str | None
    points: str
    file: str = FILE
    size: int = 112
    mean: float = 127.5
    std: float = 127.5
    template: str = "arcface-112"
    output_dim: int = WIDTH

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str = f"face_encoder/{CONFIG}") -> FaceEncoder:
        """The checked config. source: its file, for the error. Raises CheckpointError for a key that is missing,
        surplus or impossible."""
        keys = ("class", *(field.name for field in dataclasses.fields(cls)))
        unknown, missing = sorted(set(values) - set(keys)), sorted(set(keys) - set(values))
        if unknown or missing:
            said = [f"unknown {', '.join(unknown)}"] * bool(unknown) + [f"missing {', '.join(missing)}"] * bool(missing)
            raise CheckpointError(f"{source}: {'; '.join(said)}. Its keys: {', '.join(keys)}. Correct the file.")
        if refused := _refused(values):
            key, expected = refused
            raise CheckpointError(f"{source}: {key} is {values[key]!r}, expected {expected}. Correct the file.")
        return cls(**{key: value for key, value in values.items() if key != "class"})

    def to_dict(self) -> dict[str, Any]:
        """The keys and values, as they stand in the file."""
        return {"class": CLASS, **dataclasses.asdict(self)}


def _refused(values: Mapping[str, Any]) -> tuple[str, str] | None:
    """The first key whose value is impossible, and what is expected instead."""
    if values["class"] != CLASS:
        return "class", f'"{CLASS}"'
    for key, options in OPTIONS.items():
        if values[key] not in options:
            return key, " or ".join(f'"{option}"' for option in options)
    digest = values["sha256"]
    if not (isinstance(digest, str) and len(digest) == 64 and set(digest) <= set("0123456789abcdef")):
        return "sha256", f"64 hex digits: the hash of {FILE}"
    for key, number in (("size", TEMPLATES[values["template"]]), ("output_dim", WIDTH)):
        if not is_whole(values[key]) or values[key] != number:
            return key, str(number)
    if not is_finite(values["mean"]):
        return "mean", "a number, in 0…255 as the pixels"
    if not is_finite(values["std"]) or values["std"] <= 0:
        return "std", "a number above 0, by which the pixels are divided"
    if not isinstance(values["name"], str) or not values["name"]:
        return "name", "the encoder's name"
    if not isinstance(values["licence"], (str, type(None))):
        return "licence", "a text, or null where nobody stated it"
    return None


def read_face_encoder(folder: Path) -> FaceEncoder:
    """The config of a checkpoint's `face_encoder/`, whose file has the size and hash that it must have.

    Does not read the graph. Raises CheckpointError.
    """
    with readable(folder):
        config = folder / CONFIG
        encoder = FaceEncoder.from_dict(read_json(config, "it says what the face encoder is shown"), str(config))
        file = folder / encoder.file
        if not file.is_file():
            raise CheckpointError(
                f"{file} is missing: the face encoder's weights. Copy it from where the checkpoint comes from."
            )
        if file.stat().st_size < 1000:
            start = file.read_bytes()
            what = "a git-lfs pointer" if start.startswith(b"version ") else f"{len(start)} bytes"
            raise CheckpointError(f"{file} is {what}, expected an ONNX file with its weights. Copy it again.")
        with VerifiedFiles() as verified:
            digest = verified.sha256(file)
    if digest != encoder.sha256:
        raise CheckpointError(
            f"{file} has the hash {digest[:16]}…, and {CONFIG} says {encoder.sha256[:16]}…: the file was altered, or "
            "is another encoder. All ArcFaces give 512 numbers, and the projections know the space of one only. Copy "
            "the whole folder again."
        )
    return encoder


def check_graph(path: Path, size: int = 112, width: int = WIDTH, norm: str = "unit") -> None:
    """Raises CheckpointError unless the ONNX file is a face encoder that the runtime can run.

    It must have one float input (·, 3, size, size) and one output (·, width), hold its weights itself, and use ONNX's
    own operators. OpenCV and ONNX Runtime must agree on random input, to 1e-4 of the embedding's norm, and two inputs
    must have different embeddings. With norm "raw", these must not have length 1: such an encoder normalises by
    itself, and no projection was trained on its raw numbers.

    Footgun: ONNX's checker alone accepts a graph whose weights lie in other files, anywhere on the disk.
    """
    model = load_graph(path)
    _check_ports(path, model, size, width)
    first, second = (np.random.default_rng(seed).uniform(-1, 1, (1, 3, size, size)) for seed in (0, 1))
    found = [_embed(path, np.asarray(image, np.float32), width) for image in (first, second)]
    if np.linalg.norm(found[0] - found[1]) <= TOLERANCE * np.linalg.norm(found[0]):
        raise CheckpointError(
            f"{path} gives the same embedding for two different pictures. Its weights are not those of a trained "
            "encoder: copy or export it again."
        )
    if norm == "raw" and all(abs(np.linalg.norm(embedding) - 1) <= UNIT_TOLERANCE for embedding in found):
        raise CheckpointError(
            f'{path} gives embeddings of length 1, and norm is "raw": the encoder normalises by itself, so there are '
            'no raw ones. Set norm to "unit".'
        )


def load_graph(path: Path) -> onnx.ModelProto:
    """The graph of an ONNX file that holds its weights and uses ONNX's own operators only. Raises CheckpointError."""
    with readable(path):
        content = path.read_bytes()
    try:
        model = onnx.load_model_from_string(content)
        if not model.graph.node:
            raise ValueError("it has no operators")
        outside = sorted({_place(tensor) for tensor in _tensors(model) if _place(tensor)})
        if not outside:
            onnx.checker.check_model(model)
    except Exception as error:  # protobuf's and onnx's own exceptions have no common base
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{path} is not a valid ONNX file ({reason}). Export or copy it again.") from error
    if outside:
        raise CheckpointError(
            f"{path} keeps weights in other files ({', '.join(outside[:3])}), expected one file. Put them into it: "
            f"python -c 'import onnx, sys; onnx.save(onnx.load(sys.argv[1]), sys.argv[2])' {path} ONE.onnx"
        )
    if used := sorted({node.domain for node in _nodes(model)} - set(NO_DOMAINS)):
        raise CheckpointError(
            f"{path} uses operators of {', '.join(used)}, expected ONNX's own only. Export the encoder again, without "
            "another runtime's optimisations."
        )
    return model


def _check_ports(path: Path, model: onnx.ModelProto, size: int, width: int) -> None:
    graph = model.graph
    weights = {initializer.name for initializer in graph.initializer}
    inputs = [value for value in graph.input if value.name not in weights]
    shapes = [[_sides(value) for value in values] for values in (inputs, graph.output)]
    kinds = {value.type.tensor_type.elem_type for value in (*inputs, *graph.output)}
    fits = (
        [len(group) for group in shapes] == [1, 1]
        and _fits(shapes[0][0], (3, size, size))
        and _fits(shapes[1][0], (width,))
        and kinds == {TensorProto.FLOAT}
    )
    if not fits:
        takes, gives = (
            " and ".join(f"{value.name} {_shown(sides)}" for value, sides in zip(values, group, strict=True)) or "none"
            for values, group in zip((inputs, graph.output), shapes, strict=True)
        )
        types = ", ".join(sorted(TensorProto.DataType.Name(kind).lower() for kind in kinds))
        raise CheckpointError(
            f"{path} takes {takes} and gives {gives} ({types}), expected one float input (N, 3, {size}, {size}) "
            f"and one output (N, {width}). Give an ArcFace for aligned faces, such as ir_se50 or glintr100, and not a "
            "face detector."
        )


def _fits(sides: list[int | None], expected: tuple[int, ...]) -> bool:
    """Whether a shape is (anything, *expected). A size that the file leaves open fits: it is run with these."""
    return len(sides) == len(expected) + 1 and all(
        side in (None, want) for side, want in zip(sides[1:], expected, strict=True)
    )


def _sides(value: onnx.ValueInfoProto) -> list[int | None]:
    return [dimension.dim_value or None for dimension in value.type.tensor_type.shape.dim]


def _shown(sides: list[int | None]) -> str:
    return f"({', '.join('·' if side is None else str(side) for side in sides)})"


def _embed(path: Path, image: np.ndarray[Any, np.dtype[np.float32]], width: int) -> np.ndarray[Any, np.dtype[Any]]:
    """ONNX Runtime's embedding (1, width) of one picture. Raises CheckpointError unless OpenCV gives the same."""
    import onnxruntime

    try:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        expected = np.asarray(session.run(None, {session.get_inputs()[0].name: image})[0], np.float64)
    except Exception as error:  # ONNX Runtime's exceptions have no common base
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{path} does not run in ONNX Runtime ({reason}). Export the encoder again.") from error
    if expected.shape != (1, width) or not np.isfinite(expected).all():
        raise CheckpointError(
            f"{path} gives {expected.shape} for one picture{' with NaN or infinity' * (expected.shape == (1, width))}, "
            f"expected (1, {width}) finite numbers. Export or copy the encoder again."
        )
    try:
        found = next(iter(CvNet(path)(image).values())).astype(np.float64)
    except EngineDamaged as error:
        said = str(error).split(" Build it again")[0]
        raise CheckpointError(
            f"{said} The runtime runs face encoders in OpenCV: export the encoder with other operators or an older "
            "opset."
        ) from error
    apart = np.linalg.norm(found.reshape(-1) - expected.reshape(-1)) if found.size == expected.size else np.inf
    if not apart <= TOLERANCE * np.linalg.norm(expected):
        raise CheckpointError(
            f"{path}: OpenCV and ONNX Runtime differ by {apart / np.linalg.norm(expected):.1e} of the embedding's "
            f"length, expected at most {TOLERANCE:g}. OpenCV reads one of its operators otherwise: export the encoder "
            "again with an older opset."
        )
    return expected


def _nodes(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    """Every node, also those of functions and inside of other nodes."""
    waiting = [*model.graph.node, *(node for function in model.functions for node in function.node)]
    while waiting:
        node = waiting.pop()
        yield node
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                waiting.extend(graph.node)


def _tensors(model: onnx.ModelProto) -> Iterator[TensorProto]:
    """Every stored tensor, also those of nodes and of graphs inside of nodes."""
    yield from _stored(model.graph)
    for node in _nodes(model):
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)
            for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
                yield from (sparse.values, sparse.indices)
            for graph in (attribute.g, *attribute.graphs):
                yield from _stored(graph)


def _stored(graph: onnx.GraphProto) -> Iterator[TensorProto]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)


def _place(tensor: TensorProto) -> str:
    """The other file in which a tensor's numbers lie, or ""."""
    if tensor.data_location != TensorProto.EXTERNAL:
        return ""
    return next((entry.value for entry in tensor.external_data if entry.key == "location"), "an unnamed file")
