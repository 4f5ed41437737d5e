"""TFLite → ONNX for MediaPipe's face nets, so that no TFLite interpreter is needed when pictures are made.

TFLite keeps pictures as (n, h, w, c), ONNX as (n, c, h, w). So a tensor has two names here, one per layout. The
transposition between them is written only when the missing layout is needed: convolutions chain in ONNX's layout,
reshapes and concatenations use TFLite's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import tflite  # type: ignore[import-untyped, unused-ignore]
from flatbuffers import flexbuffers  # type: ignore[import-untyped, unused-ignore]
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from realisid_trt.errors import BuildError

OPSET, IR_VERSION = 17, 9  # OpenCV reads these since 4.10
NUMPY_TYPES = {
    tflite.TensorType.FLOAT32: np.float32,
    tflite.TensorType.FLOAT16: np.float16,
    tflite.TensorType.INT32: np.int32,
    tflite.TensorType.INT64: np.int64,
    tflite.TensorType.UINT8: np.uint8,
    tflite.TensorType.INT8: np.int8,
}
TO_NCHW, TO_NHWC = [0, 3, 1, 2], [0, 2, 3, 1]


@dataclass(frozen=True)
class Operator:
    """One operator: `kind` is TFLite's name, or the custom name; inputs and outputs are tensor numbers."""

    kind: str
    inputs: list[int]
    outputs: list[int]
    table: Any

    def options(self, kind: type) -> Any:
        """The built-in options as an object of the schema's class `kind`."""
        options = kind()
        options.Init(self.table.BuiltinOptions().Bytes, self.table.BuiltinOptions().Pos)
        return options

    def custom_bytes(self) -> bytes:
        return bytes(self.table.CustomOptionsAsNumpy()) if self.table.CustomOptionsLength() else b""

    def custom_options(self) -> dict[str, Any]:
        """The options of a custom operator that keeps them as a flexbuffer map."""
        options: dict[str, Any] = flexbuffers.Loads(self.custom_bytes())
        return options


class TfliteModel:
    """A read TFLite file: its operators in order, the names, shapes and constants of its tensors.

    inputs, outputs: tensor numbers.  constants: {tensor number: array in TFLite's layout}.
    """

    def __init__(self, content: bytes, name: str) -> None:
        """name: of the file, for errors. Raises BuildError if `content` is not a TFLite file, or has unknown types."""
        self.name = name
        if content[4:8] != b"TFL3":
            raise BuildError(f"{name} is not a TFLite file (no TFL3 mark). Give the file as MediaPipe publishes it.")
        model = tflite.Model.GetRootAs(content, 0)
        graph = model.Subgraphs(0)
        self.inputs = [graph.Inputs(index) for index in range(graph.InputsLength())]
        self.outputs = [graph.Outputs(index) for index in range(graph.OutputsLength())]
        self.names: list[str] = []
        self.shapes: list[list[int]] = []
        self.constants: dict[int, NDArray[Any]] = {}
        for number in range(graph.TensorsLength()):
            tensor = graph.Tensors(number)
            self.names.append(tensor.Name().decode())
            self.shapes.append([int(side) for side in tensor.ShapeAsNumpy()] if tensor.ShapeLength() else [])
            buffer = model.Buffers(tensor.Buffer())
            if buffer.DataLength():
                if tensor.Type() not in NUMPY_TYPES:
                    raise BuildError(f"{name}: tensor {self.names[-1]} has unsupported type {tensor.Type()}.")
                values = np.frombuffer(buffer.DataAsNumpy().tobytes(), NUMPY_TYPES[tensor.Type()])
                self.constants[number] = values.reshape(self.shapes[-1])
        self.operators = [self._operator(model, graph.Operators(index)) for index in range(graph.OperatorsLength())]

    @staticmethod
    def _operator(model: Any, table: Any) -> Operator:
        code = model.OperatorCodes(table.OpcodeIndex())
        kind = tflite.opcode2name(max(code.BuiltinCode(), code.DeprecatedBuiltinCode()))
        if kind == "CUSTOM":
            kind = code.CustomCode().decode()
        inputs = [table.Inputs(index) for index in range(table.InputsLength())]
        return Operator(kind, inputs, [table.Outputs(index) for index in range(table.OutputsLength())], table)

    def tensor(self, name: str) -> int:
        """The number of the tensor with that name. Raises BuildError when there is none."""
        if name not in self.names:
            raise BuildError(f"{self.name} has no tensor {name!r}; it is not the model that this version converts.")
        return self.names.index(name)

    def producer(self, tensor: int) -> Operator:
        """The operator that computes a tensor. Raises BuildError when none does."""
        for operator in self.operators:
            if tensor in operator.outputs:
                return operator
        raise BuildError(f"{self.name}: no operator computes tensor {self.names[tensor]!r}.")


