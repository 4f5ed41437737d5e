"""ONNX Runtime on a GPU: every network one session, reading and writing our buffers on our stream."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Collection, Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnxruntime as ort

from realisid_trt.kernels.launch import Array, Kernels

from ..errors import BackendError, EngineMissing, RealisIDWarning
from ..manifest import Build, Manifest, rebuild
from .cuda import CudaBackend
from .cuda_memory import Gpu, callers_device
from .sessions import session_options

PROVIDER, MEMORY, ARENA = "CUDAExecutionProvider", "cuda", "Cuda"  # ONNX Runtime's names
# Whether code outside of ONNX Runtime may capture a step of these sessions as a CUDA graph. Not yet: a Concat stages
# its table of inputs in host memory that every replay would free again, and a replay would write into the shared arena
# outside of `SharedArena.turn`. ONNX Runtime does not refuse such a capture.
CAPTURABLE = False
NEXT_POWER_OF_TWO = 0  # OrtArenaCfg's number for it
CUDA_ADVICE = (
    "most often CUDA or cuDNN are missing or of another major version than the package was built for. pip install "
    "'onnxruntime-gpu[cuda,cudnn]', or use device='cpu'."
)
BFLOAT16 = 16  # NumPy has no such type; ONNX's number for it


def open_gpu(
    manifest: Manifest,
    build: Build,
    ordinal: int,
    networks: Collection[str] | None,
    capture: bool,
    preload: bool = True,
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
    manifest.check_files(manifest.files_of(build, networks))
    with callers_device():
        gpu = Gpu(ordinal)
        kernels = Kernels.load(manifest.path / "kernels", manifest.files_in("kernels"))
        sessions = Sessions(manifest, build, gpu, networks, preload)
        return CudaBackend("onnxruntime", manifest, build, gpu, kernels, sessions, capture and CAPTURABLE)


class Sessions:
    """The networks of a build. A `Runner`."""

    def __init__(
        self,
        manifest: Manifest,
        build: Build,
        gpu: Gpu,
        networks: Collection[str] | None,
        preload: bool = True,
    ) -> None:
        self._ordinal = gpu.ordinal
        self._bound: dict[Hashable, Any] = {}
        self._waited: set[str] = set()
        self._run_options, self._waiting = ort.RunOptions(), ort.RunOptions()
        # The stream belongs to the backend, which also waits for it.
        self._run_options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        options = session_options()
        options.add_session_config_entry("session.use_env_allocators", "1")
        # Weights are allocated outside of the arena, at their exact size: the whole arena is free between two runs.
        options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
        ort.preload_dlls(directory="")  # CUDA and cuDNN from pip's wheels, if installed
        self._arena = SharedArena.of(gpu.ordinal)
        provider = (PROVIDER, provider_options(gpu, build.precision))
        known = manifest.networks(build)
        self._wanted = set(known if networks is None else networks)

        def open_session(name: str) -> Any:
            file = manifest.path / known[name].file
            try:
                session = ort.InferenceSession(str(file), options, providers=[provider])
            except Exception as error:  # ONNX Runtime's exceptions have no common base
                raise BackendError(f"ONNX Runtime {ort.__version__} cannot open {file} on the GPU: {error}") from error
            if session.get_providers()[0] != PROVIDER:  # it falls back to the CPU silently
                raise BackendError(f"ONNX Runtime {ort.__version__} could not start its CUDA provider; {CUDA_ADVICE}")
            return session

        self._open = open_session
        self._manifest, self._known = manifest, known
        self._sessions = {name: open_session(name) for name in known if preload and name in self._wanted}
        self._gpu = gpu

    def run(
        self, network: str, inputs: Mapping[str, Array], outputs: Mapping[str, Array], repeating: bool = False
    ) -> None:
        """Enqueues the network. Raises BackendError."""
        if network not in self._wanted:
            raise BackendError(f"{network} was not opened: Engine.load(…, networks=…) named others. Load it with all.")
        if network not in self._sessions:  # unloaded, or not loaded before
            self._manifest.check_again(self._known[network])
            self._sessions[network] = self._open(network)
        session = self._sessions[network]
        key = network, *inputs.items(), *outputs.items()
        if key not in self._bound:
            binding = session.io_binding()
            for name, array in inputs.items():
                binding.bind_input(name, MEMORY, self._ordinal, _element(array), list(array.shape), array.address)
            for name, array in outputs.items():
                binding.bind_output(name, MEMORY, self._ordinal, _element(array), list(array.shape), array.address)
            self._bound[key] = binding
        # Footgun: a session that never waits keeps the pinned memory in which its kernels staged data. So each session
        # waits once per request. onnxruntime/core/framework/device_stream_collection.cc, CleanUp.
        options = self._run_options if network in self._waited else self._waiting
        try:
            with self._arena.turn(self._gpu.stream):
                self._enqueue(session, self._bound[key], options)
        except Exception as error:
            raise BackendError(f"ONNX Runtime failed in {network}: {error}") from error
        self._waited.add(network)

    def _enqueue(self, session: Any, binding: Any, options: Any) -> None:
        session.run_with_iobinding(binding, options)

    def unload(self, networks: Collection[str]) -> None:
        """Frees the weights of these networks; the stream must be idle."""
        self.forget()
        for name in networks:
            self._sessions.pop(name, None)

    def forget(self) -> None:
        """Invalidates all arrays passed so far. Waits: ONNX Runtime does not say how long a run needs its binding."""
        self._gpu.wait()
        self._bound.clear()
        self._waited.clear()

    def keep(self) -> None:
        """ONNX Runtime compiles nothing that could be kept."""

    def close(self) -> None:
        """Closes the sessions. The arena stays, for later sessions on this GPU."""
        self.forget()
        self._sessions.clear()
        self._arena.leave(self._gpu.stream)


class SharedArena:
    """The device memory in which all sessions of this process on one GPU compute.

    By default every session has its own arena, and thirteen networks hold thirteen peaks. They run one after another,
    so one shared arena holds the largest peak only. It grows by powers of two: after a run all of it is free, and at
    least half of it is one piece, in which other sizes find room. With kSameAsRequested it would consist of small
    pieces, and every larger picture would need another.
    """

    _of: dict[int, SharedArena] = {}
    _making = threading.Lock()

    def __init__(self, ordinal: int) -> None:
        """Registers the arena with ONNX Runtime. Raises BackendError."""
        # Reentrant: the garbage collector may close another engine in the middle of a turn, in the same thread, and
        # `close` calls `leave`.
        self._turn, self._stream = threading.RLock(), None
        try:
            where = ort.OrtMemoryInfo(ARENA, ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, ordinal, ort.OrtMemType.DEFAULT)
            growth = ort.OrtArenaCfg({"arena_extend_strategy": NEXT_POWER_OF_TWO})
            ort.create_and_register_allocator_v2(PROVIDER, where, {"device_id": str(ordinal)}, growth)
        except Exception as error:  # ONNX Runtime's exceptions have no common base
            raise BackendError(
                f"ONNX Runtime {ort.__version__} could not make the memory that its networks share on cuda:{ordinal}: "
                f"{error}; {CUDA_ADVICE}"
            ) from error

    @classmethod
    def of(cls, ordinal: int) -> SharedArena:
        """The arena of this GPU, made at the first call. ONNX Runtime would replace it by a second one."""
        with cls._making:
            if ordinal not in cls._of:
                cls._of[ordinal] = cls(ordinal)
            return cls._of[ordinal]

    @contextmanager
    def turn(self, stream: Any) -> Iterator[None]:
        """A context for one run, after all earlier ones. ONNX Runtime counts memory as free once a run is enqueued,
        while the GPU still works in it.

        One stream keeps the order by itself; the stream of another engine has to wait.
        """
        with self._turn:
            previous = self._stream
            if previous is not None and previous is not stream:
                try:
                    stream.wait(previous)
                except Exception:
                    if self._stream is previous:
                        raise  # otherwise it was idle and has been closed meanwhile
            self._stream = stream
            yield

    def leave(self, stream: Any) -> None:
        """Forgets a stream that is idle and will be closed."""
        with self._turn:
            if self._stream is stream:
                self._stream = None


def provider_options(gpu: Gpu, precision: str) -> dict[str, str]:
    """Options of the CUDA provider: our stream, and no TF32 for float32."""
    return {
        "device_id": str(gpu.ordinal),
        "user_compute_stream": str(int(gpu.stream.handle)),
        "cudnn_conv_algo_search": "HEURISTIC",  # the exhaustive search runs again for every new picture size
        "use_tf32": "0" if precision == "float32" else "1",
    }


def _element(array: Array) -> Any:
    return BFLOAT16 if array.dtype == "bfloat16" else np.dtype(array.dtype)
