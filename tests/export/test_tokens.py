"""Networks that read text and IDs take any number of tokens: one graph, and one plan with fused attention."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from export.building.planning import _tokens
from export.checkpoint import Checkpoint
from export.forms import Limits, OnnxForm
from export.miniature import make_checkpoint
from export.networks import ROWS, Network, Port, Size, networks
from export.profiles import profiles
from export.to_onnx import _traced_tokens, example, port_entry, to_onnx
from export.to_plan import PlanSettings, to_plan
from export.truth.exact import in_float64
from export.truth.verify import WORST_RATIO, rms_of
from realisid_trt.errors import ShapeError
from realisid_trt.manifest import Port as RuntimePort

PERSONS = 8
COUNTS = (77, 93, 141, 205)  # of nobody, one, four and eight persons


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """The preset whose heads are wide enough for fused attention."""
    folder = tmp_path_factory.mktemp("tokens") / "idpatch"
    return Checkpoint.open(make_checkpoint(folder, method="idpatch", preset="world"))


def limits_of(checkpoint: Checkpoint) -> Limits:
    return Limits.of_requests(1, PERSONS, 16, checkpoint.token_limits(PERSONS))


def test_who_reads_text_and_ids_has_an_axis_of_tokens(checkpoint: Checkpoint) -> None:
    found, form = networks(checkpoint), OnnxForm(20, "fp32")
    dynamic = {
        name: [port.name for port in network.inputs if Size("tokens") in port.shape] for name, network in found.items()
    }
    reading = ("id_patch_branch", "unet_encoder", "unet_decoder")
    assert {name: ports for name, ports in dynamic.items() if ports} == {name: ["tokens"] for name in reading}
    [tokens] = [port for port in found["unet_encoder"].inputs if port.name == "tokens"]
    entry = port_entry(tokens, form, limits_of(checkpoint))
    assert entry["shape"][1] == {"axis": "tokens", "min": 77, "max": 205, "multiple": 1}  # type: ignore[index]
    [shown] = found["id_patch_condition"].inputs
    assert shown.name == "id_patches"
    [values] = example((shown,), {"rows": 1, "height": 2, "width": 2}, torch.float32)
    assert values.min() < -1 and values.max() > 2  # patches are not pixels


def test_the_encoder_of_embeddings_gives_tokens_and_patches(checkpoint: Checkpoint) -> None:
    network = networks(checkpoint)["id_encoder"]
    assert network.components == ("id_projection", "id_patch_projection")
    [port] = network.inputs
    assert (port.name, port.shape[1:], port.unit) == ("embedding", (1, 512), True)
    embedding = torch.randn(2, 1, 512)
    id_tokens, id_patch = network.module(torch.float32)(embedding)
    assert [output.name for output in network.outputs] == ["id_tokens", "id_patch"]
    assert id_tokens.shape == (2, 16, 96) and id_patch.shape == (2, 3, 64, 64)
    rows = checkpoint.load_patch_projection()(embedding)  # query = colour, row-major
    assert torch.equal(id_patch[1, 2, 5], rows[1, 2, 5 * 64 : 6 * 64])


def test_an_embedding_is_tried_at_the_length_that_it_will_have(checkpoint: Checkpoint) -> None:
    """At length 1 an error in half precision would say nothing about embeddings of length 20."""
    assert checkpoint.face_encoder is not None and checkpoint.face_encoder.norm == "unit"
    raw = dataclasses.replace(checkpoint, face_encoder=dataclasses.replace(checkpoint.face_encoder, norm="raw"))
    lengths = []
    for known in (checkpoint, raw):
        [embedding] = example(networks(known)["id_encoder"].inputs, {"rows": 3}, torch.float32)
        lengths.append(embedding.norm(dim=-1))
    assert torch.allclose(lengths[0], torch.ones(3, 1)) and lengths[1].min() > 15 and lengths[1].max() < 30


def test_a_trace_has_more_tokens_than_the_text_and_no_size_twice(checkpoint: Checkpoint) -> None:
    """torch.export takes two equal sizes for one."""
    units = {"rows": 2, "timesteps": 2, "height": 3, "width": 4}
    for name in ("unet_encoder", "unet_decoder", "id_patch_branch"):
        network = networks(checkpoint)[name]
        for persons in (1, 2, PERSONS):
            limits = checkpoint.token_limits(persons)
            assert limits is not None
            count = _traced_tokens(network, units, limits)
            sizes = [
                units[size.unit] * size.factor if isinstance(size, Size) else size
                for port in network.inputs
                for size in port.shape
                if size != Size("tokens")
            ]
            assert count not in sizes and 77 < count <= limits[1]
            assert count >= 93 or persons == 1
    assert _traced_tokens(networks(checkpoint)["unet_encoder"], {**units, "height": 24}, (77, 205)) != 96  # 4 · 24


def test_an_engine_of_nobody_has_no_room_for_one(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """The number of tokens is a constant of its graph, and its manifest admits no other."""
    limits = Limits.of_requests(1, 0, 16, checkpoint.token_limits(0))
    assert limits.tokens == (77, 77)
    [profile] = profiles(["unet_encoder"], 1, 0, (2, 8, 16), 50, checkpoint.config, _tokens(77, 77, 16)).values()
    assert {sizes["tokens"] for sizes in (profile.least, profile.best, profile.most)} == {77}
    assert _tokens(77, 205, 16) == (77, 93, 205)
    form = OnnxForm(20, "fp32")
    tokens = RuntimePort.from_dict(port_entry(Port("tokens", (ROWS, Size("tokens"), 96)), form, limits))
    tokens.check((1, 77, 96), "unet_encoder")
    with pytest.raises(ShapeError, match=r"tokens is \(1, 93, 96\), expected .*tokens in 77..77.*larger .*--persons"):
        tokens.check((1, 93, 96), "unet_encoder")
    ports = (Port("tokens", (ROWS, Size("tokens"), 96)),), (Port("found", (ROWS, Size("tokens"), 3)),)
    network = Network("reader", (), *ports, lambda dtype: torch.nn.Linear(96, 3))
    to_onnx(network, network.module(form.dtype), form, limits, tmp_path / "reader.onnx")
    [port] = onnxruntime.InferenceSession(tmp_path / "reader.onnx", providers=["CPUExecutionProvider"]).get_inputs()
    assert port.shape == ["rows", 77, 96]


@pytest.mark.slow
@torch.no_grad()
def test_one_graph_is_right_at_every_number_of_tokens(checkpoint: Checkpoint, tmp_path: Path) -> None:
    network, form = networks(checkpoint)["id_patch_branch"], OnnxForm(20, "fp32")
    module = network.module(form.dtype)
    to_onnx(network, module, form, limits_of(checkpoint), tmp_path / "branch.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "branch.onnx"), providers=["CPUExecutionProvider"])
    for count in COUNTS:
        units = {"rows": 2, "timesteps": 1, "height": 3, "width": 2, "tokens": count}
        inputs = example(network.inputs, units, torch.float32, seed=count)
        feed = {port.name: tensor.numpy() for port, tensor in zip(network.inputs, inputs, strict=True)}
        truth, plain = in_float64(module, inputs), module(*inputs)
        for ours, exact, theirs in zip(session.run(None, feed), truth, plain, strict=True):
            scale = rms_of(exact.numpy())
            error, error_torch = (rms_of(np.asarray(each) - exact.numpy()) / scale for each in (ours, theirs))
            assert error <= WORST_RATIO * error_torch, (count, error, error_torch)


@pytest.mark.slow
def test_a_plan_of_every_number_of_tokens_has_all_attention_fused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """With heads of 32. It can be captured, and every tensor is in half precision."""
    pytest.importorskip("tensorrt_rtx")
    network, form = networks(checkpoint)["unet_encoder"], OnnxForm(23, "fp16")
    to_onnx(network, network.module(form.dtype), form, limits_of(checkpoint), tmp_path / "encoder.onnx")
    [profile] = profiles(
        ["unet_encoder"], 1, PERSONS, (2, 8, 16), 50, checkpoint.config, (COUNTS[0], COUNTS[1], COUNTS[-1])
    ).values()
    shapes = {port.name: found for port in network.inputs if (found := profile.shapes(port)) is not None}
    assert [sizes[1] for sizes in shapes["tokens"]] == [77, 93, 205]
    settings = PlanSettings("tensorrt-rtx", "fp16", ("sm_86", "sm_89"))
    built = to_plan(tmp_path / "encoder.onnx", tmp_path / "encoder.plan", "unet_encoder", shapes, settings)
    assert built.capturable and built.proof.half == built.proof.outputs
    assert built.proof.fused == built.proof.attentions == 10
