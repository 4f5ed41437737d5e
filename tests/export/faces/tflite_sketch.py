"""TFLite files written by hand, for converters to read."""

from __future__ import annotations

import io
import zipfile
from typing import Any

import flatbuffers  # type: ignore[import-untyped, unused-ignore]
import numpy as np
import tflite  # type: ignore[import-untyped, unused-ignore]
from numpy.typing import NDArray

from export.faces.landmarks_to_onnx import TASK_MEMBER

Array = NDArray[Any]


class Sketch:
    """A TFLite file written by hand: tensors, operators, bytes. Everything in TFLite's (n, h, w, c)."""

    def __init__(self) -> None:
        self.builder = flatbuffers.Builder(1 << 20)
        self.tensors: list[int] = []
        self.buffers: list[bytes] = [b""]  # the first is the empty one
        self.operators: list[int] = []
        self.codes: list[tuple[int, str | None]] = []

    def tensor(self, name: str, shape: tuple[int, ...], values: Array | None = None) -> int:
        kinds = {
            "float32": tflite.TensorType.FLOAT32,
            "float16": tflite.TensorType.FLOAT16,
            "int32": tflite.TensorType.INT32,
        }
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
        parts = [
            offsets(self.tensors),
            b.CreateNumpyVector(np.array(inputs, np.int32)),
            b.CreateNumpyVector(np.array(outputs, np.int32)),
            offsets(self.operators),
        ]
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


def face_landmarker_task(num_landmarks: int = 478, seed: int = 0) -> tuple[bytes, Array, Array]:
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
    sketch.operator(
        "AVERAGE_POOL_2D",
        [source],
        [means],
        table="Pool2DOptions",
        FilterHeight=64,
        FilterWidth=64,
        StrideH=64,
        StrideW=64,
        Padding=tflite.Padding.VALID,
    )
    sketch.operator("DEQUANTIZE", [half], [whole])
    sketch.operator(
        "CONV_2D",
        [means, whole, added],
        [landmarks],
        table="Conv2DOptions",
        StrideH=1,
        StrideW=1,
        Padding=tflite.Padding.VALID,
        DilationHFactor=1,
        DilationWFactor=1,
    )
    sketch.operator("LOGISTIC", [means], [presence])
    content = sketch.finish([source], [landmarks, presence])
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr(TASK_MEMBER, content)
    return stream.getvalue(), weight, bias
