"""ONNX Runtime on a GPU: every network one session, reading and writing our buffers on our stream."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Hashable, Mapping
from typing import Any

import numpy as np
import onnxruntime as ort

from realisid_trt.kernels.launch import Array, Kernels

from ..errors import BackendError, EngineMissing, RealisIDWarning
from ..manifest import Build, Manifest, rebuild
from .cuda import CudaBackend
from .cuda_memory import Gpu

PROVIDER, MEMORY = "CUDAExecutionProvider", "cuda"
# Whether a step of these sessions may be captured as a CUDA graph by others than ONNX Runtime. Not yet: a Concat stages
# its table of inputs in host memory that every replay would free again, and nothing refuses the capture.
CAPTURABLE = False
BFLOAT16 = 16  # NumPy has no such type; ONNX's number for it


def open_gpu(
    manifest: Manifest, build: Build, ordinal: int, networks: Collection[str] | None, capture: bool
) -> CudaBackend:
    """The backend for this engine on one GPU. Raises BackendError, EngineMissing or EngineMismatch."""
    if PROVIDER not in ort.get_available_providers():
        raise BackendError(
            f"this ONNX Runtime {ort.__version__} runs on the CPU only. pip uninstall onnxruntime, then "
            "pip install 'realisid_trt[gpu]' (the two packages overwrite each other)."
        )
    if not manifest.files_in("kernels"):
        raise EngineMissing(
            f"{manifest.path} holds no CUDA kernels: it was built for a CPU. {rebuild(manifest.path)} --fp16"
        )
    if capture and not CAPTURABLE:
        warnings.warn(
            f"ONNX Runtime {ort.__version__} does not allow its networks to be captured as a part of a CUDA graph: "
            "steps run one launch at a time.",
            RealisIDWarning,
            stacklevel=2,
        )
    gpu = Gpu(ordinal)
    kernels = Kernels.load(manifest.path / "kernels", manifest.files_in("kernels"))
    sessions = Sessions(manifest, build, gpu, networks)
    return CudaBackend("onnxruntime", manifest, build, gpu, kernels, sessions, capture and CAPTURABLE)


class Sessions:
    """The networks of a build. A `Runner`."""

    def __init__(self, manifest: Manifest, build: Build, gpu: Gpu, networks: Collection[str] | None) -> None:
        self._ordinal = gpu.ordinal
        self._bound: dict[Hashable, Any] = {}
        self._run_options = ort.RunOptions()
        # The stream is ours, and so is the waiting.
        self._run_options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        options = ort.SessionOptions()
        options.log_severity_level = 3
        ort.preload_dlls(directory="")  # CUDA and cuDNN out of pip's wheels, where they are
        provider = (PROVIDER, provider_options(gpu, build.precision))
        self._sessions = {}
        known = manifest.networks(build)
        for name in known if networks is None else networks:
            file = manifest.path / known[name].file
            try:
                session = ort.InferenceSession(str(file), options, providers=[provider])
            except Exception as error:  # ONNX Runtime's exceptions have no common base
                raise BackendError(f"ONNX Runtime {ort.__version__} cannot open {file} on the GPU: {error}") from error
            if session.get_providers()[0] != PROVIDER:  # it falls back to the CPU without a word
                raise BackendError(
                    f"ONNX Runtime {ort.__version__} could not start its CUDA provider; most often CUDA or cuDNN are "
                    "missing or of another major version than the package was built for. pip install "
                    "'onnxruntime-gpu[cuda,cudnn]', or use device='cpu'."
                )
            self._sessions[name] = session
        self._gpu = gpu  # set last, so let go last: sessions end on its stream

    def run(self, network: str, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
        """Enqueues the network. Raises BackendError."""
        if network not in self._sessions:
            raise BackendError(f"{network} was not opened: Engine.load(…, networks=…) named others. Load it with all.")
        session = self._sessions[network]
        key = network, *inputs.items(), *outputs.items()
        if key not in self._bound:
            binding = session.io_binding()
            for name, array in inputs.items():
                binding.bind_input(name, MEMORY, self._ordinal, _element(array), list(array.shape), array.address)
            for name, array in outputs.items():
                binding.bind_output(name, MEMORY, self._ordinal, _element(array), list(array.shape), array.address)
            self._bound[key] = binding
        try:
            self._enqueue(session, self._bound[key])
        except Exception as error:
            raise BackendError(f"ONNX Runtime failed in {network}: {error}") from error

    def _enqueue(self, session: Any, binding: Any) -> None:
        session.run_with_iobinding(binding, self._run_options)

    def forget(self) -> None:
        """Arrays given before are no more."""
        self._bound.clear()


def provider_options(gpu: Gpu, precision: str) -> dict[str, str]:
    """Of the CUDA provider: our stream, memory as it is needed, and no TF32 where float32 was asked for."""
    return {
        "device_id": str(gpu.ordinal),
        "user_compute_stream": str(int(gpu.stream.handle)),
        "arena_extend_strategy": "kSameAsRequested",
        "cudnn_conv_algo_search": "HEURISTIC",  # the exhaustive search runs again for every new picture size
        "use_tf32": "0" if precision == "float32" else "1",
    }


def _element(array: Array) -> Any:
    return BFLOAT16 if array.dtype == "bfloat16" else np.dtype(array.dtype)
