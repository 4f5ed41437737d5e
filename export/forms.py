"""In which forms networks are exported, and for which sizes. No torch here: a build checks its arguments first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from realisid_trt.backends.tensorrt_flavours import FLAVOURS

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class OnnxForm:
    """Opset and precision of a graph.

    ONNX Runtime's CPU kernels are fastest with opset 20. What runs on GPUs has fused kernels for opset 23's Attention.
    """

    opset: int
    precision: str

    @property
    def name(self) -> str:
        return f"opset{self.opset}-{self.precision}"

    @property
    def itemsize(self) -> int:
        """Bytes of one weight."""
        return 4 if self.precision == "fp32" else 2

    @property
    def dtype(self) -> torch.dtype:
        import torch

        return {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[self.precision]


@dataclass(frozen=True)
class Limits:
    """What the dynamic dimensions may be, in units: smallest and largest.

    rows:      of every network but the next.
    timesteps: rows of the `*_time` networks: steps × distinct texts.
    side:      height and width, in cells of the UNet's coarsest level.
    """

    rows: tuple[int, int]
    timesteps: tuple[int, int]
    side: tuple[int, int]

    @classmethod
    def of_requests(cls, pictures: int, persons: int, side: int) -> Limits:
        """The limits of batches of so many pictures of so many persons, each `side` coarsest cells wide.

        Three rows a picture in the UNet, three rows a person in the branches when nothing is shared.
        """
        return cls(rows=(1, 3 * pictures * max(1, persons)), timesteps=(1, 1000 * 2 * pictures), side=(2, max(2, side)))

    def of(self, unit: str) -> tuple[int, int]:
        """Least and most of a unit: "rows", "timesteps", "height" or "width"."""
        return {"rows": self.rows, "timesteps": self.timesteps, "height": self.side, "width": self.side}[unit]


@dataclass(frozen=True)
class Target:
    """What one build is for: a backend on a kind of device ("cpu" or "cuda"), and the form of its networks."""

    backend: str
    device: str
    form: OnnxForm

    @property
    def build(self) -> str:
        """What the manifest calls the build."""
        return f"{self.backend}-{self.form.name}"

    @property
    def has_plans(self) -> bool:
        """Whether its networks run as TensorRT plans, and not as ONNX files."""
        return self.backend in FLAVOURS

    def artifact(self, network: str) -> str:
        """What a build calls one network of this target."""
        return f"{network}:{self.build}" if self.has_plans else artifact_name(network, self.form_of(network))

    def form_of(self, network: str) -> OnnxForm:
        """The form of one network: those of WIDE are float32 in every build."""
        return OnnxForm(self.form.opset, "fp32") if network in WIDE else self.form


# Networks that half precision would harm, with the reason.
WIDE = {"vae_decoder": "SDXL's VAE overflows float16, and it runs once"}
BACKENDS = ("onnxruntime", *FLAVOURS)
CPU = OnnxForm(20, "fp32")


def targets_of(backend: str, precision: str) -> list[Target]:
    """What is built for a backend. All that is for a GPU shares one form.

    ONNX Runtime's float32 is for a CPU, and its float16 for a GPU, beside it. It has no bfloat16 convolutions.
    """
    gpu = OnnxForm(23, precision)
    if backend in FLAVOURS:
        return [Target(backend, "cuda", gpu)]
    return [Target(backend, "cpu", CPU), *([Target(backend, "cuda", gpu)] if precision == "fp16" else [])]


def artifact_name(network: str, form: OnnxForm) -> str:
    """What a build calls the graph of one network in one form."""
    return f"{network}:{form.name}"
