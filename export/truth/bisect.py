"""The first node of a graph whose output is wrong although its inputs are right."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import NodeProto, TensorProto

from ..forms import OnnxForm
from .widen import widened

FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)
SIZES = ("Shape", "Size")  # their outputs are not computed from their input's values
MARKS = 16  # values compared in one run; every run divides the number of remaining values by about this

# Runs an ONNX file: inputs by name (it may not need all) → outputs by name.
RunGraph = Callable[[Path, Mapping[str, np.ndarray]], Mapping[str, np.ndarray]]


@dataclass(frozen=True)
class Difference:
    """The first node that differs.

    error:   of its output, relative RMS.
    inputs:  error of each float that it was computed from; weights and the network's own inputs have none.
    alone:   False if the node differs only while its sources are not marked as outputs, as in a fusion that marking
             them prevents.
    """

    node: str
    op_type: str
    output: str
    error: float
    inputs: dict[str, float]
    alone: bool = True

    def __str__(self) -> str:
        worst = max(self.inputs.values(), default=0.0)
        said = f"{self.node} ({self.op_type}), whose output {self.output} has an error of {self.error:.1e}"
        if self.alone:
            return f"{said}, and its inputs at most {worst:.1e}"
        return f"{said}, but not when its sources are marked as outputs: check how it is fused"


def explain(path: Path, candidate: RunGraph, feed: Mapping[str, np.ndarray], bound: float) -> str:
    """The sentence for a parity error. Compares with the graph run node by node, in float32."""
    found = first_difference(path, feed, plain, candidate, bound)
    if found is None:
        return "No node differs from the unoptimised graph in float32: the graph itself differs from the module."
    return f"First differing node: {found}."


def first_difference(
    path: Path,
    feed: Mapping[str, np.ndarray],
    reference: RunGraph,
    candidate: RunGraph,
    bound: float,
    marks: int = MARKS,
) -> Difference | None:
    """The first node whose output differs by more than `bound` (relative RMS), its inputs by less; None if none does.

    Searches upwards from a wrong output, and not beyond right values. Of the remaining values, evenly spread ones are
    marked as outputs and compared, repeatedly: both runners are called O(log n) times, each time with another file.
    """
    graph = _Graph(path)
    errors: dict[str, float] = {}

    def look(values: Sequence[str]) -> None:
        with graph.marked(values) as marked:
            truth, ours = reference(marked, feed), candidate(marked, feed)
        errors.update({value: _error(ours[value], truth[value]) for value in values})

    look(graph.outputs)
    wrong = [value for value in graph.outputs if not errors[value] <= bound]
    if not wrong:
        return None
    value, alone = min(wrong, key=graph.order), True
    while alone:
        before = graph.before(value, {other for other, error in errors.items() if error <= bound})
        if known := [other for other in before if other in errors]:
            value = known[0]
            continue
        if not before:
            break
        error = errors[value]
        look([*_spread(before, marks), value])  # the value too, since marks may change how it is computed
        if alone := not errors[value] <= bound:
            continue
        errors[value] = error
    node = graph.node_of(value)
    inputs = {source: errors[source] for source in graph.sources(value) if source in errors}
    return Difference(node.name or node.output[0], node.op_type, value, errors[value], inputs, alone)


def plain(path: Path, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The graph's outputs by ONNX Runtime on the CPU, no node fused; in float32 if the graph is half."""
    with widened(path) as file:
        return _run(file, feed, optimised=False)


def on_onnxruntime(path: Path, feed: Mapping[str, np.ndarray], form: OnnxForm) -> dict[str, np.ndarray]:
    """The graph's outputs by ONNX Runtime on the CPU, optimised, as `verify` runs it; bfloat16 widened."""
    with widened(path) if form.precision == "bf16" else nullcontext(path) as file:
        return _run(file, feed, optimised=True)


def _run(path: Path, feed: Mapping[str, np.ndarray], optimised: bool) -> dict[str, np.ndarray]:
    import onnxruntime as ort

    from realisid_trt.backends.sessions import session_options

    options = session_options()
    if not optimised:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    types = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
    wanted = {
        port.name: feed[port.name].astype(types.get(port.type, feed[port.name].dtype)) for port in session.get_inputs()
    }
    names = [port.name for port in session.get_outputs()]
    return dict(zip(names, session.run(names, wanted), strict=True))


