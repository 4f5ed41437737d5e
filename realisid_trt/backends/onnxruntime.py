"""ONNX Runtime. On a CPU, the default, tensors are NumPy arrays and the fused kernels are NumPy code. For a GPU see
`onnxruntime_cuda.py`."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

import realisid_trt.kernels as kernels

from ..errors import BackendError, RequestError
from ..machine import available_cores
from ..manifest import Build, Manifest
from . import Backend, MergeRows, Tensor, Usage
from .sessions import session_options

MOST_THREADS = 1024  # a larger number is a mistake


def open_here(
    name: str,
    manifest: Manifest,
    device: str | None,
    networks: Collection[str] | None,
    cuda_graph: bool | None,
    preload: bool = True,
) -> Backend:
    """The backend for this engine.

    device:     "cpu", "cpu:N" for N threads, "cuda" or "cuda:N" for the GPU of that number; None: a GPU if the engine
                was built for one and one can be used, else the CPU with every core that this process may use.
    cuda_graph: on a GPU, capture and replay steps; None: no.
    preload:    open the networks now; False: each when it first runs.
    """
    build = manifest.build_for(name, "cuda")
    if device is None:
        device = "cuda" if build.device == "cuda" and can_use_gpu() else "cpu"
    kind, colon, number = device.partition(":")
    if kind == "cuda" and ((number.isascii() and number.isdecimal()) or not colon):
        from .onnxruntime_cuda import open_gpu

        return open_gpu(manifest, build, int(number or 0), networks, bool(cuda_graph), preload)
    return OnnxRuntime(manifest, manifest.build_for(name), device, networks, preload)


def cannot_run(name: str, manifest: Manifest, device: str | None) -> None:
    """None: this backend runs on every machine. `open_here` refuses an unknown device."""


def can_use_gpu() -> bool:
    """Whether this ONNX Runtime, cuda-python and the driver can use a GPU."""
    return "CUDAExecutionProvider" in ort.get_available_providers() and _finds_gpu()


def _finds_gpu() -> bool:
    from .cuda_memory import probe

    try:
        probe(0)
    except BackendError:
        return False
    return True


def describe(name: str) -> str:
    """The installed version and its devices, for `doctor`."""
    where = "on the GPU and the CPU" if can_use_gpu() else "on the CPU"
    return f"onnxruntime {ort.__version__} ({', '.join(ort.get_available_providers())}), {where}"


class OnnxRuntime:
    """One session per network on the CPU execution provider, all opened before the first request if `preload`."""

    name = "onnxruntime"

    def __init__(
        self,
        manifest: Manifest,
        build: Build,
        device: str,
        networks: Collection[str] | None,
        preload: bool = True,
    ) -> None:
        kind, _, count = device.partition(":")
        threads = int(count) if count.isascii() and count.isdecimal() else 0
        if kind != "cpu" or (count and not 0 < threads <= MOST_THREADS):
            raise RequestError(
                f"device {device!r} is unknown to backend onnxruntime. Use cpu, cpu:N for N threads, cuda or cuda:N."
            )
        self.device, self.precision, self.usage = device, build.precision, Usage()
        self._levels, self._canvas = manifest.model.residual_levels, manifest.model.sample_size
        self._mode, self._overlap = manifest.config.relocate_mode, manifest.config.overlap
        manifest.check_files(manifest.files_of(build, networks))
        options = session_options(threads or available_cores())
        self._networks = known = manifest.networks(build)
        self._wanted = set(known if networks is None else networks)

        def open_session(name: str) -> Any:
            file = manifest.path / known[name].file
            try:
                return ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
            except Exception as error:  # ONNX Runtime's exceptions have no common base
                raise BackendError(
                    f"ONNX Runtime {ort.__version__} cannot open {file}: {error}. The engine was verified with "
                    f"{build.versions.get('onnxruntime')}; if yours is older, pip install --upgrade onnxruntime."
                ) from error

        self._open = open_session
        self._manifest = manifest
        self._sessions = {name: open_session(name) for name in known if preload and name in self._wanted}

    def start_usage(self) -> Usage:
        self.usage = Usage()
        return self.usage

    def start_request(self) -> None:
        self.start_usage()

    def start_pass(self) -> AbstractContextManager[None]:
        return nullcontext()

    def in_pass(self) -> AbstractContextManager[None]:
        return nullcontext()

    def unload(self, networks: Collection[str]) -> None:
        for name in networks:
            self._sessions.pop(name, None)

    def close(self) -> None:
        self._sessions.clear()

    def turn(self) -> AbstractContextManager[None]:
        return nullcontext()

    def outside(self) -> AbstractContextManager[None]:
        return nullcontext()

    def put(self, array: NDArray[Any], for_networks: bool = False) -> Tensor:
        return np.ascontiguousarray(array)

    def write(self, tensor: Tensor, array: NDArray[Any]) -> None:
        assert (array.shape, array.dtype) == (tensor.shape, tensor.dtype), (array.shape, array.dtype, tensor.shape)
        tensor[...] = array

    def get(self, tensor: Tensor) -> NDArray[Any]:
        return np.array(tensor)

    def keep(self, tensor: Tensor) -> Tensor:
        return tensor

    def free(self, tensor: Tensor) -> None:
        pass

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        return tensors[0] if len(tensors) == 1 else np.concatenate(tensors)

    def part(self, tensor: Tensor, *place: int) -> Tensor:
        return tensor[place]

    def copy(self, source: Tensor, target: Tensor) -> None:
        target[...] = source

    def take(self, tensor: Tensor, rows: NDArray[np.int32]) -> Tensor:
        same = rows.ndim == 1 and len(rows) == len(tensor) and (rows == np.arange(len(rows))).all()
        return tensor if same else tensor[rows]

    def take_step(self, table: Tensor, step: Tensor, pictures: Tensor, columns: Tensor) -> Tensor:
        return table[step[pictures], columns]

    def repeated(self, step: Callable[[], None]) -> Callable[[], None]:
        return step

    def stamp(self) -> float:
        return time.perf_counter()

    def elapsed_ms(self, stamps: Sequence[float]) -> list[float]:
        return [(later - earlier) * 1e3 for earlier, later in zip(stamps, stamps[1:], strict=False)]

    def check(self, network: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._networks[network].check(shapes)

    def run(self, network: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if network not in self._wanted:
            raise BackendError(f"{network} was not opened: Engine.load(…, networks=…) named others. Load it with all.")
        if network not in self._sessions:  # unloaded, or not loaded before
            self._manifest.check_again(self._networks[network])
            self._sessions[network] = self._open(network)
        described, session = self._networks[network], self._sessions[network]
        described.check({name: value.shape for name, value in inputs.items()})
        with self.usage.measure(network, len(next(iter(inputs.values())))):
            try:
                outputs = session.run(None, dict(inputs))
            except Exception as error:
                raise BackendError(f"ONNX Runtime failed in {network}: {error}") from error
        return dict(zip((port.name for port in described.outputs), outputs, strict=True))

    def crop_upsample(self, latents: Tensor, pictures: Tensor, boxes: Tensor) -> Tensor:
        with self.usage.measure("crop_upsample", len(boxes)):
            return kernels.crop_upsample(latents, pictures, boxes, self._canvas)

    def relocate_merge(
        self, skips: Sequence[Tensor], residuals: Sequence[Sequence[Tensor]], rows: MergeRows
    ) -> Sequence[Tensor]:
        with self.usage.measure("relocate_merge", len(rows.encoder_of)):
            merged: Sequence[Tensor] = kernels.relocate_merge(
                skips,
                residuals,
                rows.encoder_of,
                rows.rows_of,
                rows.scales,
                rows.rules,
                rows.boxes,
                self._levels,
                self._mode,
                self._overlap,
            )
            return merged

    def guide_step(
        self,
        latents: Tensor,
        histories: Tensor | None,
        step: Tensor,
        noise_pred: Tensor,
        decoder_of: Tensor,
        weights: Tensor,
        matrix: Tensor,
        noise: Tensor | None,
        preview: Tensor | None,
    ) -> None:
        with self.usage.measure("guide_step", len(latents)):
            kernels.guide_step(latents, histories, step, noise_pred, decoder_of, weights, matrix, noise, preview)
