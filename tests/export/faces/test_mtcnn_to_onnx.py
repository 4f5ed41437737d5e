"""MTCNN's weights: read without trust, and graphs that compute what torch computes."""

from __future__ import annotations

import io
import pickle
from typing import Any

import numpy as np
import pytest
import torch

from export import wheels
from export.face_models import MTCNN_MEMBERS
from export.faces.mtcnn_to_onnx import mtcnn_to_onnx, read_torch_weights
from realisid_trt.errors import BuildError
from tests.export.faces.in_opencv import run


def test_a_pickle_that_holds_more_than_tensors_is_refused(capfd: pytest.CaptureFixture[str]) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return print, ("executed",)

    integers, number = io.BytesIO(), io.BytesIO()
    torch.save({"weight": torch.zeros(2, dtype=torch.int64)}, integers)
    torch.save({"weight": 7}, number)
    for content in (pickle.dumps(Evil()), b"", b"PK\x03\x04", pickle.dumps(7), integers.getvalue(), number.getvalue()):
        with pytest.raises(BuildError, match="facenet-pytorch 2.6.0"):
            read_torch_weights(content)
    assert "executed" not in capfd.readouterr().out


@pytest.mark.parametrize("net", ["pnet", "rnet", "onet"])
def test_mtcnn_graphs_compute_what_torch_computes(net: str) -> None:
    member = f"facenet_pytorch/data/{net}.pt"
    path = wheels.fetch_members("facenet-pytorch==2.6.0", MTCNN_MEMBERS)[member]
    weights = read_torch_weights(path.read_bytes())
    loaded = {name: torch.from_numpy(weight) for name, weight in weights.items()}

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
    for name, result in run(graph, {"image": image.astype(np.float32)}).items():
        np.testing.assert_allclose(result, expected[name].numpy(), rtol=1e-4, atol=1e-5)
