"""The way from wheels to ONNX: members are checked and cached, converters compute what TFLite and torch would."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import pickle
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import flatbuffers  # type: ignore[import-untyped, unused-ignore]
import numpy as np
import onnx
import pytest
import tflite  # type: ignore[import-untyped, unused-ignore]
from numpy.typing import NDArray
from onnx import TensorProto, helper

from export import wheels
from export.face_models import (
    ALL_FILES,
    MTCNN_MEMBERS,
    TASK_MEMBER,
    fetch_face_models,
    parser_to_onnx,
    task_to_onnx,
)
from export.mtcnn_to_onnx import mtcnn_to_onnx, read_torch_weights
from export.tflite_to_onnx import TfliteModel, tflite_to_onnx
from realisid_trt.errors import BuildError, DiskError
from realisid_trt.faces import FaceFinder

Array = NDArray[Any]


# -- wheels ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes for all of PyPI, with one wheel in it: demo 1.0, member demo/words.txt."""
    folder = tmp_path / "shop"
    folder.mkdir()
    with zipfile.ZipFile(folder / "demo-1.0-py3-none-any.whl", "w") as wheel:
        files = {
            "demo/words.txt": b"hello",
            "demo-1.0.dist-info/METADATA": b"Metadata-Version: 2.1\nName: demo\nVersion: 1.0\n",
            "demo-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        }
        lines = []
        for name, content in files.items():
            wheel.writestr(name, content)
            digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
            lines.append(f"{name},sha256={digest},{len(content)}")
        wheel.writestr("demo-1.0.dist-info/RECORD", "\n".join([*lines, "demo-1.0.dist-info/RECORD,,"]))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return folder


HELLO = hashlib.sha256(b"hello").hexdigest()


def test_member_is_fetched_once_and_then_cached(shop: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    path = wheels.fetch_member("demo==1.0", "demo/words.txt", HELLO, cache)
    assert path.read_bytes() == b"hello" and path.parent == cache
    (shop / "demo-1.0-py3-none-any.whl").unlink()  # from here on there is no network
    assert wheels.fetch_member("demo==1.0", "demo/words.txt", HELLO, cache) == path
    path.write_bytes(b"hullo")  # a cache that somebody altered is not believed
    with pytest.raises(BuildError, match="cannot be downloaded"):
        wheels.fetch_member("demo==1.0", "demo/words.txt", HELLO, cache)


def test_altered_cache_is_mended(shop: Path, tmp_path: Path) -> None:
    path = wheels.fetch_member("demo==1.0", "demo/words.txt", HELLO, tmp_path)
    path.write_bytes(b"hullo")
    assert wheels.fetch_member("demo==1.0", "demo/words.txt", HELLO, tmp_path).read_bytes() == b"hello"


def test_member_with_another_hash_is_refused(shop: Path, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=f"SHA-256 {HELLO}, expected {'0' * 64}"):
        wheels.fetch_member("demo==1.0", "demo/words.txt", "0" * 64, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_member_that_is_not_in_the_wheel(shop: Path, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="no readable demo/nothing.txt"):
        wheels.fetch_member("demo==1.0", "demo/nothing.txt", HELLO, tmp_path)


def test_no_network_says_where_to_put_the_wheel(shop: Path, tmp_path: Path) -> None:
    with pytest.raises(BuildError) as caught:
        wheels.fetch_member("demo==2.0", "demo/words.txt", HELLO, tmp_path)
    text = str(caught.value)
    assert "demo==2.0 cannot be downloaded" in text and "PIP_FIND_LINKS" in text and "never installed" in text


def test_python_without_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bare = tmp_path / "python"
    bare.write_text("#!/bin/sh\necho '/usr/bin/python: No module named pip' >&2\nexit 1\n")
    bare.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(bare))
    with pytest.raises(BuildError, match="ensurepip"):
        wheels.fetch_member("demo==1.0", "demo/words.txt", HELLO, tmp_path / "cache")


def test_cache_folder_follows_xdg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert wheels.cache_folder() == tmp_path / "realisid_trt"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert wheels.cache_folder() == tmp_path / "home" / ".cache" / "realisid_trt"


def test_unwritable_folder_is_a_disk_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DiskError, match="cannot be written"):
        wheels.write_atomically(tmp_path / "file" / "below.onnx", b"")


def test_demo_photos_are_the_pinned_ones(tmp_path: Path) -> None:
    astronaut, hopper = wheels.demo_photos(tmp_path)
    assert hashlib.sha256(astronaut.read_bytes()).hexdigest() == wheels.ASTRONAUT_SHA256
    assert hashlib.sha256(hopper.read_bytes()).hexdigest() == wheels.HOPPER_SHA256
    assert (astronaut.name, hopper.name) == ("astronaut.png", "hopper.jpg")


# -- the whole set -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("faces")
    return folder, fetch_face_models(folder)


def test_description_is_what_lies_there(built: tuple[Path, dict[str, Any]]) -> None:
    folder, description = built
    assert set(description["files"]) == {path.name for path in folder.iterdir()} <= set(ALL_FILES)
    for name, facts in description["files"].items():
        content = (folder / name).read_bytes()
        assert facts == {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    assert description["landmarks"] == "attention"
    assert description["model_id"] == FaceFinder.load(folder).model_id
    assert {source["licence"] for source in description["sources"]} == {"MIT", "Apache-2.0"}
    assert all(len(source["sha256"]) == 64 for source in description["sources"])
    json.dumps(description)  # it goes into a manifest


def test_building_again_gives_the_same_bytes(built: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    assert fetch_face_models(tmp_path) == built[1]


def test_second_build_needs_no_network(
    built: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "empty"))
    assert fetch_face_models(tmp_path / "out") == built[1]


def test_attention_regions_come_out_of_the_file(built: tuple[Path, dict[str, Any]]) -> None:
    """The lists stand in the custom operators' own options: 80 lip and 2 × 71 eye landmarks, and the irises."""
    facts = json.loads((built[0] / "landmarks.json").read_text())
    regions = {region["name"]: region for region in facts["regions"]}
    assert facts["size_px"] == 192 and list(regions) == ["lips", "left_eye", "right_eye"]
    assert [len(region["subset"]) for region in regions.values()] == [80, 71, 71]
    assert regions["left_eye"]["outputs"]["left_iris"] == [468, 469, 470, 471, 472]
    assert regions["right_eye"]["outputs"]["right_iris"] == [473, 474, 475, 476, 477]
    every = [index for region in regions.values() for indices in region["outputs"].values() for index in indices]
    assert len(every) == len(set(every)) == 80 + 71 + 71 + 10


def test_wrong_task_file(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="--face-landmarker.*cannot be read"):
        fetch_face_models(tmp_path, landmarker_task=tmp_path / "face_landmarker.task")
    (tmp_path / "face_landmarker.task").write_bytes(b"no zip")
    with pytest.raises(BuildError, match="holds no face_landmarks_detector.tflite"):
        fetch_face_models(tmp_path, landmarker_task=tmp_path / "face_landmarker.task")
    assert {path.name for path in tmp_path.iterdir()} == {"face_landmarker.task"}  # nothing half-written


def test_wrong_face_parser(tmp_path: Path) -> None:
    path = tmp_path / "parser.onnx"
    with pytest.raises(BuildError, match="--face-parser.*cannot be read"):
        fetch_face_models(tmp_path, face_parser=path)
    with pytest.raises(BuildError, match="not a valid ONNX"):
        parser_to_onnx(b"neither", path)
    for inputs, kind in (([1, 3, 256, 256], TensorProto.FLOAT), ([1, 3, 512, 512], TensorProto.FLOAT16)):
        image, classes = (helper.make_tensor_value_info(name, kind, inputs) for name in ("i", "o"))
        graph = helper.make_graph([helper.make_node("Relu", ["i"], ["o"])], "relu", [image], [classes])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
        with pytest.raises(BuildError, match=r"expected one input \(1, 3, 512, 512\) float32"):
            parser_to_onnx(model.SerializeToString(), path)


# -- torch weights -----------------------------------------------------------------------------------------------------


def test_pickle_that_wants_more_than_tensors_is_refused() -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return print, ("executed",)

    for content in (pickle.dumps(Evil()), b"", b"PK\x03\x04", pickle.dumps(7)):
        with pytest.raises(BuildError, match="facenet-pytorch 2.6.0"):
            read_torch_weights(content)


@pytest.mark.parametrize("net", ["pnet", "rnet", "onet"])
def test_mtcnn_graphs_compute_what_torch_computes(net: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    member = f"facenet_pytorch/data/{net}.pt"
    path = wheels.fetch_members("facenet-pytorch==2.6.0", MTCNN_MEMBERS)[member]
    weights = read_torch_weights(path.read_bytes())
    loaded = torch.load(path, weights_only=True)  # the reader against torch's own
    assert set(weights) == set(loaded) and all(np.array_equal(weights[key], loaded[key].numpy()) for key in weights)

    functional = torch.nn.functional
    image = np.random.default_rng(0).normal(size=(3, 3, *{"pnet": (33, 27), "rnet": (24, 24), "onet": (48, 48)}[net]))

    def conv(values: Any, index: str) -> Any:
        return functional.conv2d(values, loaded[f"conv{index}.weight"], loaded[f"conv{index}.bias"])

    def dense(values: Any, index: str) -> Any:
        return functional.linear(values, loaded[f"dense{index}.weight"], loaded[f"dense{index}.bias"])

    def prelu(values: Any, index: int) -> Any:
        return functional.prelu(values, loaded[f"prelu{index}.weight"])

    def pool(values: Any, size: int) -> Any:
        return functional.max_pool2d(values, size, 2, ceil_mode=True)

    values = torch.from_numpy(image.astype(np.float32))
    if net == "pnet":
        values = prelu(conv(prelu(conv(pool(prelu(conv(values, "1"), 1), 2), "2"), 2), "3"), 3)
        expected = {"offset": conv(values, "4_2"), "probability": conv(values, "4_1").softmax(1)}
    else:
        values = prelu(conv(pool(prelu(conv(pool(prelu(conv(values, "1"), 1), 3), "2"), 2), 3), "3"), 3)
        if net == "onet":
            values = prelu(conv(pool(values, 2), "4"), 4)
        values = values.permute(0, 3, 2, 1).flatten(1)
        values = prelu(dense(values, "5" if net == "onet" else "4"), 5 if net == "onet" else 4)
        heads = {"onet": {"offset": "6_2", "points": "6_3"}, "rnet": {"offset": "5_2"}}[net]
        expected = {name: dense(values, index) for name, index in heads.items()}
        expected["probability"] = dense(values, "6_1" if net == "onet" else "5_1").softmax(1)
    graph = mtcnn_to_onnx(weights, net)
    assert [output.name for output in graph.graph.output] == list(expected)
    for name, result in _run(graph, {"image": image.astype(np.float32)}).items():
        np.testing.assert_allclose(result, expected[name].numpy(), rtol=1e-4, atol=1e-5)


# -- TFLite ------------------------------------------------------------------------------------------------------------


class Sketch:
    """A TFLite file written by hand: tensors, operators, bytes. Everything in TFLite's (n, h, w, c)."""

    def __init__(self) -> None:
        self.builder = flatbuffers.Builder(1 << 20)
        self.tensors: list[int] = []
        self.buffers: list[bytes] = [b""]  # the first is the empty one
        self.operators: list[int] = []
        self.codes: list[tuple[int, str | None]] = []

    def tensor(self, name: str, shape: tuple[int, ...], values: Array | None = None) -> int:
        kinds = {"float32": tflite.TensorType.FLOAT32, "float16": tflite.TensorType.FLOAT16,
                 "int32": tflite.TensorType.INT32}  # fmt: skip
        b = self.builder
        text = b.CreateString(name)
        sides = b.CreateNumpyVector(np.array(shape, np.int32))
        tflite.TensorStart(b)
        tflite.TensorAddShape(b, sides)
        tflite.TensorAddType(b, kinds["float32" if values is None else str(values.dtype)])
        tflite.TensorAddBuffer(b, 0 if values is None else len(self.buffers))
        tflite.TensorAddName(b, text)
        self.tensors.append(tflite.TensorEnd(b))
        if values is not None:
            self.buffers.append(values.tobytes())
        return len(self.tensors) - 1

    def operator(
        self, kind: str, inputs: list[int], outputs: list[int], custom: bytes = b"", table: str = "", **options: int
    ) -> None:
        """kind: a built-in operator's name, or a custom one's with `custom` options. table: schema class of options."""
        b = self.builder
        code = getattr(tflite.BuiltinOperator, kind, tflite.BuiltinOperator.CUSTOM)
        key = (code, kind if code == tflite.BuiltinOperator.CUSTOM else None)
        if key not in self.codes:
            self.codes.append(key)
        fields = 0
        if table:
            getattr(tflite, f"{table}Start")(b)
            for name, value in options.items():
                getattr(tflite, f"{table}Add{name}")(b, value)
            fields = getattr(tflite, f"{table}End")(b)
        sources, results = (b.CreateNumpyVector(np.array(numbers, np.int32)) for numbers in (inputs, outputs))
        extra = b.CreateByteVector(custom)
        tflite.OperatorStart(b)
        tflite.OperatorAddOpcodeIndex(b, self.codes.index(key))
        tflite.OperatorAddInputs(b, sources)
        tflite.OperatorAddOutputs(b, results)
        if table:
            tflite.OperatorAddBuiltinOptionsType(b, getattr(tflite.BuiltinOptions, table))
            tflite.OperatorAddBuiltinOptions(b, fields)
        if custom:
            tflite.OperatorAddCustomOptions(b, extra)
        self.operators.append(tflite.OperatorEnd(b))

    def finish(self, inputs: list[int], outputs: list[int]) -> bytes:
        b = self.builder

        def offsets(tables: list[int]) -> int:
            b.StartVector(4, len(tables), 4)
            for table in reversed(tables):
                b.PrependUOffsetTRelative(table)
            return int(b.EndVector())

        buffers = []
        for content in self.buffers:
            data = b.CreateByteVector(content) if content else 0
            tflite.BufferStart(b)
            if content:
                tflite.BufferAddData(b, data)
            buffers.append(tflite.BufferEnd(b))
        codes = []
        for code, custom in self.codes:
            name = b.CreateString(custom) if custom else 0
            tflite.OperatorCodeStart(b)
            tflite.OperatorCodeAddDeprecatedBuiltinCode(b, min(code, 127))
            tflite.OperatorCodeAddBuiltinCode(b, code)
            if custom:
                tflite.OperatorCodeAddCustomCode(b, name)
            codes.append(tflite.OperatorCodeEnd(b))
        parts = [offsets(self.tensors), b.CreateNumpyVector(np.array(inputs, np.int32)),
                 b.CreateNumpyVector(np.array(outputs, np.int32)), offsets(self.operators)]  # fmt: skip
        tflite.SubGraphStart(b)
        for add, part in zip(("Tensors", "Inputs", "Outputs", "Operators"), parts, strict=True):
            getattr(tflite, f"SubGraphAdd{add}")(b, part)
        graphs = offsets([tflite.SubGraphEnd(b)])
        vectors = offsets(codes), offsets(buffers)
        tflite.ModelStart(b)
        tflite.ModelAddVersion(b, 3)
        tflite.ModelAddOperatorCodes(b, vectors[0])
        tflite.ModelAddSubgraphs(b, graphs)
        tflite.ModelAddBuffers(b, vectors[1])
        b.Finish(tflite.ModelEnd(b), file_identifier=b"TFL3")
        return bytes(b.Output())


def _run(model: onnx.ModelProto, inputs: dict[str, Array]) -> dict[str, Array]:
    """In OpenCV, as at run time."""
    net = cv2.dnn.readNetFromONNX(np.frombuffer(model.SerializeToString(), np.uint8))
    for name, values in inputs.items():
        net.setInput(np.ascontiguousarray(values, np.float32), name)
    names = [output.name for output in model.graph.output]
    return dict(zip(names, (np.asarray(result) for result in net.forward(names)), strict=True))


def _plain_conv(image: Array, weight: Array, bias: Array, stride: int, same: bool, depthwise: bool) -> Array:
    """Convolution by its definition. image (h, w, c); weight (o, kh, kw, c), depthwise (1, kh, kw, c)."""
    kernel = weight.shape[1:3]
    pads = []
    for side, window in zip(image.shape[:2], kernel, strict=True):
        total = max((-(-side // stride) - 1) * stride + window - side, 0) if same else 0
        pads.append((total // 2, total - total // 2))
    padded = np.pad(image, (*pads, (0, 0)))
    rows, columns = ((side - window) // stride + 1 for side, window in zip(padded.shape[:2], kernel, strict=True))
    result = np.zeros((rows, columns, len(bias)))
    for y in range(rows):
        for x in range(columns):
            patch = padded[y * stride : y * stride + kernel[0], x * stride : x * stride + kernel[1]]
            result[y, x] = (patch * weight[0]).sum((0, 1)) if depthwise else np.tensordot(weight, patch, 3)
    return result + bias


NO_ACTIVATION, RELU6 = tflite.ActivationFunctionType.NONE, tflite.ActivationFunctionType.RELU6


@pytest.mark.parametrize("depthwise", [False, True])
@pytest.mark.parametrize("same", [False, True])
@pytest.mark.parametrize("stride", [1, 2])
def test_convolution_by_its_definition(depthwise: bool, same: bool, stride: int) -> None:
    """Odd sizes, both paddings, half-precision weights behind a DEQUANTIZE, a fused ReLU6."""
    chance = np.random.default_rng(0)
    outputs = 4 if depthwise else 6
    weight = chance.normal(size=(1, 3, 2, 4) if depthwise else (6, 3, 2, 4)).astype(np.float16)
    bias = chance.normal(size=outputs).astype(np.float32)
    image = chance.normal(size=(7, 5, 4)).astype(np.float32)
    expected = np.clip(_plain_conv(image, weight.astype(np.float64), bias, stride, same, depthwise), 0, 6)
    sketch = Sketch()
    source = sketch.tensor("image", (1, 7, 5, 4))
    stored, whole = sketch.tensor("half", weight.shape, weight), sketch.tensor("weight", weight.shape)
    added = sketch.tensor("bias", bias.shape, bias)
    result = sketch.tensor("result", (1, *expected.shape))
    sketch.operator("DEQUANTIZE", [stored], [whole])
    kind, table = ("DEPTHWISE_CONV_2D", "DepthwiseConv2DOptions") if depthwise else ("CONV_2D", "Conv2DOptions")
    more: dict[str, Any] = {"DepthMultiplier": 1} if depthwise else {}
    sketch.operator(
        kind, [source, whole, added], [result], table=table, StrideH=stride, StrideW=stride,
        Padding=tflite.Padding.SAME if same else tflite.Padding.VALID, FusedActivationFunction=RELU6,
        DilationHFactor=1, DilationWFactor=1, **more,
    )  # fmt: skip
    model = tflite_to_onnx(TfliteModel(sketch.finish([source], [result]), "sketch"))
    converted = _run(model, {"image": image.transpose(2, 0, 1)[None]})["result"]
    np.testing.assert_allclose(converted[0], expected, rtol=1e-4, atol=1e-5)


def test_chain_of_the_other_operators() -> None:
    """Pad, PReLU, pools, arithmetic in both layouts, hard swish, sigmoid, resize, transposed convolution, reshape."""
    chance = np.random.default_rng(1)
    image = chance.normal(size=(6, 4, 3)).astype(np.float32)
    slope = chance.normal(size=(1, 1, 5)).astype(np.float32)
    factor = chance.normal(size=(1, 1, 1, 5)).astype(np.float32)
    kernel, bias = chance.normal(size=(2, 2, 2, 5)).astype(np.float32), chance.normal(size=2).astype(np.float32)
    paddings = np.array([[0, 0], [0, 0], [0, 0], [0, 2]], np.int32)

    sketch = Sketch()
    source = sketch.tensor("image", (1, 6, 4, 3))
    names = ("padded", "bent", "swished", "squashed", "scaled")
    padded, bent, swished, squashed, scaled = (sketch.tensor(name, (1, 6, 4, 5)) for name in names)
    pooled, averaged = sketch.tensor("pooled", (1, 3, 2, 5)), sketch.tensor("averaged", (1, 3, 2, 5))
    total, larger = sketch.tensor("total", (1, 3, 2, 5)), sketch.tensor("larger", (1, 6, 4, 5))
    spread, flat = sketch.tensor("spread", (1, 12, 8, 2)), sketch.tensor("flat", (1, 192))
    amounts, slopes = sketch.tensor("amounts", (4, 2), paddings), sketch.tensor("slopes", (1, 1, 5), slope)
    factors = sketch.tensor("factors", factor.shape, factor)
    size = sketch.tensor("size", (2,), np.array([6, 4], np.int32))
    kernels, biases = sketch.tensor("kernels", kernel.shape, kernel), sketch.tensor("biases", (2,), bias)
    pool: dict[str, Any] = {
        "FilterHeight": 2,
        "FilterWidth": 2,
        "StrideH": 2,
        "StrideW": 2,
        "Padding": tflite.Padding.SAME,
    }
    sketch.operator("PAD", [source, amounts], [padded])
    sketch.operator("PRELU", [padded, slopes], [bent])
    sketch.operator("HARD_SWISH", [bent], [swished])
    sketch.operator("LOGISTIC", [swished], [squashed])
    sketch.operator("MUL", [squashed, factors], [scaled], table="MulOptions", FusedActivationFunction=NO_ACTIVATION)
    sketch.operator("MAX_POOL_2D", [scaled], [pooled], table="Pool2DOptions", **pool)
    sketch.operator("AVERAGE_POOL_2D", [scaled], [averaged], table="Pool2DOptions", **pool)
    sketch.operator("ADD", [pooled, averaged], [total], table="AddOptions", FusedActivationFunction=NO_ACTIVATION)
    sketch.operator("RESIZE_BILINEAR", [total, size], [larger], table="ResizeBilinearOptions", HalfPixelCenters=True)
    strides = np.array([1, 2, 2], "<i4").tobytes()
    sketch.operator("Convolution2DTransposeBias", [larger, kernels, biases], [spread], custom=strides)
    sketch.operator("RESHAPE", [spread], [flat])
    model = tflite_to_onnx(TfliteModel(sketch.finish([source], [flat]), "sketch"), {source: "image"}, {flat: "flat"})

    values = np.pad(image.astype(np.float64), ((0, 0), (0, 0), (0, 2)))
    values = np.where(values < 0, values * slope, values)
    values = values * np.clip(values + 3, 0, 6) / 6
    values = factor[0] / (1 + np.exp(-values))
    cells = values.reshape(3, 2, 2, 2, 5)
    values = cells.max((1, 3)) + cells.mean((1, 3))
    for axis, length in ((0, 6), (1, 4)):
        places = np.clip((np.arange(length) + 0.5) / 2 - 0.5, 0, length // 2 - 1)
        low = np.floor(places).astype(int)
        share = np.expand_dims(places - low, axis=1 if axis == 0 else 0)[..., None]
        high = np.minimum(low + 1, length // 2 - 1)
        values = values.take(low, axis) * (1 - share) + values.take(high, axis) * share
    spread_values = np.einsum("hwi,oyxi->hywxo", values, kernel).reshape(12, 8, 2) + bias
    converted = _run(model, {"image": image.transpose(2, 0, 1)[None]})["flat"]
    np.testing.assert_allclose(converted, spread_values.reshape(1, 192), rtol=1e-4, atol=1e-5)


def test_concatenation_and_part_of_a_graph() -> None:
    sketch = Sketch()
    first, second = sketch.tensor("first", (1, 2, 3)), sketch.tensor("second", (1, 2, 3))
    joined, positive = sketch.tensor("joined", (1, 2, 6)), sketch.tensor("positive", (1, 2, 6))
    sketch.operator("CONCATENATION", [first, second], [joined], table="ConcatenationOptions", Axis=2)
    sketch.operator("RELU", [joined], [positive])
    model = TfliteModel(sketch.finish([first, second], [positive]), "sketch")
    values = np.random.default_rng(0).normal(size=(2, 1, 2, 3)).astype(np.float32)
    whole = _run(tflite_to_onnx(model), {"first": values[0], "second": values[1]})["positive"]
    np.testing.assert_array_equal(whole, np.maximum(np.concatenate(values, axis=2), 0))
    part = tflite_to_onnx(model, {joined: "given"}, {positive: "asked"})
    assert [node.op_type for node in part.graph.node] == ["Relu", "Identity"]


def test_unknown_operators_and_files_are_refused() -> None:
    sketch = Sketch()
    source, result = sketch.tensor("source", (1, 4)), sketch.tensor("result", (1, 4))
    sketch.operator("ELU", [source], [result])
    model = TfliteModel(sketch.finish([source], [result]), "sketch.tflite")
    with pytest.raises(BuildError, match="sketch.tflite: the TFLite operator ELU is not supported"):
        tflite_to_onnx(model)
    with pytest.raises(BuildError, match="no tensor 'nothing'"):
        model.tensor("nothing")
    with pytest.raises(BuildError, match="not a TFLite file"):
        TfliteModel(b"anything else", "other.bin")


# -- MediaPipe's .task -------------------------------------------------------------------------------------------------


def landmarker_task(num_landmarks: int = 478, seed: int = 0) -> tuple[bytes, Array, Array]:
    """A .task whose landmark net is two layers: 64×64 px means, then a dense layer. Returns it, its weight and bias.

    The same interface as Google's net (256×256 px in; landmarks, presence and tongue out), far fewer layers.
    """
    chance = np.random.default_rng(seed)
    numbers = num_landmarks * 3
    weight = chance.normal(size=(numbers, 4, 4, 3)).astype(np.float16)
    bias = chance.uniform(20, 236, numbers).astype(np.float32)
    sketch = Sketch()
    source, means = sketch.tensor("input_12", (1, 256, 256, 3)), sketch.tensor("means", (1, 4, 4, 3))
    half, whole = sketch.tensor("half", weight.shape, weight), sketch.tensor("whole", weight.shape)
    added, landmarks = sketch.tensor("bias", (numbers,), bias), sketch.tensor("Identity", (1, 1, 1, numbers))
    presence = sketch.tensor("Identity_1", (1, 4, 4, 3))
    sketch.operator("AVERAGE_POOL_2D", [source], [means], table="Pool2DOptions", FilterHeight=64, FilterWidth=64,
                    StrideH=64, StrideW=64, Padding=tflite.Padding.VALID)  # fmt: skip
    sketch.operator("DEQUANTIZE", [half], [whole])
    sketch.operator("CONV_2D", [means, whole, added], [landmarks], table="Conv2DOptions", StrideH=1, StrideW=1,
                    Padding=tflite.Padding.VALID, DilationHFactor=1, DilationWFactor=1)  # fmt: skip
    sketch.operator("LOGISTIC", [means], [presence])
    content = sketch.finish([source], [landmarks, presence])
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr(TASK_MEMBER, content)
    return stream.getvalue(), weight, bias


def test_task_becomes_the_landmark_model(tmp_path: Path) -> None:
    content, weight, bias = landmarker_task()
    path = tmp_path / "face_landmarker.task"
    path.write_bytes(content)
    folder = tmp_path / "faces"
    fetch_face_models(folder)  # an earlier set, of which the landmark files must go
    description = fetch_face_models(folder, landmarker_task=path)
    assert description["landmarks"] == "v2"
    assert {"landmarks_v2.onnx", "landmarks.json"} < set(description["files"])
    assert not (folder / "landmarks_body.onnx").exists() and not (folder / "landmarks_heads.onnx").exists()
    assert description["sources"][-1]["sha256"] == hashlib.sha256(content).hexdigest()

    finder = FaceFinder.load(folder)
    assert finder.model_id == description["model_id"] and finder.model_id.startswith("mtcnn+v2-")
    pixels = np.random.default_rng(1).random((1, 3, 256, 256)).astype(np.float32)
    means = pixels[0].transpose(1, 2, 0).reshape(4, 64, 4, 64, 3).mean((1, 3), dtype=np.float64)
    expected = np.tensordot(weight.astype(np.float64), means, 3) + bias
    landmarks = finder.landmark_model.net(pixels)["landmarks"]  # type: ignore[attr-defined]
    np.testing.assert_allclose(landmarks.ravel(), expected, rtol=1e-4)

    face = finder.find(np.full((300, 300, 3), 90, np.uint8), box=(100, 100, 200, 200))
    assert face.landmarks.shape == (478, 2)
    fetch_face_models(folder)  # and back again
    assert not (folder / "landmarks_v2.onnx").exists() and FaceFinder.load(folder).model_id != finder.model_id


def test_task_with_another_number_of_landmarks_is_refused() -> None:
    with pytest.raises(BuildError, match="expected a square RGB picture and 478 × 3 numbers"):
        task_to_onnx(landmarker_task(468)[0])


@pytest.fixture(autouse=True)
def _no_part_files(tmp_path: Path) -> Iterator[None]:
    """Whatever a test does, no half-written file stays."""
    yield
    assert not list(tmp_path.rglob("*.part"))
