"""A GPU's stream and memory, through cuda-python.

Memory is taken piece by piece and given back all at once: that of a request's calls from one arena, that of a pass of
the loop from another, pinned memory for copies from two in turn. All of them stay as large as they once had to be.
"""

from __future__ import annotations

import ctypes
import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from realisid_trt.kernels.launch import open_driver

from ..errors import BackendError, RealisIDError

ALIGNMENT = 256  # bytes; every piece starts at a multiple of this
NEEDED_CUDA = 13000  # in the numbering of cuDriverGetVersion
_counting, _captures, _collecting = threading.Lock(), 0, True  # captures that run now, in all threads
CHUNK_BYTES = 2**24  # the smallest request to the system


@contextmanager
def gpu_errors() -> Iterator[None]:
    """Turns cuda.core's exceptions into BackendError. A failure of enqueued work is raised at the next wait."""
    try:
        yield
    except RealisIDError:
        raise
    except Exception as error:  # cuda.core's CUDAError is not public
        raise BackendError(
            f"the GPU failed: {error}. Results of earlier calls are lost. Most often the process must be started again."
        ) from error


@contextmanager
def memory_errors(nbytes: int, held: int = 0) -> Iterator[None]:
    """Turns cuda.core's exceptions at an allocation into BackendError. held: bytes that the caller already has."""
    try:
        yield
    except Exception as error:  # cuda.core's CUDAError is not public
        raise BackendError(
            f"{nbytes / 2**20:.0f} MiB more could not be allocated ({error}); {held / 2**20:.0f} MiB are held already. "
            "Make fewer or smaller pictures at a time, or stop other programs on this GPU."
        ) from error


@contextmanager
def _no_collection() -> Iterator[None]:
    """Disables the garbage collector for all threads. Otherwise it could close an engine, which waits and frees memory,
    in the middle of a capture."""
    global _captures, _collecting
    with _counting:
        if not _captures:
            _collecting = gc.isenabled()
            gc.disable()
        _captures += 1
    try:
        yield
    finally:
        with _counting:
            _captures -= 1
            if not _captures and _collecting:
                gc.enable()


@contextmanager
def callers_device() -> Iterator[None]:
    """Restores the thread's current device afterwards: torch's, for example, or another engine's.

    A thread without a current device keeps the one that the block sets.
    """
    before = _current_context()
    try:
        yield
    finally:
        if before is not None:
            from cuda.bindings import driver

            driver.cuCtxSetCurrent(before)


def _current_context() -> Any:
    """The CUDA context of this thread; None without a context or without a driver."""
    try:
        from cuda.bindings import driver

        status, context = driver.cuCtxGetCurrent()
    except Exception:  # a library is missing; the code that needs it reports that
        return None
    return context if status == driver.CUresult.CUDA_SUCCESS and int(context) else None


