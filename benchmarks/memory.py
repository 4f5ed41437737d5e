"""The memory of one contender, alone in a process of its own: in one process, the contenders' weights would add up.

On a GPU it is all memory of the device that the process uses beyond an empty CUDA context: weights, activations,
workspaces, and the memory that torch, ONNX Runtime and TensorRT keep for the next call. It is read from the driver, so
no other program may use the GPU meanwhile. On a CPU it is the growth of the process's resident memory, libraries
included.
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

from realisid_trt.errors import BackendError, RequestError
from realisid_trt.manifest import Manifest

from .contenders import Contender, of_engine, open_baselines, open_engine
from .options import Options
from .same import open_original
from .scene import Scene

STATM = Path("/proc/self/statm")  # Linux
SECONDS = 0.005  # between two readings
Bytes = Callable[[], int]


@dataclass(frozen=True, kw_only=True)
class Job:
    """One measurement: a contender and a number of persons. baseline: its name, or None for the engine on `backend`."""

    options: Options
    backend: str
    baseline: str | None
    device: str
    precision: str
    threads: int
    persons: int


def measure_alone(job: Job) -> dict[str, int]:
    """{"resting_memory_bytes": when it is open, "peak_memory_bytes": the most while it made a picture}.

    Raises the contender's errors, and BackendError if its process was killed.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as alone:
        try:
            return alone.submit(measure_here, job).result()
        except BrokenProcessPool:
            raise BackendError("the process that measured memory was killed, most often for lack of memory.") from None


def measure_here(job: Job) -> dict[str, int]:
    """The same in this process, which must be a fresh one. The first picture is not counted."""
    used = bytes_used(job.device)
    before = used()
    with contextlib.ExitStack() as stack:
        manifest = Manifest.read(job.options.engine)
        scene = Scene.of(job.options, manifest)
        contender = _open(job, manifest, scene, stack)
        release()
        resting = used()
        given = scene.given(job.persons, scene.warm_steps)
        contender.generate("the first", **given)
        release()
        with Watch(used) as watch:
            contender.generate(job.options.prompt, **given)
        return {"resting_memory_bytes": resting - before, "peak_memory_bytes": watch.peak - before}


def bytes_used(device: str) -> Bytes:
    """A function that returns the bytes in use: of the GPU, or of the RAM by this process. Raises RequestError."""
    kind, _, number = device.partition(":")
    if kind != "cuda":
        if not STATM.is_file():
            raise RequestError("--memory on a CPU reads /proc, which this system lacks. Leave it out.")
        page = os.sysconf("SC_PAGE_SIZE")
        return lambda: int(STATM.read_text().split()[1]) * page
    from cuda.bindings import driver
    from cuda.core import Device

    from realisid_trt.backends.cuda_memory import probe

    gpu = int(number or 0)
    probe(gpu)

    def used() -> int:
        Device(gpu).set_current()  # in the calling thread
        status, free, total = driver.cuMemGetInfo()
        if status != driver.CUresult.CUDA_SUCCESS:
            raise BackendError(f"cuMemGetInfo failed: {status.name}. Run python -m realisid_trt doctor.")
        return int(total) - int(free)

    return used


class Watch:
    """The most memory in use between enter and exit, read every few milliseconds."""

    def __init__(self, used: Bytes) -> None:
        self._used, self._done = used, threading.Event()
        self._thread = threading.Thread(target=self._look)
        self.peak = 0

    def __enter__(self) -> Watch:
        self.peak = self._used()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self.peak = max(self.peak, self._used())

    def _look(self) -> None:
        while not self._done.wait(SECONDS):
            self.peak = max(self.peak, self._used())


def _open(job: Job, manifest: Manifest, scene: Scene, stack: contextlib.ExitStack) -> Contender:
    if job.baseline is None:
        return of_engine(open_engine(job.options, job.backend, job.device), scene)
    checkpoint = open_original(manifest, job.options.checkpoint, job.options.base_model, job.options.variant)
    opened, _ = open_baselines(
        job.options, [job.baseline], checkpoint, scene, job.device, job.precision, job.threads, stack
    )
    return opened[job.baseline]


def release() -> None:
    """Frees the memory that torch keeps after loading, compiling and trying convolutions."""
    gc.collect()
    if "torch" in sys.modules:
        import torch

        if torch.cuda.is_available():
            torch.cuda.empty_cache()
