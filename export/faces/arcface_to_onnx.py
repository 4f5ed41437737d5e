"""Published weights of a face encoder → the one ONNX file that the runtime runs in OpenCV."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from realisid_trt.errors import BuildError, CheckpointError

from ..checkpoint.classes import compare
from ..forms import CPU, Limits
from ..networks import ROWS, Network, Port
from ..to_onnx import to_onnx
from . import arcface
from .arcface import OUTPUT, SIZE, Architecture, IResNet, IrSe, architecture_of

LIMITS = Limits.of_requests(1, 1, 2)  # any number of faces, whatever is declared here


def load_arcface(weights: Mapping[str, Tensor], source: str) -> tuple[Architecture, IrSe | IResNet]:
    """The architecture of a state dict, and its module in float32 with these weights.

    source: the file, for the error. Raises CheckpointError unless names and shapes are exactly the module's and all
    numbers are finite.
    """
    architecture = architecture_of(weights)
    expected = ", ".join(f"{each.name} {each.blocks}" for each in arcface.ARCHITECTURES)
    if architecture is None:
        raise CheckpointError(
            f"{source} is not a face encoder that is known here: its {len(weights)} keys begin with "
            f"{', '.join(list(weights)[:3])}. Expected the weights of one of these (blocks a stage): {expected}. Give "
            "such a file, or export your encoder to ONNX."
        )
    with torch.device("meta"):
        module = architecture.module()
    shapes = {key: tuple(tensor.shape) for key, tensor in weights.items()}
    missing, unexpected, others = compare(shapes, {key: tuple(t.shape) for key, t in module.state_dict().items()})
    said = [f"{len(keys)} {kind} ({', '.join(keys[:3])})" for kind, keys in
            (("missing", missing), ("unexpected", unexpected)) if keys]  # fmt: skip
    said += [f"{key} of shape {found} instead of {wanted}" for key, found, wanted in others[:3]]
    if said:
        raise CheckpointError(
            f"{source}: the weights are not those of {architecture.name}: {'; '.join(said)}. Get the file again from "
            "where it was published."
        )
    for key, tensor in weights.items():
        if bad := int((~torch.isfinite(tensor)).sum()):
            raise CheckpointError(
                f"{source}: {key} holds {bad} NaN or infinite of {tensor.numel()} numbers. Get the file again."
            )
    values = {key: tensor.float() if tensor.is_floating_point() else tensor for key, tensor in weights.items()}
    module.load_state_dict(values, assign=True)
    return architecture, module.eval().requires_grad_(False)


def arcface_to_onnx(module: IrSe | IResNet, source: str) -> bytes:
    """The ONNX file, opset 20: `image` (N, 3, 112, 112) float32 → `embedding` (N, 512).

    A batch norm after a convolution or a linear layer is part of it. Raises BuildError, with the exporter's message.
    """
    ports = (Port("image", (ROWS, 3, SIZE, SIZE)),), (Port("embedding", (ROWS, OUTPUT)),)
    network = Network("face_encoder", (), *ports, lambda dtype: module)
    with tempfile.TemporaryDirectory(prefix="realisid_trt-arcface-") as folder:
        try:
            to_onnx(network, module, CPU, LIMITS, Path(folder) / "arcface.onnx")
        except BuildError as error:
            raise BuildError(f"{source}: {error}") from error
        return (Path(folder) / "arcface.onnx").read_bytes()
