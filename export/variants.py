"""How networks are exported, and for which sizes. No torch here: a build checks its arguments before it loads that."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Variant:
    """How a network is exported: opset and precision.

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

    rows: tuple[int, int] = (1, 96)
    timesteps: tuple[int, int] = (1, 8192)
    side: tuple[int, int] = (2, 64)

    def of(self, unit: str) -> tuple[int, int]:
        return self.side if unit in ("height", "width") else getattr(self, unit)


# backend → how its networks are exported
VARIANTS = {"onnxruntime": Variant(opset=20, precision="fp32")}


def artifact_name(network: str, variant: Variant) -> str:
    """What a build calls one network in one variant."""
    return f"{network}:{variant.name}"