def _error(ours: np.ndarray, truth: np.ndarray) -> float:
    """Relative RMS; infinite where only one of them is a number. Masks hold equal infinities."""
    if ours.shape != truth.shape:
        return float("inf")
    ours, truth = np.asarray(ours, np.float64), np.asarray(truth, np.float64)
    same = (ours == truth) | (np.isnan(ours) & np.isnan(truth))
    difference = np.subtract(ours, truth, out=np.zeros_like(truth), where=~same)
    finite = truth[np.isfinite(truth)]
    scale = float(np.sqrt(np.mean(finite**2))) if finite.size else 0.0
    error = float(np.sqrt(np.mean(difference**2))) / (scale or 1.0) if difference.size else 0.0
    return error if np.isfinite(error) else float("inf")


def _spread(values: Sequence[str], count: int) -> list[str]:
    picked = np.linspace(0, len(values) - 1, min(count, len(values))).round().astype(int)
    return [values[index] for index in dict.fromkeys(picked.tolist())]


class _Graph:
    """An ONNX graph by its values; those that are floats can be compared."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._model = onnx.load(str(path), load_external_data=False)
        graph = self._model.graph
        self._nodes = list(graph.node)  # in topological order: ONNX requires it
        self._made_by = {name: at for at, node in enumerate(self._nodes) for name in node.output if name}
        self._kinds = {value.name: value for value in (*graph.value_info, *graph.output)}
        self.outputs = [value.name for value in graph.output if self._is_float(value.name)]

    def node_of(self, value: str) -> NodeProto:
        return self._nodes[self._made_by[value]]

    def order(self, value: str) -> int:
        return self._made_by[value]

    def sources(self, value: str) -> list[str]:
        """The computed floats that a value depends on, directly or through integers and booleans."""
        found, seen, waiting = dict[str, None](), set[str](), list(self.node_of(value).input)
        while waiting:
            name = waiting.pop(0)
            if name in seen or name not in self._made_by:  # the network's own input, or a weight
                continue
            seen.add(name)
            if self._is_float(name):
                found[name] = None
            elif self.node_of(name).op_type not in SIZES:
                waiting += self.node_of(name).input
        return list(found)

    def before(self, value: str, cut: set[str]) -> list[str]:
        """The floats that a value is computed from, without those of `cut` and their sources; in order."""
        found, waiting = set[str](), [value]
        while waiting:
            new = [source for source in self.sources(waiting.pop()) if source not in cut and source not in found]
            found.update(new)
            waiting += new
        return sorted(found, key=self.order)

    @contextmanager
    def marked(self, values: Sequence[str]) -> Iterator[Path]:
        """A file that computes these values and nothing else, beside the graph, whose weights it may share."""
        wanted, kept = set(values), []
        for node in reversed(self._nodes):
            if wanted & set(node.output):
                wanted |= {name for name in _inputs(node) if name}
                kept.append(node)
        model = onnx.ModelProto()
        model.CopyFrom(self._model)
        graph = model.graph
        for part in (graph.node, graph.output):
            del part[:]
        graph.node.extend(reversed(kept))
        graph.output.extend(self._kinds[value] for value in dict.fromkeys(values))
        for part in (graph.input, graph.initializer):
            used = [one for one in part if one.name in wanted]
            del part[:]
            part.extend(used)
        file = self._path.with_name(f".{self._path.stem}.{os.getpid()}.onnx")
        try:
            onnx.save(model, str(file))
            yield file
        finally:
            file.unlink(missing_ok=True)

    def _is_float(self, value: str) -> bool:
        return value in self._kinds and self._kinds[value].type.tensor_type.elem_type in FLOATS


def _inputs(node: NodeProto) -> Iterator[str]:
    """The inputs of a node and of the nodes inside it."""
    yield from node.input
    for attribute in node.attribute:
        for inner in attribute.g.node:
            yield from _inputs(inner)
