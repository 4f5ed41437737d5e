"""Face encoders: published keys → ONNX → OpenCV, against the torch module; and weights that are refused."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from export.checkpoint.face_encoder import check_graph
from export.faces import arcface
from export.faces.arcface import ARCHITECTURES, Architecture, architecture_of
from export.faces.arcface_to_onnx import arcface_to_onnx, load_arcface
from realisid_trt.errors import CheckpointError
from realisid_trt.persons.faces.cv_net import CvNet
from realisid_trt.persons.faces.face_encoder import FaceEncoder
from tests.export.checkpoint.encoders import CONFIG
from tests.export.faces.random_arcface import SMALL, SMALL_SE, random_arcface, save_as_published

SMALLS = {"se": SMALL_SE, "plain": SMALL}
Array = NDArray[Any]


@pytest.fixture(scope="module", params=SMALLS)
def converted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A random module, and the ONNX file of its published weights."""
    folder = tmp_path_factory.mktemp("arcface")
    module = random_arcface(SMALLS[request.param])
    save_as_published(module, folder / "published.pth")
    weights = torch.load(folder / "published.pth", mmap=True, weights_only=True, map_location="cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arcface, "ARCHITECTURES", (SMALL_SE, SMALL))
        architecture, loaded = load_arcface(weights, "published.pth")
    assert architecture == SMALLS[request.param]
    (folder / "arcface.onnx").write_bytes(arcface_to_onnx(loaded, "published.pth"))
    return module, folder / "arcface.onnx"


def exact(module: torch.nn.Module, faces: Array) -> Array:
    """The module's embeddings, computed in float64."""
    with torch.no_grad():
        return np.asarray(copy.deepcopy(module).double()(torch.from_numpy(faces).double()))


def rms(values: Array) -> float:
    return float(np.sqrt((values.astype(np.float64) ** 2).mean()))


def test_opencv_computes_what_torch_computes(converted: tuple[Any, Path]) -> None:
    """For one face and for two. OpenCV may err twice as much as torch in float32."""
    module, file = converted
    check_graph(file)
    net = CvNet(file)
    for seed, batch in enumerate((1, 2, 1)):
        faces = np.random.default_rng(seed).uniform(-1, 1, (batch, 3, 112, 112)).astype(np.float32)
        truth = exact(module, faces)
        [found] = net(faces).values()
        with torch.no_grad():
            plain = module(torch.from_numpy(faces)).numpy()
        assert found.shape == (batch, 512)
        assert rms(found - truth) <= 2 * rms(plain - truth)


def test_red_for_blue_is_another_face(converted: tuple[Any, Path]) -> None:
    """The runtime's encoder agrees with torch if the config has the right colours, and only then."""
    module, file = converted
    aligned = np.random.default_rng(5).integers(0, 256, (112, 112, 3)).astype(np.uint8)
    bgr = ((aligned[:, :, ::-1].astype(np.float64) - 127.5) / 127.5).transpose(2, 0, 1)[None]
    truth = exact(module, bgr.astype(np.float32))[0]
    values = {**CONFIG, "norm": "raw", "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    errors = {
        colour: rms(FaceEncoder(file.parent, {**values, "colour": colour}).embed(aligned) - truth) / rms(truth)
        for colour in ("bgr", "rgb")
    }
    assert errors["bgr"] < 1e-5 < 1e-2 < errors["rgb"]


def test_embeddings_of_ir_se_have_length_one(converted: tuple[Any, Path]) -> None:
    module, file = converted
    faces = np.random.default_rng(1).uniform(-1, 1, (2, 3, 112, 112)).astype(np.float32)
    [found] = CvNet(file)(faces).values()
    is_unit = np.abs(np.linalg.norm(found, axis=1) - 1).max() < 1e-6
    assert is_unit == isinstance(module, arcface.IrSe)


def test_batch_norms_after_convolutions_are_folded(converted: tuple[Any, Path]) -> None:
    """Left is one a block, before a convolution that pads with zeros, and the one before the linear layer."""
    module, file = converted
    kinds = [node.op_type for node in onnx.load(file).graph.node]
    assert kinds.count("BatchNormalization") == sum(SMALL.blocks) + 1
    assert onnx.load(file).opset_import[0].version == 20
    assert sum(isinstance(part, torch.nn.BatchNorm2d) for part in module.modules()) > sum(SMALL.blocks) + 1


@pytest.mark.parametrize(
    ("name", "keys", "numbers"), [("ir_se50", 397, 43.80), ("iresnet50", 475, 43.59), ("iresnet100", 925, 65.16)]
)
def test_sizes_of_the_published_ones(name: str, keys: int, numbers: float) -> None:
    architecture = next(each for each in ARCHITECTURES if each.name == name)
    with torch.device("meta"):
        module = architecture.module()
    weights = module.state_dict()
    assert len(weights) == keys and architecture_of(weights) == architecture
    assert round(sum(parameter.numel() for parameter in module.parameters()) / 1e6, 2) == numbers
    # An encoder that was cut off, or of another depth, is none of these.
    assert architecture_of([key for key in weights if not key.startswith(("body.23", "layer4.2"))]) is None


# Some keys of the published files, with their shapes.
PUBLISHED = {
    "ir_se50": {
        "input_layer.0.weight": (64, 3, 3, 3), "input_layer.1.running_mean": (64,), "input_layer.2.weight": (64,),
        "body.0.res_layer.0.num_batches_tracked": (), "body.0.res_layer.1.weight": (64, 64, 3, 3),
        "body.3.shortcut_layer.0.weight": (128, 64, 1, 1), "body.3.shortcut_layer.1.bias": (128,),
        "body.23.res_layer.5.fc1.weight": (32, 512, 1, 1), "body.23.res_layer.5.fc2.weight": (512, 32, 1, 1),
        "output_layer.0.running_var": (512,), "output_layer.3.weight": (512, 25088), "output_layer.4.weight": (512,),
    },
    "iresnet100": {
        "conv1.weight": (64, 3, 3, 3), "bn1.running_var": (64,), "prelu.weight": (64,),
        "layer1.0.bn1.weight": (64,), "layer1.0.downsample.0.weight": (64, 64, 1, 1),
        "layer2.0.downsample.1.running_mean": (128,), "layer3.29.conv2.weight": (256, 256, 3, 3),
        "layer4.2.prelu.weight": (512,), "layer4.2.bn3.bias": (512,), "bn2.weight": (512,),
        "fc.weight": (512, 25088), "fc.bias": (512,), "features.running_mean": (512,),
    },
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_keys_of_the_published_ones(name: str) -> None:
    with torch.device("meta"):
        weights = next(each for each in ARCHITECTURES if each.name == name).module().state_dict()
    assert {key: tuple(weights[key].shape) for key in PUBLISHED[name]} == PUBLISHED[name]


Spoil = Callable[[dict[str, Tensor]], object]
BAD: dict[str, tuple[Spoil, str]] = {
    "missing": (lambda w: w.pop("output_layer.4.bias"), "1 missing (output_layer.4.bias). Get the file again"),
    "surplus": (lambda w: w.update(kernel=torch.zeros(512, 9)), "not those of small_se: 1 unexpected (kernel)."),
    "shape": (
        lambda w: w.update({"output_layer.3.bias": torch.zeros(256)}),
        "output_layer.3.bias of shape (256,) instead of (512,).",
    ),
    "NaN": (
        lambda w: w["input_layer.0.weight"].view(-1)[2:5].fill_(float("nan")),
        "w.pth: input_layer.0.weight holds 3 NaN or infinite of 432 numbers. Get the file again.",
    ),
    "depth": (
        lambda w: [w.pop(key) for key in list(w) if key.startswith("body.4.")],
        "is not a face encoder that is known here: its ",
    ),
    "wrapped": (
        lambda w: [w.update({f"module.{key}": w.pop(key)}) for key in list(w)],
        "keys begin with module.input_layer.0.weight",
    ),
    "empty": (lambda w: w.clear(), "Expected the weights of one of these (blocks a stage): small_se (2, 1, 1, 1)"),
}


@pytest.mark.parametrize("name", BAD)
def test_other_weights_are_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arcface, "ARCHITECTURES", (SMALL_SE, SMALL))
    weights = {key: value.clone() for key, value in random_arcface(SMALL_SE).state_dict().items()}
    spoil, piece = BAD[name]
    spoil(weights)
    with pytest.raises(CheckpointError) as caught:
        load_arcface(weights, "w.pth")
    assert piece in str(caught.value) and str(caught.value).startswith("w.pth")


def test_an_architecture_by_its_keys() -> None:
    for architecture in (*SMALLS.values(), Architecture("other", False, (1, 1, 1, 1), SMALL.widths)):
        assert architecture_of(architecture.module().state_dict()) is None  # their depths are nobody's
    assert architecture_of(["conv1.weight"]) is None
