"""A network that is wrong in one place: that place is named, whatever follows it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from export.building.planning import onnx_jobs
from export.building.staging import Staging
from export.checkpoint import Checkpoint
from export.forms import OnnxForm, targets_of
from export.networks import Network, networks
from export.options import Options, parser
from export.to_onnx import example
from export.truth.bisect import Difference, explain, first_difference, on_onnxruntime, plain
from export.truth.verify import WORST_RATIO
from realisid_trt.manifest import MANIFEST

SINGLE, HALF = OnnxForm(20, "fp32"), OnnxForm(23, "fp16")
Tamper = Callable[[onnx.GraphProto], None]


@pytest.fixture(scope="module")
def known(checkpoint_dir: Path) -> dict[str, Network]:
    return networks(Checkpoint.open(checkpoint_dir))


def file_of(engine: Path, name: str, form: OnnxForm) -> Path:
    return engine / "onnx" / form.name / f"{name}.onnx"


def feed_of(network: Network, form: OnnxForm) -> dict[str, np.ndarray]:
    inputs = example(network.inputs, {"rows": 1, "timesteps": 2, "height": 2, "width": 3}, form.dtype)
    return {port.name: tensor.numpy() for port, tensor in zip(network.inputs, inputs, strict=True)}


class Tampered:
    """ONNX Runtime, every file changed before it is run."""

    def __init__(self, change: Tamper, form: OnnxForm = SINGLE) -> None:
        self.change, self.form, self.runs = change, form, 0

    def __call__(self, marked: Path, feed: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        model = onnx.load(str(marked))
        self.change(model.graph)
        changed = marked.with_suffix(".changed")
        onnx.save(model, str(changed))
        self.runs += 1
        try:
            return on_onnxruntime(changed, feed, self.form)
        finally:
            changed.unlink()


def scaled(name: str, factor: float) -> Tamper:
    def change(graph: onnx.GraphProto) -> None:
        for tensor in graph.initializer:
            if tensor.name == name:
                values = numpy_helper.to_array(tensor)
                tensor.CopyFrom(numpy_helper.from_array((values * factor).astype(values.dtype), name))

    return change


def first_with(graph: onnx.GraphProto, op_type: str, at: float) -> onnx.NodeProto:
    """The node of this kind at the share `at` of the graph."""
    found = [node for node in graph.node if node.op_type == op_type]
    return found[int(at * len(found))]


@pytest.mark.parametrize(("name", "op_type", "at"), [
    ("unet_encoder", "Conv", 0.1), ("unet_encoder", "MatMul", 0.5), ("unet_decoder", "Conv", 0.95),
    ("local_branch", "MatMul", 0.9), ("text_encoder", "MatMul", 0.0),
])  # fmt: skip
def test_one_wrong_weight(engine_dir: Path, known: dict[str, Network], name: str, op_type: str, at: float) -> None:
    file = file_of(engine_dir, name, SINGLE)
    graph = onnx.load(str(file)).graph
    weights = {tensor.name for tensor in graph.initializer}
    nodes = [node for node in graph.node if node.op_type == op_type and weights & set(node.input)]
    node = nodes[int(at * len(nodes))]
    wrong = Tampered(scaled(next(value for value in node.input if value in weights), 1.01))
    found = first_difference(file, feed_of(known[name], SINGLE), plain, wrong, 1e-5)
    assert found is not None and (found.node, found.op_type, found.output) == (node.name, op_type, node.output[0])
    assert found.error > 1e-4 and all(error < 1e-5 for error in found.inputs.values()) and found.alone
    assert wrong.runs <= 6  # of five hundred nodes
    assert not list(file.parent.glob(".*"))


def test_another_operation(engine_dir: Path, known: dict[str, Network]) -> None:
    file = file_of(engine_dir, "unet_decoder", SINGLE)
    chosen = first_with(onnx.load(str(file)).graph, "Sigmoid", 0.5).name

    def change(graph: onnx.GraphProto) -> None:
        for node in graph.node:
            node.op_type = "Tanh" if node.name == chosen else node.op_type

    found = first_difference(file, feed_of(known["unet_decoder"], SINGLE), plain, Tampered(change), 1e-5)
    assert found is not None and (found.node, found.op_type) == (chosen, "Sigmoid")


@pytest.mark.parametrize("name", ["unet_encoder", "unet_decoder", "text_encoder_2", "local_time"])
def test_half_precision_is_no_difference(engine_dir: Path, known: dict[str, Network], name: str) -> None:
    """Compared with its float32 twin, it stays within the parity bound; an overflow is a difference."""
    file, feed = file_of(engine_dir, name, HALF), feed_of(known[name], HALF)
    described = json.loads((engine_dir / MANIFEST).read_text())["networks"][name]["builds"]
    accepted = WORST_RATIO * described["onnxruntime-opset23-fp16"]["parity"]["rms_torch"]
    assert first_difference(file, feed, plain, partial(on_onnxruntime, form=HALF), accepted) is None
    graph = onnx.load(str(file)).graph
    weights = {t.name for t in graph.initializer if len(t.dims) > 1 and t.data_type == onnx.TensorProto.FLOAT16}
    node = [node for node in graph.node if weights & set(node.input)][-2]
    overflow = Tampered(scaled(next(value for value in node.input if value in weights), np.inf), HALF)
    found = first_difference(file, feed, plain, overflow, accepted)
    assert found is not None and found.node == node.name and found.error == float("inf")


def test_what_differs_only_as_a_whole(engine_dir: Path, known: dict[str, Network]) -> None:
    """A fusion is wrong, and extra outputs prevent it: no other node is blamed."""
    file, feed = file_of(engine_dir, "text_encoder", SINGLE), feed_of(known["text_encoder"], SINGLE)

    def fused(marked: Path, feed: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        outputs = on_onnxruntime(marked, feed, SINGLE)
        return {name: values * (1.5 if len(outputs) == 2 else 1.0) for name, values in outputs.items()}

    found = first_difference(file, feed, plain, fused, 1e-5)
    assert found is not None and not found.alone and "check how it is fused" in str(found)
    assert found.output in [value.name for value in onnx.load(str(file)).graph.output]


def test_the_sentence(engine_dir: Path, known: dict[str, Network]) -> None:
    file, feed = file_of(engine_dir, "text_encoder", SINGLE), feed_of(known["text_encoder"], SINGLE)
    said = explain(file, partial(on_onnxruntime, form=SINGLE), feed, 1e-5)
    assert said == "No node differs from the unoptimised graph in float32: the graph itself differs from the module."
    node = first_with(onnx.load(str(file)).graph, "LayerNormalization", 0.5)
    said = explain(file, Tampered(scaled(node.input[1], 2.0)), feed, 1e-5)
    assert said.startswith(f"First differing node: {node.name} (LayerNormalization), whose output ")
    fused = Difference("node", "Conv", "value", 0.5, {}, alone=False)
    assert str(fused).startswith("node (Conv), whose output value has an error of 5.0e-01, but not when")


def test_the_flag_reaches_the_workers(checkpoint_dir: Path, known: dict[str, Network], tmp_path: Path) -> None:
    given: dict[str, Any] = {k: v for k, v in vars(parser().parse_args(["--bisect"])).items() if k == "bisect"}
    for options, expected in ((Options(**given), True), (Options(), False)):
        checkpoint, staging = Checkpoint.open(checkpoint_dir), Staging(tmp_path / "engine")
        _, jobs = onnx_jobs(staging, checkpoint, known, targets_of("onnxruntime", "fp32"), options)
        assert len(jobs) == 13 and all(job.bisect is expected for job in jobs)


def test_the_build_s_error_has_it(checkpoint_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ONNX Runtime of a worker computes something else than the graph."""
    from export.building import workers
    from export.forms import Limits
    from export.truth import verify as gate
    from realisid_trt.errors import ParityError

    torch.manual_seed(0)
    source, limits = (checkpoint_dir, None, None), Limits.of_requests(1, 1, 8)
    job = workers.Job("test", "key", source, "local_condition", SINGLE, limits, 0, bisect=True)
    run = gate._on_cpu
    wrong = Tampered(lambda graph: scaled(first_with(graph, "Conv", 0.5).input[1], 1.1)(graph))

    def miscomputed(file: Path, feeds: Any) -> Any:
        return [[values * 1.1 for values in outputs] for outputs in run(file, feeds)]

    monkeypatch.setattr(gate, "_on_cpu", miscomputed)
    monkeypatch.setattr(workers, "on_onnxruntime", lambda marked, feed, form: wrong(marked, feed))
    with pytest.raises(
        ParityError, match=r"local_condition .* has an error of .* First differing node: \w+ \(Conv\), whose"
    ):
        workers.export_network(job, tmp_path)
