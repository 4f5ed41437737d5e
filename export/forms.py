"""The forms and sizes in which networks are exported. No torch here: a build checks its arguments first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from realisid_trt.backends.tensorrt_flavours import FLAVOURS

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class OnnxForm:
    """Opset and precision of a graph.

    ONNX Runtime's CPU kernels are fastest with opset 20. GPU backends have fused kernels for opset 23's Attention.
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
    """The smallest and largest sizes of the dynamic dimensions, in units.

    rows:      rows of every network except the `*_time` networks.
    timesteps: rows of the `*_time` networks: steps × distinct texts.
    side:      height and width, in cells of the UNet's coarsest level.
    tokens:    of a row that reads text and IDs; None where no network does.
    """

    rows: tuple[int, int]
    timesteps: tuple[int, int]
    side: tuple[int, int]
    tokens: tuple[int, int] | None = None

    @classmethod
    def of_requests(cls, pictures: int, persons: int, side: int, tokens: tuple[int, int] | None = None) -> Limits:
        """The limits of batches of `pictures` pictures of `persons` persons, each `side` coarsest cells wide.

        When nothing is shared, the UNet has three rows per picture, and a branch three rows per person or picture.
        """
        rows, timesteps = (1, 3 * pictures * max(1, persons)), (1, 1000 * 2 * pictures)
        return cls(rows=rows, timesteps=timesteps, side=(2, max(2, side)), tokens=tokens)

    def of(self, unit: str) -> tuple[int, int]:
        """Least and most of a unit: "rows", "timesteps", "height", "width" or "tokens"."""
        if unit == "tokens":
            assert self.tokens is not None, "no network was said to read text and IDs"
            return self.tokens
        return {"rows": self.rows, "timesteps": self.timesteps, "height": self.side, "width": self.side}[unit]


@dataclass(frozen=True)
class Target:
    """The target of one build: a backend on a kind of device ("cpu" or "cuda"), and the form of its networks."""

    backend: str
    device: str
    form: OnnxForm

    @property
    def build(self) -> str:
        """The build's name in the manifest."""
        return f"{self.backend}-{self.form.name}"

    @property
    def has_plans(self) -> bool:
        """Whether its networks run as TensorRT plans, and not as ONNX files."""
        return self.backend in FLAVOURS

    def artifact(self, network: str) -> str:
        """The name of one network of this target, as an artifact of a build."""
        return f"{network}:{self.build}" if self.has_plans else artifact_name(network, self.form_of(network))

    def form_of(self, network: str) -> OnnxForm:
        """The form of one network: those of FLOAT32_NETWORKS are float32 in every build."""
        return OnnxForm(self.form.opset, "fp32") if network in FLOAT32_NETWORKS else self.form


# Networks that half precision would harm, with the reason.
FLOAT32_NETWORKS = {"vae_decoder": "SDXL's VAE overflows float16, and it runs once"}
BACKENDS = ("onnxruntime", *FLAVOURS)
CPU = OnnxForm(20, "fp32")


def targets_of(backend: str, precision: str) -> list[Target]:
    """The targets of a backend. All targets for a GPU share one form.

    ONNX Runtime gets float32 for a CPU and, with fp16, float16 for a GPU as well. It has no bfloat16 convolutions.
    """
    gpu = OnnxForm(23, precision)
    if backend in FLAVOURS:
        return [Target(backend, "cuda", gpu)]
    return [Target(backend, "cpu", CPU), *([Target(backend, "cuda", gpu)] if precision == "fp16" else [])]


def artifact_name(network: str, form: OnnxForm) -> str:
    """The name of the graph of one network in one form, as an artifact of a build."""
    return f"{network}:{form.name}"
