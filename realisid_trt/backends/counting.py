"""A GPU backend in numbers: it hands out the addresses that a GPU's would, and neither allocates nor computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from realisid_trt.kernels.launch import Array

from ..manifest import Build, Manifest
from .cuda import CudaBackend
from .cuda_memory import ALIGNMENT, Arena


class CountingBackend(CudaBackend):
    """The arrays of a request, laid out by the code that lays them out on a GPU. All values are zeros."""

    def __init__(self, manifest: Manifest, build: Build) -> None:
        gpu: Any = _Gpu()
        nothing: Any = _Nothing()
        super().__init__(build.backend, manifest, build, gpu, nothing, nothing)
        self._end.detach()  # there is nothing to free
        self._counted: _Gpu = gpu

    @property
    def arena_bytes(self) -> int:
        """Bytes that arenas and kept arrays would have taken from the GPU, at most."""
        return self._counted.most

    def put(self, array: NDArray[Any], for_networks: bool = False) -> Array:
        placed = self._new(array.shape, array.dtype.name)
        return self._in(self.precision, placed) if for_networks and placed.dtype == "float32" else placed

    def write(self, tensor: Array, array: NDArray[Any]) -> None:
        pass

    def get(self, tensor: Array) -> NDArray[Any]:
        dtype = np.float32 if tensor.dtype in ("float16", "bfloat16") else np.dtype(tensor.dtype)
        return np.broadcast_to(np.zeros((), dtype), tensor.shape)  # one number in memory

    def close(self) -> None:
        pass


class _Chunk:
    """A piece of memory that is not there: its address and its size."""

    def __init__(self, gpu: _Gpu, handle: int, size: int) -> None:
        self._gpu, self.handle, self.size = gpu, handle, size

    def close(self) -> None:
        self._gpu.held -= self.size


class _Gpu:
    """What `CudaBackend` needs of a `Gpu`. held, most: bytes that are allocated, and at most were."""

    ordinal, capturing, stream = 0, False, None

    def __init__(self) -> None:
        self._next, self.held, self.most = ALIGNMENT, 0, 0
        self.calls, self.passes = Arena(self.allocate), Arena(self.allocate)

    def allocate(self, nbytes: int) -> _Chunk:
        chunk = _Chunk(self, self._next, nbytes)
        self._next += -(-nbytes // ALIGNMENT) * ALIGNMENT
        self.held += nbytes
        self.most = max(self.most, self.held)
        return chunk

    def turn_staging(self) -> None:
        pass

    def copy(self, source: int, target: int, nbytes: int) -> None:
        pass

    def wait(self) -> None:
        pass

    def stamp(self) -> _Stamp:
        return _Stamp()


class _Stamp:
    """A marker; no time passes between two."""

    def sync(self) -> None:
        pass

    def __sub__(self, other: _Stamp) -> float:
        return 0.0


class _Nothing:
    """Kernels and networks that do nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *arguments: None
