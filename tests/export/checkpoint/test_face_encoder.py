"""The face encoder's folder and graph: what is taken, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from export.checkpoint.face_encoder import FaceEncoder, check_graph, read_face_encoder
from realisid_trt.errors import CheckpointError
from tests.export.checkpoint.encoders import normalised, random_encoder, write_encoder

KEYS = "class, sha256, colour, norm, name, licence, points, file, size, mean, std, template, output_dim"
CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "class": ({"class": "torch"}, "class is 'torch', expected \"onnx\". Correct the file."),
    "colour": ({"colour": "RGB"}, 'colour is \'RGB\', expected "rgb" or "bgr".'),
    "norm": ({"norm": 1}, 'norm is 1, expected "unit" or "raw".'),
    "points": ({"points": "mesh"}, 'points is \'mesh\', expected "mtcnn" or "mtcnn-whole".'),
    "template": ({"template": "ffhq"}, "template is 'ffhq', expected \"arcface-112\"."),
    "file": ({"file": "../arcface.onnx"}, "file is '../arcface.onnx', expected \"arcface.onnx\"."),
    "sha256": ({"sha256": "A" * 64}, "expected 64 hex digits: the hash of arcface.onnx."),
    "size": ({"size": 128}, "size is 128, expected 112."),
    "size that is true": ({"size": True}, "size is True, expected 112."),
    "width": ({"output_dim": 256}, "output_dim is 256, expected 512."),
    "mean": ({"mean": "127.5"}, "mean is '127.5', expected a number, in 0…255 as the pixels."),
    "std": ({"std": 0}, "std is 0, expected a number above 0, by which the pixels are divided."),
    "name": ({"name": ""}, "name is '', expected the encoder's name."),
    "licence": ({"licence": 5}, "licence is 5, expected a text, or null where nobody stated it."),
    "missing": ({"norm": ..., "colour": ...}, f"config.json: missing colour, norm. Its keys: {KEYS}. Correct"),
    "unknown": ({"swap": True}, f"config.json: unknown swap. Its keys: {KEYS}. Correct"),
    "hash": ({"sha256": "0" * 64}, "and config.json says 0000000000000000…: the file was altered, or is another"),
}


def test_a_folder_is_read(tmp_path: Path) -> None:
    folder = write_encoder(tmp_path / "face_encoder", licence="MIT", norm="raw", mean=0, std=1)
    encoder = read_face_encoder(folder)
    assert (encoder.colour, encoder.norm, encoder.points, encoder.licence) == ("bgr", "raw", "mtcnn-whole", "MIT")
    assert (encoder.mean, encoder.std, encoder.size, encoder.output_dim) == (0, 1, 112, 512)
    assert encoder.to_dict() == json.loads((folder / "config.json").read_text())
    assert FaceEncoder.from_dict(encoder.to_dict()) == encoder
    check_graph(folder / encoder.file)


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_wrong_with_a_config_is_said(name: str, tmp_path: Path) -> None:
    changes, piece = CONFIGS[name]
    folder = write_encoder(tmp_path / "face_encoder", **changes)
    with pytest.raises(CheckpointError) as caught:
        read_face_encoder(folder)
    assert piece in str(caught.value) and "face_encoder" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "piece"),
    [
        (None, "arcface.onnx is missing: the face encoder's weights. Copy it from where the checkpoint comes from."),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a git-lfs pointer, expected an ONNX file"),
        (b"", "is 0 bytes, expected an ONNX file with its weights. Copy it again."),
        (b"\0" * 5000, "the projections know the space of one only. Copy the whole folder again."),
    ],
)
def test_what_is_wrong_with_the_file_is_said(content: bytes | None, piece: str, tmp_path: Path) -> None:
    folder = write_encoder(tmp_path / "face_encoder")
    (folder / "arcface.onnx").unlink()
    if content is not None:
        (folder / "arcface.onnx").write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read_face_encoder(folder)
    assert piece in str(caught.value)


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="config.json is missing: it says what the face encoder is shown"):
        read_face_encoder(tmp_path)


def external(model: onnx.ModelProto) -> None:
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/passwd")


def external_inside(model: onnx.ModelProto) -> None:
    """A Constant inside of an If whose value lies elsewhere."""
    tensor = TensorProto(dims=[1], data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="weights.bin")
    inner = helper.make_graph([helper.make_node("Constant", [], ["c"], value=tensor)], "inner", [], [])
    model.graph.node.append(helper.make_node("If", ["bias"], ["out"], then_branch=inner, else_branch=inner))


def custom(model: onnx.ModelProto) -> None:
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    model.graph.node[2].op_type = "FusedGemm"
    model.graph.node[2].domain = "com.microsoft"


def constant(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.zeros((147, 512), np.float32), "matrix"))


def endless(model: onnx.ModelProto) -> None:
    model.graph.initializer[1].CopyFrom(numpy_helper.from_array(np.full(512, np.inf, np.float32), "bias"))


def second_output(model: onnx.ModelProto) -> None:
    model.graph.output.append(helper.make_tensor_value_info("flat", TensorProto.FLOAT, ["n", 147]))


def half(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.FLOAT16
    model.graph.node[0].input[0] = "wide"
    model.graph.node.insert(0, helper.make_node("Cast", ["image"], ["wide"], to=TensorProto.FLOAT))


def unreadable(model: onnx.ModelProto) -> None:
    """ONNX Runtime knows this operator; OpenCV does not."""
    model.graph.node[1].input[0] = "drawn"
    model.graph.node.insert(1, helper.make_node("Bernoulli", ["means"], ["drawn"], seed=1.0))


GRAPHS: dict[str, tuple[Callable[[onnx.ModelProto], object], str]] = {
    "external": (external, "keeps weights in other files (/etc/passwd), expected one file. Put them into it: python"),
    "external inside": (external_inside, "keeps weights in other files (weights.bin), expected one file."),
    "custom": (custom, "uses operators of com.microsoft, expected ONNX's own only. Export the encoder again"),
    "constant": (constant, "gives the same embedding for two different pictures. Its weights are not those of a"),
    "endless": (endless, "gives (1, 512) for one picture with NaN or infinity, expected (1, 512) finite numbers."),
    "half": (half, "gives embedding (·, 512) (float, float16), expected one float input (N, 3, 112, 112)"),
    "second output": (second_output, "embedding (·, 512) and flat (·, 147) (float), expected one float input"),
    "unreadable": (unreadable, "The runtime runs face encoders in OpenCV: export the encoder with other operators"),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_what_is_wrong_with_a_graph_is_said(name: str, tmp_path: Path) -> None:
    change, piece = GRAPHS[name]
    model = random_encoder()
    change(model)
    path = tmp_path / "arcface.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(CheckpointError) as caught:
        check_graph(path)
    assert piece in str(caught.value)
    assert str(caught.value).startswith(str(path))


def test_what_normalises_by_itself_has_no_raw_embeddings(tmp_path: Path) -> None:
    path = tmp_path / "arcface.onnx"
    path.write_bytes(random_encoder().SerializeToString())
    check_graph(path, norm="raw")
    path.write_bytes(normalised(random_encoder()).SerializeToString())
    check_graph(path, norm="unit")
    with pytest.raises(CheckpointError) as caught:
        check_graph(path, norm="raw")
    assert str(caught.value) == (
        f'{path} gives embeddings of length 1, and norm is "raw": the encoder normalises by itself, so there are no '
        'raw ones. Set norm to "unit".'
    )


def test_graphs_of_other_shapes_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "arcface.onnx"
    for options, shapes in (
        ({"side": 128}, "takes image (·, 3, 128, 128) and gives embedding (·, 512)"),
        ({"width": 256}, "takes image (·, 3, 112, 112) and gives embedding (·, 256)"),
    ):
        path.write_bytes(random_encoder(**options).SerializeToString())
        with pytest.raises(CheckpointError) as caught:
            check_graph(path)
        assert shapes in str(caught.value) and "such as ir_se50 or glintr100, and not a face detector." in str(
            caught.value
        )


@pytest.mark.parametrize("content", [b"", b"neither", b"\0" * 4000])
def test_other_files_are_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "arcface.onnx"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="arcface.onnx is not a valid ONNX file .*Export or copy it again"):
        check_graph(path)


def test_opencv_must_agree_with_onnx_runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenCV is given a file that differs by 2e-4 of the embedding's length."""
    path = tmp_path / "arcface.onnx"
    path.write_bytes(random_encoder().SerializeToString())
    from export.checkpoint import face_encoder

    runs = face_encoder.CvNet.__call__
    for factor, refused in ((1 + 2e-4, True), (1 + 5e-5, False)):
        monkeypatch.setattr(
            face_encoder.CvNet,
            "__call__",
            lambda net, image, factor=factor: {name: factor * found for name, found in runs(net, image).items()},
        )
        if refused:
            with pytest.raises(CheckpointError, match="OpenCV and ONNX Runtime differ by 2.0e-04 of the embedding's"):
                check_graph(path)
        else:
            check_graph(path)
