"""ONNX Runtime on a CPU: the embedded default. Tensors are NumPy arrays, the fused kernels NumPy."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

import realisid_trt.kernels as kernels

from ..errors import BackendError, RequestError
from ..manifest import Manifest
from . import Tensor, Usage


def open(manifest: Manifest, device: str | None) -> OnnxRuntime:
    """The backend for this engine. device: "cpu", or "cpu:N" for N threads; None takes every core it may use."""
    return OnnxRuntime(manifest, device or "cpu")


def _cores() -> int:
    """The cores this process may use: a container's share, not the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class OnnxRuntime:
    """Sessions on the CPU execution provider, made when a network first runs."""

    name = "onnxruntime"

    def __init__(self, manifest: Manifest, device: str) -> None:
        kind, _, count = device.partition(":")
        if kind != "cpu" or (count and not (count.isdigit() and int(count) > 0)):
            raise RequestError(f"device {device!r} is unknown to backend onnxruntime. Use cpu, or cpu:N for N threads.")
        self.device = device
        self.usage = Usage()
        self._folder = manifest.path
        self._networks = manifest.networks(self.name)
        self._sessions: dict[str, ort.InferenceSession] = {}
        self._lock = threading.Lock()
        self._options = ort.SessionOptions()
        self._options.intra_op_num_threads = int(count) if count else _cores()
        self._options.log_severity_level = 3

    def reset_usage(self) -> None:
        self.usage = Usage()

    def put(self, array: NDArray[Any]) -> Tensor:
        return np.ascontiguousarray(array)

    def get(self, tensor: Tensor) -> NDArray[Any]:
        return np.array(tensor)

    def check(self, network: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._networks[network].check(shapes)

    def take(self, tensor: Tensor, rows: NDArray[np.int32]) -> Tensor:
        return tensor if len(rows) == len(tensor) and (rows == np.arange(len(rows))).all() else tensor[rows]

    def run(self, network: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        build = self._networks[network]
        build.check({name: value.shape for name, value in inputs.items()})
        session = self._session(network)
        start = time.perf_counter()
        try:
            outputs = session.run(None, dict(inputs))
        except Exception as error:  # ONNX Runtime has no common base for what it raises
            raise BackendError(f"ONNX Runtime failed in {network}: {error}") from error
        self.usage.add(network, len(outputs[0]), (time.perf_counter() - start) * 1e3)
        return dict(zip((port.name for port in build.outputs), outputs, strict=True))

    def _session(self, network: str) -> ort.InferenceSession:
        with self._lock:
            if network not in self._sessions:
                file = self._folder / self._networks[network].file
                try:
                    session = ort.InferenceSession(str(file), self._options, providers=["CPUExecutionProvider"])
                except Exception as error:
                    raise BackendError(
                        f"ONNX Runtime {ort.__version__} cannot load {file}: {error}. "
                        "If it is older than the one the engine was verified with, pip install --upgrade onnxruntime."
                    ) from error
                self._sessions[network] = session
            return self._sessions[network]

    def crop_upsample(self, latents: Tensor, pictures: Tensor, boxes: Tensor, canvas: int) -> Tensor:
        start = time.perf_counter()
        faces = kernels.crop_upsample(latents, pictures, boxes, canvas)
        self.usage.add("crop_upsample", len(faces), (time.perf_counter() - start) * 1e3)
        return faces

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
    ) -> list[Tensor]:
        start = time.perf_counter()
        merged = kernels.relocate_merge(
            skips, local_residuals, global_residuals, encoder_of, branches_of, boxes, levels, scales, mode, overlap
        )
        self.usage.add("relocate_merge", len(encoder_of), (time.perf_counter() - start) * 1e3)
        return list(merged)

    def guide_step(
        self, latents: Tensor, noise_pred: Tensor, decoder_of: Tensor, weights: Tensor, coefficients: Tensor
    ) -> None:
        start = time.perf_counter()
        kernels.guide_step(latents, noise_pred, decoder_of, weights, coefficients)
        self.usage.add("guide_step", len(latents), (time.perf_counter() - start) * 1e3)
