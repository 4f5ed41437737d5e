"""The proof of a network's precision, read back from the definition that the builder got.

TensorRT types its networks strongly: a tensor has the type that the graph gives it, and no flag changes that. So a
graph that is float32 by mistake builds without an error. This check finds it.
"""

from __future__ import annotations

import json
import math
import mmap
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from realisid_trt.backends.tensorrt_flavours import Flavour
from realisid_trt.errors import BuildError

from ..forms import FLOAT32_NETWORKS

if TYPE_CHECKING:
    import tensorrt as trt

TYPES = {"fp32": "FLOAT", "fp16": "HALF", "bf16": "BF16"}


@dataclass(frozen=True)
class AllowedFloat32:
    """Float32 that a half-precision build may hold, and why. Any other float32 tensor fails the build.

    network, name: patterns of networks' and tensors' or layers' names. kinds: of layers; None: any.
    most:          elements of one tensor, dynamic sizes not counted; None: any number.
    """

    network: str
    reason: str
    name: str = ".*"
    kinds: frozenset[str] | None = None
    most: int | None = None

    def admits(self, network: str, name: str, kind: str, elements: int) -> bool:
        return (
            re.fullmatch(self.network, network) is not None
            and re.fullmatch(self.name, name) is not None
            and (self.kinds is None or kind in self.kinds)
            and (self.most is None or elements <= self.most)
        )


# The inspector's names of the types, the widest first: a layer that writes two types counts as the wider one.
INSPECTED = {"FLOAT": r"\b(FP32|Float)\b", "BF16": r"\b(BF16|BFloat16)\b", "HALF": r"\b(FP16|Half)\b"}
SINUSOIDS = frozenset({"CONSTANT", "ELEMENTWISE", "UNARY", "SHUFFLE", "CONCATENATION", "UNSQUEEZE", "SHAPE"})
MOST_SINUSOIDS = 6 * 512  # of the six time_ids; a timestep alone has fewer
ALLOWED = (
    *(AllowedFloat32(network, reason) for network, reason in FLOAT32_NETWORKS.items()),
    AllowedFloat32(
        ".*_time",
        "half precision does not hold the angles of a thousand steps",
        name="timestep|time_ids",
        kinds=frozenset({"INPUT"}),
    ),
    AllowedFloat32(
        ".*_time", "the sinusoids of those angles, before they are narrowed", kinds=SINUSOIDS, most=MOST_SINUSOIDS
    ),
    AllowedFloat32(".*", "a single number, such as the scale of an attention", kinds=frozenset({"CONSTANT"}), most=1),
)


@dataclass
class Proof:
    """The share of a network that has the requested precision.

    layers, outputs: of the network definition that the plan was built from. half: outputs in that precision.
    wider:           reason → number of tensors that stay float32.
    weights_bytes:   by type.
    attentions:      in the graph; fused: kernels of fused attention named in the plan, None if the plan does not name
                     its kernels.
    """

    precision: str
    layers: int = 0
    outputs: int = 0
    half: int = 0
    wider: dict[str, int] = field(default_factory=dict)
    weights_bytes: dict[str, int] = field(default_factory=dict)
    attentions: int = 0
    fused: int | None = None
    inputs: dict[str, str] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        return dict(vars(self))


def prove(definition: trt.INetworkDefinition, flavour: Flavour, network: str, precision: str) -> Proof:
    """The proof for a network definition. Raises BuildError for float32 tensors that ALLOWED does not list.

    precision: "fp32", "fp16" or "bf16".
    """
    if TYPE_CHECKING:
        import tensorrt as trt
    else:
        trt = flavour.module
    floats_known = set(TYPES.values())
    proof = Proof(precision, layers=definition.num_layers)
    floats, wider, surplus = Counter[str](), Counter[str](), list[str]()

    def see(kind: str, name: str, tensor: trt.ITensor) -> str:
        dtype = tensor.dtype.name
        if precision != "fp32" and dtype in floats_known - {TYPES[precision]}:
            admitted = (
                a.reason for a in ALLOWED if dtype == "FLOAT" and a.admits(network, name, kind, _volume(tensor))
            )
            reason = next(admitted, None)
            if reason is None:
                shape = "×".join(map(str, tensor.shape)) or "scalar"
                surplus.append(f"{name} ({kind.lower()}, {dtype.lower()}, {shape})")
            else:
                wider[reason] += 1
        return dtype

    for index in range(definition.num_inputs):
        tensor = definition.get_input(index)
        proof.inputs[tensor.name] = see("INPUT", tensor.name, tensor)
    for index in range(definition.num_layers):
        layer = definition.get_layer(index)
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            proof.attentions += 1
        for number in range(layer.num_outputs):
            dtype = see(layer.type.name, layer.name, layer.get_output(number))
            floats[dtype] += dtype in floats_known
    proof.outputs, proof.half = sum(floats.values()), floats[TYPES[precision]]
    proof.wider = dict(wider)
    if surplus:
        raise BuildError(
            f"{network} should be {precision}, but {len(surplus)} of its tensors are not, such as "
            f"{', '.join(surplus[:3])}. The tensors that may stay wider are listed in export/truth/proof.py; a plan of "
            "this graph would be as slow as float32. Report this with the checkpoint's configuration."
        )
    return proof


def layers_by_type(inspected: str) -> dict[str, int]:
    """The number of layers of a loaded plan by the type that they write, from the JSON of TensorRT's inspector.

    Releases name the types differently: "Half", "Row major linear FP16 format". A layer of no known type is "other".
    """
    found = Counter[str]()
    for layer in json.loads(inspected).get("Layers", []):
        outputs = layer.get("Outputs", []) if isinstance(layer, dict) else []  # a bare name at a lower verbosity
        words = " ".join(str(value) for output in outputs for key, value in output.items() if "Format" in key)
        kinds = [kind for kind, pattern in INSPECTED.items() if re.search(pattern, words)]
        found[kinds[0] if kinds else "other"] += 1
    return dict(found)


def weights_bytes(onnx_file: Path) -> dict[str, int]:
    """Bytes of the graph's weights by type. The weights themselves are not read."""
    import onnx

    model = onnx.load(str(onnx_file), load_external_data=False)
    found = Counter[str]()
    for tensor in model.graph.initializer:
        name = onnx.TensorProto.DataType.Name(tensor.data_type)
        elements = 1
        for size in tensor.dims:
            elements *= size
        found[name] += elements * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    return dict(found)


def fused_attentions(plan: Path) -> int:
    """The number of parameter blocks of fused attention kernels that the plan names."""
    with open(plan, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        count, at = 0, content.find(b"attention_params")
        while at >= 0:
            count, at = count + 1, content.find(b"attention_params", at + 1)
        return count


def _volume(tensor: trt.ITensor) -> int:
    """The number of elements, with a dynamic size counted as one."""
    return math.prod(max(1, size) for size in tensor.shape)