class Gpu:
    """One device: the stream on which everything runs, its memory, and pinned memory for copies."""

    def __init__(self, ordinal: int) -> None:
        """Raises BackendError, with what to do, where there is no such GPU."""
        probe(ordinal)
        from cuda.core import Device, DeviceMemoryResource, DeviceMemoryResourceOptions, LegacyPinnedMemoryResource

        self.ordinal, self.capturing = ordinal, False
        self._callers: Any = None  # the context that the thread had before
        with gpu_errors():
            self.device = device = Device(ordinal)
            device.set_current()
            self.stream = stream = device.create_stream()
            pinned = LegacyPinnedMemoryResource()
            # A separate pool returns freed memory to the system; the device's, as cuda.core sets it, keeps it for ever.
            pool = DeviceMemoryResource(device, DeviceMemoryResourceOptions())
        # These do not refer to `self`: memory is freed with its Gpu and does not wait for the garbage collector.
        self.allocate: Callable[[int], Any] = lambda nbytes: pool.allocate(nbytes, stream=stream)
        self.calls, self.passes = Arena(self.allocate, stream.sync), Arena(self.allocate, stream.sync)
        self._staging, self._staged = Arena(pinned.allocate), Arena(pinned.allocate)  # in use, and before
        self._copied: Any = None  # after the last copy of `_staged`

    @property
    def name(self) -> str:
        major, minor = self.device.compute_capability
        return f"{self.device.name} (sm_{major}{minor})"

    @contextmanager
    def current(self) -> Iterator[None]:
        """Makes this the thread's current device; restores the previous one afterwards."""
        with callers_device():
            self._callers = _current_context()
            self.device.set_current()
            yield

    @contextmanager
    def given_back(self) -> Iterator[None]:
        """Inside `current`, a context for the caller's code: the caller's device is current, afterwards this one."""
        if self._callers is not None:
            from cuda.bindings import driver

            driver.cuCtxSetCurrent(self._callers)
        try:
            yield
        finally:
            self.device.set_current()

    def turn_staging(self) -> None:
        """Takes pinned memory from the other arena from now on. Waits for its copies: those before the last turn."""
        with gpu_errors():
            if self._copied is not None:
                self._copied.sync()
            self._copied = self.stream.record()
        self._staging, self._staged = self._staged, self._staging
        self._staging.reset()

    @property
    def pinned_bytes(self) -> int:
        """Bytes of pinned memory."""
        return self._staging.nbytes + self._staged.nbytes

    def wait(self) -> None:
        """Returns when all enqueued work is done. This device is then the thread's current one."""
        with gpu_errors():
            self.device.set_current()
            self.stream.sync()

    def close(self) -> None:
        """Frees the memory, then the stream. Call `wait` before this and nothing after it."""
        with gpu_errors():
            for arena in (self.calls, self.passes, self._staging, self._staged):
                arena.close()
            self.stream.close()

    def stamp(self) -> Any:
        """An event after all work enqueued so far; the difference of two is in milliseconds."""
        from cuda.core import EventOptions

        with gpu_errors():
            return self.stream.record(options=EventOptions(timing_enabled=True))

    def capture(self, work: Callable[[], None]) -> Any:
        """The work that `work` enqueues, as a graph that `launch`es on the stream. Nothing runs now."""
        builder = self.stream.create_graph_builder()
        with _no_collection():
            builder.begin_building("thread_local")
            self.capturing = True
            try:
                work()
            finally:
                self.capturing = False
                builder.end_building()
        return builder.complete()

    def upload(self, array: NDArray[Any], address: int) -> None:
        """Copies the array to the device; the caller may change the array at once."""
        staged = self._staging.take(array.nbytes)
        ctypes.memmove(staged, array.ctypes.data, array.nbytes)
        self._copy("cuMemcpyHtoDAsync", address, staged, array.nbytes)

    def download(self, address: int, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        """A copy of the array at this address; waits for the stream."""
        array = np.empty(shape, dtype)
        staged = self._staging.take(array.nbytes)
        self._copy("cuMemcpyDtoHAsync", staged, address, array.nbytes)
        with gpu_errors():
            self.stream.sync()
        ctypes.memmove(array.ctypes.data, staged, array.nbytes)
        return array

    def copy(self, source: int, target: int, nbytes: int) -> None:
        """Copies bytes on the device."""
        self._copy("cuMemcpyDtoDAsync", target, source, nbytes)

    def _copy(self, function: str, target: int, source: int, nbytes: int) -> None:
        from cuda.bindings import driver

        (status,) = getattr(driver, function)(target, source, nbytes, self.stream.handle)
        if status != driver.CUresult.CUDA_SUCCESS:
            raise BackendError(f"{function} of {nbytes} bytes failed: {status.name}. python -m realisid_trt doctor")


class Arena:
    """Memory handed out in order. It grows by whole chunks; `reset` merges them into one."""

    def __init__(self, allocate: Callable[[int], Any], settle: Callable[[], object] = lambda: None) -> None:
        """allocate: bytes → a cuda.core Buffer. settle: waits until freed memory is back in the system."""
        self._allocate, self._settle = allocate, settle
        self._chunks: list[Any] = []
        self._used = 0  # of the last chunk

    @property
    def nbytes(self) -> int:
        """Bytes allocated from the system."""
        return sum(chunk.size for chunk in self._chunks)

    def take(self, nbytes: int) -> int:
        """The address of `nbytes` bytes, valid until `reset`. Raises BackendError when the device is full."""
        nbytes = -(-max(nbytes, 1) // ALIGNMENT) * ALIGNMENT
        if not self._chunks or self._used + nbytes > self._chunks[-1].size:
            self._grow(max(nbytes, CHUNK_BYTES))
        address = int(self._chunks[-1].handle) + self._used
        self._used += nbytes
        return address

    def reset(self) -> None:
        """Reclaims all memory that was handed out."""
        if len(self._chunks) > 1:
            total = self.nbytes
            with gpu_errors():
                self.close()
                self._settle()  # a pool frees in stream order: without the wait it would hold both sizes for a moment
            self._grow(total)
        self._used = 0

    def close(self) -> None:
        """Returns all memory to the system."""
        for chunk in self._chunks:
            chunk.close()
        self._chunks.clear()

    def _grow(self, nbytes: int) -> None:
        with memory_errors(nbytes, self.nbytes):
            self._chunks.append(self._allocate(nbytes))
        self._used = 0


def probe(ordinal: int) -> str:
    """The driver's CUDA version, such as "13.0", if it finds this GPU. Raises BackendError, with what to do."""
    open_driver()
    from cuda.bindings import driver

    _, count = driver.cuDeviceGetCount()
    if ordinal >= count:
        raise BackendError(f"device cuda:{ordinal} does not exist; this machine has {count}. Use a lower number.")
    _, version = driver.cuDriverGetVersion()
    found = f"{version // 1000}.{version % 1000 // 10}"
    if version < NEEDED_CUDA:
        raise BackendError(
            f"the NVIDIA driver is for CUDA {found}; the kernels are compiled for CUDA 13. Update it to R580 or later, "
            "or use device='cpu'."
        )
    return found
