"""In which forms networks are exported, and for which sizes. No torch here: a build checks its arguments first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class OnnxForm:
    """Opset and precision of a graph.

    ONNX Runtime's CPU kernels are fastest with opset 20; TensorRT reads opset 23's Attention and GroupNormalization.
    """

    opset: int
    precision: str

    @property
    def name(self) -> str:
        return f"opset{self.opset}-{self.precision}"

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


# backend → the form it reads
FORMS = {"onnxruntime": OnnxForm(opset=20, precision="fp32")}


def artifact_name(network: str, form: OnnxForm) -> str:
    """What a build calls one network in one form."""
    return f"{network}:{form.name}"
