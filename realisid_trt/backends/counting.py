"""A GPU backend in numbers: it hands out the addresses that a GPU's would, and neither allocates nor computes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
        self._arena: Arena = gpu.memory

    @property
    def arena_bytes(self) -> int:
        """Bytes that the arena would have taken from the GPU."""
        return self._arena.nbytes

    def put(self, array: NDArray[Any], for_networks: bool = False) -> Array:
        placed = self._new(array.shape, array.dtype.name)
        return self._in(self.precision, placed) if for_networks and placed.dtype == "float32" else placed

    def write(self, tensor: Array, array: NDArray[Any]) -> None:
        pass

    def get(self, tensor: Array) -> NDArray[Any]:
        dtype = np.float32 if tensor.dtype in ("float16", "bfloat16") else np.dtype(tensor.dtype)
        return np.broadcast_to(np.zeros((), dtype), tensor.shape)  # one number in memory

    def elapsed_ms(self, stamps: Sequence[Any]) -> list[float]:
        return [0.0] * (len(stamps) - 1)

    def close(self) -> None:
        pass


class _Chunk:
    """A piece of memory that is not there: its address and its size."""

    def __init__(self, handle: int, size: int) -> None:
        self.handle, self.size = handle, size

    def close(self) -> None:
        pass


class _Gpu:
    """What `CudaBackend` needs of a `Gpu`."""

    ordinal, capturing, stream = 0, False, None

    def __init__(self) -> None:
        self._next = ALIGNMENT
        self.memory = Arena(self._allocate)

    def _allocate(self, nbytes: int) -> _Chunk:
        chunk = _Chunk(self._next, nbytes)
        self._next += -(-nbytes // ALIGNMENT) * ALIGNMENT
        return chunk

    def release(self) -> None:
        self.memory.reset()

    def wait(self) -> None:
        pass

    def stamp(self) -> float:
        return 0.0


class _Nothing:
    """Kernels and networks that do nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *arguments: None
