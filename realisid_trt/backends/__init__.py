"""What the runtime asks of a machine: load the networks, run them, own their memory, run the fused kernels.

A backend is one file in this folder. The loop in `denoise.py` hands it whole arrays by name and never looks inside
them, so a backend may keep them wherever it likes; on a CPU they are NumPy arrays.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..errors import BackendError, EngineMissing
from ..manifest import Manifest

Tensor = Any  # an array where the backend keeps its arrays: np.ndarray on a CPU

# backend → (module that implements it, package it needs, extra that installs that package)
KNOWN = {"onnxruntime": ("onnxruntime", "onnxruntime", "cpu")}


@dataclass
class Usage:
    """What the backend itself counted: rows evaluated, calls and milliseconds, by network or kernel."""

    rows: dict[str, int] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    ms: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, rows: int, ms: float) -> None:
        self.rows[name] = self.rows.get(name, 0) + rows
        self.calls[name] = self.calls.get(name, 0) + 1
        self.ms[name] = self.ms.get(name, 0.0) + ms


class Backend(Protocol):
    """The small interface. Shapes of the kernels' arguments are stated in `kernels/`."""

    name: str
    device: str
    usage: Usage  # since the last `reset_usage`

    def reset_usage(self) -> None: ...

    def put(self, array: NDArray[Any]) -> Tensor:
        """The array, where the networks and kernels can read it."""

    def get(self, tensor: Tensor) -> NDArray[Any]:
        """A NumPy array that stays valid: waits for what was asked before."""

    def check(self, network: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raises ShapeError if the network cannot be fed with these shapes."""

    def take(self, tensor: Tensor, rows: NDArray[np.int32]) -> Tensor:
        """Rows of a tensor along its first axis, repeated as asked."""

    def run(self, network: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The network's outputs by name, in the manifest's order. They are valid until it runs again."""

    def crop_upsample(self, latents: Tensor, pictures: Tensor, boxes: Tensor, canvas: int) -> Tensor: ...

    def relocate_merge(
        self,
        skips: Sequence[Tensor],
        local_residuals: Sequence[Tensor],
        global_residuals: Sequence[Tensor],
        encoder_of: Tensor,
        branches_of: Tensor,
        boxes: Tensor,
        levels: Sequence[int],
        scales: Tensor,
        mode: str,
        overlap: str,
    ) -> list[Tensor]: ...

    def guide_step(
        self, latents: Tensor, noise_pred: Tensor, decoder_of: Tensor, weights: Tensor, coefficients: Tensor
    ) -> None: ...


def installed(name: str) -> bool:
    """Whether the package that backend `name` needs can be imported."""
    return importlib.util.find_spec(KNOWN[name][1]) is not None


def open_backend(name: str, manifest: Manifest, device: str | None = None) -> Backend:
    """The backend that will run this engine. "auto": the first of the engine's that is installed here.

    Raises BackendError (unknown or not installed, with the command that installs it) or EngineMissing (not built).
    """
    if name == "auto":
        usable = [built for built in manifest.backends if built in KNOWN and installed(built)]
        if not usable:
            extras = " or ".join(f"pip install 'realisid_trt[{KNOWN[b][2]}]'" for b in manifest.backends if b in KNOWN)
            raise BackendError(
                f"{manifest.path} was built for {', '.join(manifest.backends)}; none of them is installed here. "
                f"{extras}."
            )
        name = usable[0]
    if name not in KNOWN:
        raise BackendError(f"backend {name!r} is unknown. Known: auto, {', '.join(KNOWN)}.")
    if name not in manifest.backends:
        raise EngineMissing(
            f"{manifest.path} was built for {', '.join(manifest.backends)}, not for {name}. "
            f"Build that too: python -m export.build --checkpoint … --backend {name} --out {manifest.path}"
        )
    module, package, extra = KNOWN[name]
    if not installed(name):
        raise BackendError(f"backend {name} needs the package {package}. pip install 'realisid_trt[{extra}]'")
    implementation = importlib.import_module(f".{module}", __name__)
    backend: Backend = implementation.open(manifest, device)
    return backend