def tflite_to_onnx(
    model: TfliteModel,
    inputs: Mapping[int, str] | None = None,
    outputs: Mapping[int, str] | None = None,
    *,
    planes: frozenset[int] = frozenset(),
) -> onnx.ModelProto:
    """The part of a TFLite graph between some tensors, as ONNX of opset 17.

    inputs, outputs: {tensor number: name in the ONNX graph}; the whole graph with TFLite's names by default.
    planes:          outputs that are wanted as (n, c, h, w); the others keep TFLite's layout.

    Four-dimensional inputs are (n, c, h, w) float32. Raises BuildError for an operator that is not supported.
    """
    inputs = {number: model.names[number] for number in model.inputs} if inputs is None else inputs
    outputs = {number: model.names[number] for number in model.outputs} if outputs is None else outputs
    conversion = _Conversion(model)
    declared_inputs = [conversion.declare_input(number, name) for number, name in inputs.items()]
    for operator in _needed(model, set(inputs), set(outputs)):
        conversion.convert(operator)
    declared_outputs = [
        conversion.declare_output(number, name, as_planes=number in planes) for number, name in outputs.items()
    ]
    graph = helper.make_graph(conversion.nodes, model.name, declared_inputs, declared_outputs, conversion.initializers)
    converted = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)])
    converted.ir_version = IR_VERSION
    onnx.checker.check_model(converted, full_check=True)
    return converted


def _needed(model: TfliteModel, inputs: set[int], outputs: set[int]) -> list[Operator]:
    """The operators on the way from the inputs to the outputs, in order."""
    wanted, needed = set(outputs), []
    for operator in reversed(model.operators):
        if wanted.intersection(operator.outputs) - inputs:
            needed.append(operator)
            wanted.update(operator.inputs)
    return needed[::-1]


