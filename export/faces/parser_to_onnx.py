"""The user's own BiSeNet → the one ONNX file that `realisid_trt.persons.faces.mask` runs."""

from __future__ import annotations

from pathlib import Path

import onnx
from onnx import TensorProto

from realisid_trt.errors import BuildError
from realisid_trt.persons.faces.mask import CLASSES, PARSING_SIZE


def parser_to_onnx(content: bytes, path: Path) -> bytes:
    """The user's BiSeNet, checked, as one file with one input `image` and one output `classes`.

    BiSeNet returns its auxiliary heads too; OpenCV would compute them and list them in its own order. Raises BuildError
    if the file is not ONNX or has other shapes.
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
