"""A half-precision graph → its float32 twin on the same weights: the same computation without rounding to half."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
from onnx import AttributeProto, NodeProto, TensorProto, ValueInfoProto, external_data_helper, numpy_helper

HALVES = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
TYPED = ("to", "dtype", "output_dtype", "softmax_precision", "stash_type")  # attributes that name a type
EMBED_BYTES = 1024  # larger weights lie beside the twin: float32 may exceed a protobuf's 2 GiB


@contextmanager
def widened(path: Path) -> Iterator[Path]:
    """The float32 twin of a graph, in a folder beside it, removed after the block; `path` itself if nothing is half.

    Every float16 and bfloat16 is float32: weights keep their values, values keep their names. One weight at a time is
    in memory.
    """
    model = onnx.load(str(path), load_external_data=False)
    graph = model.graph
    if not any(tensor.data_type in HALVES for tensor in graph.initializer) and not any(
        _is_half(value) for value in (*graph.input, *graph.output, *graph.value_info)
    ):
        yield path
        return
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".widened-") as folder:
        twin = Path(folder) / path.name
        with open(twin.with_suffix(".data"), "wb") as data:
            for tensor in graph.initializer:
                array = _wide(numpy_helper.to_array(tensor, str(path.parent)))
                wide = numpy_helper.from_array(array, tensor.name)
                if array.nbytes > EMBED_BYTES:
                    external_data_helper.set_external_data(wide, Path(data.name).name, data.tell(), array.nbytes)
                    data.write(wide.raw_data)
                    wide.ClearField("raw_data")
                tensor.CopyFrom(wide)
        for value in (*graph.input, *graph.output, *graph.value_info):
            if _is_half(value):
                value.type.tensor_type.elem_type = TensorProto.FLOAT
        _widen_attributes(graph.node)
        for function in model.functions:
            _widen_attributes(function.node)
        onnx.save(model, str(twin))
        yield twin


def _widen_attributes(nodes: Iterable[NodeProto]) -> None:
    for node in nodes:
        for attribute in node.attribute:
            if attribute.type == AttributeProto.TENSOR and attribute.t.data_type in HALVES:
                attribute.t.CopyFrom(numpy_helper.from_array(_wide(numpy_helper.to_array(attribute.t))))
            elif attribute.type == AttributeProto.INT and attribute.name in TYPED and attribute.i in HALVES:
                attribute.i = TensorProto.FLOAT
            elif attribute.type == AttributeProto.GRAPH:
                _widen_attributes(attribute.g.node)


def _is_half(value: ValueInfoProto) -> bool:
    return value.type.tensor_type.elem_type in HALVES


def _wide(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float32) if array.dtype.name in ("float16", "bfloat16") else array