@dataclass
class _Conversion:
    """The ONNX graph as it grows.

    native: {tensor number: ONNX name} in TFLite's layout.  planes: the same in (n, c, h, w).
    """

    model: TfliteModel
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    initializers: list[onnx.TensorProto] = field(default_factory=list)
    native: dict[int, str] = field(default_factory=dict)
    planes: dict[int, str] = field(default_factory=dict)

    # -- the graph ---------------------------------------------------------------------------------------------------

    def declare_input(self, number: int, name: str) -> onnx.ValueInfoProto:
        shape = self.model.shapes[number]
        if len(shape) == 4:
            self.planes[number], shape = name, [shape[axis] for axis in TO_NCHW]
        else:
            self.native[number] = name
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

    def declare_output(self, number: int, name: str, *, as_planes: bool) -> onnx.ValueInfoProto:
        shape = self.model.shapes[number]
        source = self.as_planes(number) if as_planes else self.as_native(number)
        self.nodes.append(helper.make_node("Identity", [source], [name]))
        return helper.make_tensor_value_info(
            name, TensorProto.FLOAT, [shape[axis] for axis in TO_NCHW] if as_planes else shape
        )

    def append(self, kind: str, inputs: list[str], **attributes: Any) -> str:
        output = f"{kind.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [output], **attributes))
        return output

    def constant(self, values: NDArray[Any]) -> str:
        name = f"constant_{len(self.initializers)}"
        self.initializers.append(numpy_helper.from_array(np.ascontiguousarray(values), name))
        return name

    def floats(self, number: int) -> NDArray[np.float32]:
        """A constant as float32, in TFLite's layout. Raises BuildError when the tensor is computed instead."""
        if number not in self.model.constants:
            raise BuildError(f"{self.model.name}: tensor {self.model.names[number]!r} should be a constant and is not.")
        return self.model.constants[number].astype(np.float32)

    def as_planes(self, number: int) -> str:
        if number not in self.planes:
            if number in self.model.constants:
                self.planes[number] = self.constant(self.floats(number).transpose(TO_NCHW))
            else:
                self.planes[number] = self.append("Transpose", [self.native[number]], perm=TO_NCHW)
        return self.planes[number]

    def as_native(self, number: int) -> str:
        if number not in self.native:
            if number in self.model.constants:
                self.native[number] = self.constant(self.floats(number))
            else:
                self.native[number] = self.append("Transpose", [self.planes[number]], perm=TO_NHWC)
        return self.native[number]

    def activated(self, name: str, function: int) -> str:
        """`name` after a fused activation function."""
        if function == tflite.ActivationFunctionType.NONE:
            return name
        if function == tflite.ActivationFunctionType.RELU:
            return self.append("Relu", [name])
        if function == tflite.ActivationFunctionType.RELU6:
            return self.append("Clip", [name, *(self.constant(np.array(end, np.float32)) for end in (0, 6))])
        raise BuildError(f"{self.model.name}: fused activation {function} is not supported.")

    def same_padding(self, number: int, kernel: tuple[int, int], stride: tuple[int, int]) -> list[int]:
        """The padding of TFLite's SAME, [top, left, bottom, right]: ceil(length / stride) cells, an odd pixel last."""
        before, after = [], []
        for length, window, step in zip(self.model.shapes[number][1:3], kernel, stride, strict=True):
            total = max((-(-length // step) - 1) * step + window - length, 0)
            before.append(total // 2)
            after.append(total - total // 2)
        return before + after

    # -- the operators -----------------------------------------------------------------------------------------------

    def convert(self, operator: Operator) -> None:
        """Appends one operator. Raises BuildError when it is not supported."""
        if operator.kind not in CONVERTERS:
            raise BuildError(
                f"{self.model.name}: the TFLite operator {operator.kind} is not supported; this is not one of the "
                "models that this version converts."
            )
        CONVERTERS[operator.kind](self, operator)

    def dequantize(self, operator: Operator) -> None:
        self.model.constants[operator.outputs[0]] = self.floats(operator.inputs[0])

    def convolution(self, operator: Operator) -> None:
        depthwise = operator.kind == "DEPTHWISE_CONV_2D"
        options = operator.options(tflite.DepthwiseConv2DOptions if depthwise else tflite.Conv2DOptions)
        source, *constants = operator.inputs
        # TFLite: (out, h, w, in), depthwise (1, h, w, out). ONNX: (out, in per group, h, w).
        weight = self.floats(constants[0]).transpose((3, 0, 1, 2) if depthwise else TO_NCHW)
        if depthwise and weight.shape[0] != self.model.shapes[source][3]:
            raise BuildError(f"{self.model.name}: a depthwise convolution with a multiplier is not supported.")
        kernel, stride = weight.shape[2:], (options.StrideH(), options.StrideW())
        dilation = (options.DilationHFactor(), options.DilationWFactor())
        if dilation != (1, 1):
            raise BuildError(f"{self.model.name}: a convolution with dilation {dilation} is not supported.")
        same = options.Padding() == tflite.Padding.SAME
        biases = [self.constant(self.floats(number)) for number in constants[1:2] if number >= 0]
        result = self.append(
            "Conv",
            [self.as_planes(source), self.constant(weight), *biases],
            kernel_shape=list(kernel),
            strides=list(stride),
            pads=self.same_padding(source, kernel, stride) if same else [0, 0, 0, 0],
            group=weight.shape[0] if depthwise else 1,
        )
        self.planes[operator.outputs[0]] = self.activated(result, options.FusedActivationFunction())

    def pool(self, operator: Operator) -> None:
        options = operator.options(tflite.Pool2DOptions)
        source = operator.inputs[0]
        kernel, stride = (options.FilterHeight(), options.FilterWidth()), (options.StrideH(), options.StrideW())
        same = options.Padding() == tflite.Padding.SAME
        # ONNX's AveragePool leaves padding out of the mean by default, as TFLite does.
        result = self.append(
            "MaxPool" if operator.kind == "MAX_POOL_2D" else "AveragePool",
            [self.as_planes(source)],
            kernel_shape=list(kernel),
            strides=list(stride),
            pads=self.same_padding(source, kernel, stride) if same else [0, 0, 0, 0],
        )
        self.planes[operator.outputs[0]] = self.activated(result, options.FusedActivationFunction())

    def prelu(self, operator: Operator) -> None:
        source, slope = operator.inputs
        slopes = self.constant(self.floats(slope).reshape(-1, 1, 1))  # one per channel: (1, 1, c) in all of these nets
        self.planes[operator.outputs[0]] = self.append("PRelu", [self.as_planes(source), slopes])

    def arithmetic(self, operator: Operator) -> None:
        kind = operator.kind.capitalize()
        function = operator.options(getattr(tflite, f"{kind}Options")).FusedActivationFunction()
        computed = not any(number in self.model.constants for number in operator.inputs)
        if computed and all(len(self.model.shapes[number]) == 4 for number in operator.inputs):
            result = self.append(kind, [self.as_planes(number) for number in operator.inputs])
            self.planes[operator.outputs[0]] = self.activated(result, function)
        else:
            result = self.append(kind, [self.as_native(number) for number in operator.inputs])
            self.native[operator.outputs[0]] = self.activated(result, function)

    def elementwise(self, operator: Operator) -> None:
        kind = {"RELU": "Relu", "LOGISTIC": "Sigmoid", "HARD_SWISH": "HardSwish"}[operator.kind]
        source = operator.inputs[0]
        known = self.planes if source in self.planes else self.native
        known[operator.outputs[0]] = self.append(kind, [known[source]])

    def pad(self, operator: Operator) -> None:
        source, amounts = operator.inputs
        pairs = self.model.constants[amounts][TO_NCHW].astype(np.int64)
        self.planes[operator.outputs[0]] = self.append(
            "Pad", [self.as_planes(source), self.constant(pairs.T.reshape(-1))]
        )

    def reshape(self, operator: Operator) -> None:
        shape = self.constant(np.array(self.model.shapes[operator.outputs[0]], np.int64))
        self.native[operator.outputs[0]] = self.append("Reshape", [self.as_native(operator.inputs[0]), shape])

    def concatenate(self, operator: Operator) -> None:
        axis = operator.options(tflite.ConcatenationOptions).Axis()
        names = [self.as_native(number) for number in operator.inputs]
        self.native[operator.outputs[0]] = self.append("Concat", names, axis=axis)

    def resize_bilinear(self, operator: Operator) -> None:
        options = operator.options(tflite.ResizeBilinearOptions)
        if options.AlignCorners() or not options.HalfPixelCenters():
            raise BuildError(f"{self.model.name}: only bilinear resizing with half-pixel centres is supported.")
        source, target = operator.inputs[0], self.model.shapes[operator.outputs[0]]
        sizes = self.constant(np.array([target[axis] for axis in TO_NCHW], np.int64))
        self.planes[operator.outputs[0]] = self.append(
            "Resize",
            [self.as_planes(source), "", "", sizes],
            mode="linear",
            coordinate_transformation_mode="half_pixel",
        )

    def transposed_convolution(self, operator: Operator) -> None:
        """MediaPipe's custom op Convolution2DTransposeBias: options are padding, width and height of the stride."""
        source, weight_number, bias_number = operator.inputs
        padding, stride_w, stride_h = np.frombuffer(operator.custom_bytes()[:12], "<i4")
        weight = self.floats(weight_number).transpose(3, 0, 1, 2)  # (out, h, w, in) → (in, out, h, w)
        if tuple(weight.shape[2:]) != (stride_h, stride_w):  # if equal, both kinds of padding are zero
            raise BuildError(f"{self.model.name}: a transposed convolution whose windows overlap is not supported.")
        self.planes[operator.outputs[0]] = self.append(
            "ConvTranspose",
            [self.as_planes(source), self.constant(weight), self.constant(self.floats(bias_number))],
            kernel_shape=list(weight.shape[2:]),
            strides=[int(stride_h), int(stride_w)],
        )


CONVERTERS: dict[str, Callable[[_Conversion, Operator], None]] = {
    "DEQUANTIZE": _Conversion.dequantize,
    "CONV_2D": _Conversion.convolution,
    "DEPTHWISE_CONV_2D": _Conversion.convolution,
    "MAX_POOL_2D": _Conversion.pool,
    "AVERAGE_POOL_2D": _Conversion.pool,
    "PRELU": _Conversion.prelu,
    "ADD": _Conversion.arithmetic,
    "SUB": _Conversion.arithmetic,
    "MUL": _Conversion.arithmetic,
    "DIV": _Conversion.arithmetic,
    "RELU": _Conversion.elementwise,
    "LOGISTIC": _Conversion.elementwise,
    "HARD_SWISH": _Conversion.elementwise,
    "PAD": _Conversion.pad,
    "RESHAPE": _Conversion.reshape,
    "CONCATENATION": _Conversion.concatenate,
    "RESIZE_BILINEAR": _Conversion.resize_bilinear,
    "Convolution2DTransposeBias": _Conversion.transposed_convolution,
}
