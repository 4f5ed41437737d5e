"""TFLite graphs become ONNX graphs that compute the same: operators by their definitions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tflite  # type: ignore[import-untyped, unused-ignore]
from numpy.typing import NDArray

from export.faces.tflite_to_onnx import TfliteModel, tflite_to_onnx
from realisid_trt.errors import BuildError
from tests.export.faces.in_opencv import run
from tests.export.faces.tflite_sketch import Sketch

Array = NDArray[Any]


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
    """Odd sizes, both paddings, half-precision weights after a DEQUANTIZE, a fused ReLU6."""
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
        kind,
        [source, whole, added],
        [result],
        table=table,
        StrideH=stride,
        StrideW=stride,
        Padding=tflite.Padding.SAME if same else tflite.Padding.VALID,
        FusedActivationFunction=RELU6,
        DilationHFactor=1,
        DilationWFactor=1,
        **more,
    )
    model = tflite_to_onnx(TfliteModel(sketch.finish([source], [result]), "sketch"))
    converted = run(model, {"image": image.transpose(2, 0, 1)[None]})["result"]
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
    converted = run(model, {"image": image.transpose(2, 0, 1)[None]})["flat"]
    np.testing.assert_allclose(converted, spread_values.reshape(1, 192), rtol=1e-4, atol=1e-5)


def test_concatenation_and_part_of_a_graph() -> None:
    sketch = Sketch()
    first, second = sketch.tensor("first", (1, 2, 3)), sketch.tensor("second", (1, 2, 3))
    joined, positive = sketch.tensor("joined", (1, 2, 6)), sketch.tensor("positive", (1, 2, 6))
    sketch.operator("CONCATENATION", [first, second], [joined], table="ConcatenationOptions", Axis=2)
    sketch.operator("RELU", [joined], [positive])
    model = TfliteModel(sketch.finish([first, second], [positive]), "sketch")
    values = np.random.default_rng(0).normal(size=(2, 1, 2, 3)).astype(np.float32)
    whole = run(tflite_to_onnx(model), {"first": values[0], "second": values[1]})["positive"]
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
