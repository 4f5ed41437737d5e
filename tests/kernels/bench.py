"""Benches for kernels: the launcher of realisid_trt, and memory for its arguments, NaN until it is written.

OnCpu calls the g++ build of the kernels; OnGpu goes through cuda.core. Both are used alike.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from realisid_trt.kernels.launch import BLOCK, Array, Kernels

GUARD_BYTES = 512  # before and behind every array, NaN in all types


def narrow(values: NDArray[np.float32], dtype: str) -> NDArray[Any]:
    """Numbers as they are stored: float32, float16, or bfloat16 as uint16; rounded to nearest, ties to even."""
    if dtype != "bfloat16":
        with np.errstate(over="ignore"):
            return values.astype(dtype)
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = bits + 0x7FFF + (bits >> 16 & 1)
    return np.where(np.isnan(values), 0x7FC0, rounded >> 16).astype(np.uint16)


def widen(stored: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    if dtype != "bfloat16":
        return stored.astype(np.float32)
    return (stored.astype(np.uint32) << 16).view(np.float32)


def rounded(values: NDArray[np.float32], dtype: str) -> NDArray[np.float32]:
    """The nearest numbers of that type."""
    return widen(narrow(values, dtype), dtype)


class OnCpu:
    """Memory of this machine, with NaN around and in everything, and the g++ build."""

    stream = None

    def __init__(self, library: Path) -> None:
        self.kernels = HostKernels(library)
        self._stored: dict[int, tuple[NDArray[Any], NDArray[np.uint8]]] = {}

    def put(self, values: NDArray[Any], dtype: str | None = None) -> Array:
        """A copy of the values, in that type."""
        array = self.empty(values.shape, dtype or values.dtype.name)
        self.rewrite(array, values)
        return array

    def empty(self, shape: tuple[int, ...], dtype: str) -> Array:
        nbytes = Array(0, shape, dtype).nbytes
        buffer = np.full(nbytes + 2 * GUARD_BYTES + 256, 0xFF, np.uint8)
        start = GUARD_BYTES + -(buffer.ctypes.data + GUARD_BYTES) % 256
        array = Array(buffer.ctypes.data + start, shape, dtype)
        stored = buffer[start : start + nbytes].view(np.uint16 if dtype == "bfloat16" else dtype).reshape(shape)
        self._stored[array.address] = stored, buffer
        return array

    def rewrite(self, array: Array, values: NDArray[Any]) -> None:
        self._stored[array.address][0][...] = narrow(values, array.dtype) if "float" in array.dtype else values

    def get(self, array: Array) -> NDArray[Any]:
        """The numbers, halves widened. Asserts that nothing beside the array was written."""
        stored, buffer = self._stored[array.address]
        start = array.address - buffer.ctypes.data
        assert (buffer[:start] == 0xFF).all() and (buffer[start + stored.nbytes :] == 0xFF).all()
        return widen(stored, array.dtype) if array.dtype in ("float16", "bfloat16") else stored.copy()


class HostKernels(Kernels):
    """The launcher, with the g++ build where the driver would be."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))

    def _launch(self, stream: Any, name: str, grid: tuple[int, int], arrays: Any, sizes: Any) -> None:
        values = [
            ctypes.c_uint64(value.address) if isinstance(value, Array) else ctypes.c_int32(value)
            for value in (*arrays, *sizes)
        ]
        expected = getattr(self._library, f"host_{name}_sizes")
        expected.restype = ctypes.POINTER(ctypes.c_uint)
        assert [ctypes.sizeof(value) for value in values] + [0] == expected()[: len(values) + 1]
        addresses = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
        getattr(self._library, f"host_{name}")(*grid, BLOCK, addresses)


class OnGpu:
    """Device memory, and the kernels that cuda.core has loaded."""

    def __init__(self, folder: Path, files: list[str]) -> None:
        from cuda.core import Device

        self.kernels = Kernels.load(folder, files)
        self.device = Device()
        self.device.set_current()
        self.stream = self.device.create_stream()
        self._buffers: list[Any] = []

    def put(self, values: NDArray[Any], dtype: str | None = None) -> Array:
        array = self.empty(values.shape, dtype or values.dtype.name)
        self.rewrite(array, values)
        return array

    def empty(self, shape: tuple[int, ...], dtype: str) -> Array:
        from cuda.bindings import driver

        nbytes = max(1, Array(0, shape, dtype).nbytes)
        buffer = self.device.allocate(nbytes, stream=self.stream)
        self._buffers.append(buffer)
        (status,) = driver.cuMemsetD8Async(int(buffer.handle), 0xFF, nbytes, self.stream.handle)
        assert status == 0, status
        return Array(int(buffer.handle), shape, dtype)

    def rewrite(self, array: Array, values: NDArray[Any]) -> None:
        from cuda.bindings import driver

        stored = np.ascontiguousarray(narrow(values, array.dtype) if "float" in array.dtype else values)
        if stored.nbytes:
            (status,) = driver.cuMemcpyHtoDAsync(array.address, stored.ctypes.data, stored.nbytes, self.stream.handle)
            assert status == 0, status

    def get(self, array: Array) -> NDArray[Any]:
        from cuda.bindings import driver

        stored = np.empty(array.shape, np.uint16 if array.dtype == "bfloat16" else array.dtype)
        (status,) = driver.cuMemcpyDtoHAsync(stored.ctypes.data, array.address, stored.nbytes, self.stream.handle)
        assert status == 0, status
        self.stream.sync()
        return widen(stored, array.dtype) if array.dtype in ("float16", "bfloat16") else stored

    def clear(self) -> None:
        """Frees all arrays."""
        for buffer in self._buffers:
            buffer.close()
        self._buffers.clear()

    def close(self) -> None:
        self.clear()
        self.stream.close()
