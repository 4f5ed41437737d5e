"""The kernels on a GPU: found for the device, loaded once, launched. Needs cuda-core, and neither torch nor a compiler.

A launch checks its arrays against each other and against what the kernel reads; it allocates nothing and waits for
nothing. Shapes are stated in the NumPy references beside this file.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from realisid_trt.errors import BackendError, EngineMismatch

BLOCK = 256  # threads
LARGEST_SIDE = 1024  # cells; common.cuh, bilinear_taps
OVERLAPS = ("sum", "average", "priority")
LEVEL = np.dtype(
    [(name, "<u8") for name in ("skips", "local", "global", "out")]
    + [(name, "<i4") for name in ("first_block", "size", "height", "width", "local_height", "local_width", "box_level",
                                  "unused")]
)  # fmt: skip
ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int32": 4, "int64": 8, "float64": 8}


@dataclass(frozen=True)
class Array:
    """An array on the device. dtype: a key of ITEM_BYTES; contiguous, aligned to 256 bytes."""

    address: int
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class Levels:
    """The table of relocate_merge's levels, and how it is launched. Made by `levels`."""

    table: NDArray[np.void]
    blocks: int
    vector: int
    dtype: str
    rows: int


def levels(
    skips: Sequence[Array],
    local: Sequence[Array],
    global_residuals: Sequence[Array],
    out: Sequence[Array],
    of: Sequence[int],
) -> Levels:
    """The table of relocate_merge's inputs and outputs, one entry per skip of the UNet.

    local, global_residuals: the residuals of each branch; empty for one that was not evaluated.
    of:                      the level of each entry, for its boxes.
    """
    dtype = skips[0].dtype
    sizes = [math.prod(skip.shape[1:]) for skip in skips]
    vector = 16 // ITEM_BYTES[dtype]
    if any(size % vector for size in sizes):
        vector = 1
    table, blocks = np.zeros(len(skips), LEVEL), 0
    absent = [Array(skip.address, (0, skip.shape[1], 1, 1), dtype) for skip in skips]  # an address that is never read
    pairs = zip(local or absent, global_residuals or skips, strict=True)
    for entry, skip, (local_array, global_array), merged, level, size in zip(
        table, skips, pairs, out, of, sizes, strict=True
    ):
        assert {skip.dtype, local_array.dtype, global_array.dtype, merged.dtype} == {dtype}
        assert skip.shape[1:] == global_array.shape[1:] == merged.shape[1:] and local_array.shape[1] == skip.shape[1]
        assert merged.shape[0] == out[0].shape[0] and max(*skip.shape[2:], *local_array.shape[2:]) <= LARGEST_SIDE
        addresses = skip.address, local_array.address, global_array.address, merged.address
        assert not any(address % 16 for address in addresses)
        entry_values = (*addresses, blocks, size, *skip.shape[2:], *local_array.shape[2:], level, 0)
        for name, value in zip(LEVEL.names or (), entry_values, strict=True):
            entry[name] = value
        blocks += -(-size // (BLOCK * vector))
    return Levels(table, blocks, vector, dtype, out[0].shape[0])


class Kernels:
    """Entry points of a cubin, by name."""

    def __init__(self, code: Any, name: str = "kernels") -> None:
        """code: cuda.core's ObjectCode. name: the file it is from."""
        self._code, self._name = code, name
        self._kernels: dict[str, Any] = {}

    @classmethod
    def load(cls, folder: Path, files: Collection[str]) -> Kernels:
        """The kernels for the current device. files: names in `folder` that may be opened.

        Raises BackendError (no cuda-core, driver or GPU), EngineMismatch (nothing among `files` is for this GPU).
        """
        open_driver()
        from cuda.core import Device, ObjectCode

        name = choose(files, Device().compute_capability)
        content = (folder / name).read_bytes()
        code = ObjectCode.from_ptx(content) if name.endswith(".ptx") else ObjectCode.from_cubin(content)
        kernels = cls(code, name)
        kernels._find("find_nonfinite_float32", 3)  # the driver reads the file here, not in the middle of a picture
        return kernels

    def crop_upsample(self, stream: Any, latents: Array, pictures: Array, boxes: Array, faces: Array) -> None:
        """latents (B, C, H, W) float32, pictures (F,) and boxes (F, 4) int32 → faces (F, C, canvas, canvas)."""
        _, channels, height, width = latents.shape
        count, _, canvas, _ = faces.shape
        assert max(height, width, canvas) <= LARGEST_SIDE
        _agree(latents=(latents, "float32"), pictures=(pictures, "int32", count), boxes=(boxes, "int32", count, 4),
               faces=(faces, faces.dtype, count, channels, canvas, canvas))  # fmt: skip
        grid = _blocks(canvas * canvas), count * channels
        sizes = channels, height, width, canvas
        self._launch(stream, f"crop_upsample_{faces.dtype}", grid, (latents, pictures, boxes, faces), sizes)

    def relocate_merge(
        self,
        stream: Any,
        plan: Levels,
        table: Array,
        encoder_of: Array,
        local_of: Array,
        global_of: Array,
        boxes: Array,
        scales: Array,
        mode: str,
        overlap: str,
    ) -> None:
        """One launch for every level and row. table: `plan.table` on the device; the rest as in relocate_merge.py."""
        rows, persons = local_of.shape
        _, box_levels, _ = boxes.shape
        assert rows == plan.rows and mode in ("bilinear", "area") and overlap in OVERLAPS
        _agree(encoder_of=(encoder_of, "int32", rows), local_of=(local_of, "int32", rows, persons),
               global_of=(global_of, "int32", rows, persons),
               boxes=(boxes, "int32", boxes.shape[0], box_levels, 4), scales=(scales, "float32", rows, 2))  # fmt: skip
        name = f"relocate_merge_{mode}{'_single' if plan.vector == 1 else ''}_{plan.dtype}"
        values = rows, persons, box_levels, OVERLAPS.index(overlap)
        arrays = table, len(plan.table), encoder_of, local_of, global_of, boxes, scales
        self._launch(stream, name, (plan.blocks, 1), arrays, values)

    def guide_step(
        self,
        stream: Any,
        latents: Array,
        step: Array,
        tickets: Array,
        noise_pred: Array,
        decoder_of: Array,
        weights: Array,
        coefficients: Array,
    ) -> None:
        """As in guide_step.py. tickets: (B,) int32, counters of finished blocks, zero before and after the launch."""
        pictures, *shape = latents.shape
        _agree(latents=(latents, "float32"), step=(step, "int32", pictures), tickets=(tickets, "int32", pictures),
               noise_pred=(noise_pred, noise_pred.dtype, noise_pred.shape[0], *shape),
               decoder_of=(decoder_of, "int32", pictures, 3), weights=(weights, "float64", pictures, 3),
               coefficients=(coefficients, "float64", coefficients.shape[0], 2))  # fmt: skip
        size = math.prod(shape)
        arrays = latents, step, tickets, noise_pred, decoder_of, weights, coefficients
        self._launch(stream, f"guide_step_{noise_pred.dtype}", (_blocks(size), pictures), arrays, (size,))

    def take(self, stream: Any, source: Array, rows: Array, out: Array) -> None:
        """out[r] = source[rows[r]], float32 or in the source's own type."""
        (count,) = rows.shape
        _agree(rows=(rows, "int32", count), out=(out, out.dtype, count, *source.shape[1:]))
        types = source.dtype if source.dtype == out.dtype else f"{source.dtype}_to_{out.dtype}"
        size = math.prod(source.shape[1:])
        self._launch(stream, f"take_{types}", (_blocks(size), count), (source, rows, out), (size,))

    def take_step(self, stream: Any, table: Array, step: Array, pictures: Array, columns: Array, out: Array) -> None:
        """out[r] = table[step[pictures[r]], columns[r]] of a (S, K, E) table."""
        _, num_columns, size = table.shape
        (count,) = pictures.shape
        _agree(step=(step, "int32"), pictures=(pictures, "int32", count), columns=(columns, "int32", count),
               out=(out, table.dtype, count, size))  # fmt: skip
        arrays = table, step, pictures, columns, out
        self._launch(stream, f"take_step_{table.dtype}", (_blocks(size), count), arrays, (num_columns, size))

    def find_nonfinite(self, stream: Any, values: Array, found: Array) -> None:
        """found (1,) int32 becomes 1 if a value (float32) is NaN or infinite; else it stays."""
        _agree(values=(values, "float32"), found=(found, "int32", 1))
        size = math.prod(values.shape)
        self._launch(stream, "find_nonfinite_float32", (_blocks(size), 1), (values, found), (size,))

    def _launch(
        self, stream: Any, name: str, grid: tuple[int, int], arrays: Sequence[Any], sizes: Sequence[int]
    ) -> None:
        if 0 in grid:  # no rows: a driver refuses an empty grid
            return
        from cuda.core import LaunchConfig, launch

        given = [value.address if isinstance(value, Array) else np.int32(value) for value in (*arrays, *sizes)]
        kernel = self._kernels.get(name) or self._find(name, len(given))
        try:
            launch(stream, LaunchConfig(grid=grid, block=BLOCK), kernel, *given)
        except Exception as error:  # cuda.core's CUDAError is not public
            raise BackendError(
                f"the GPU refused the kernel {name}: {error}. The cause may be an earlier call; most often the process "
                "must be started again."
            ) from error

    def _find(self, name: str, arguments: int) -> Any:
        """The entry point with that many arguments. Raises EngineMismatch."""
        advice = "It is of another version of realisid_trt. Build the engine again."
        try:
            kernel = self._code.get_kernel(name)
        except Exception as error:  # the driver's errors have no public base
            raise EngineMismatch(
                f"the kernel {name} cannot be read from {self._name} ({error}). A driver older than the compiler "
                f"cannot read that file: update the driver. With a recent one: {advice}"
            ) from error
        if kernel.num_arguments != arguments:
            raise EngineMismatch(
                f"{name} in {self._name} takes {kernel.num_arguments} arguments, expected {arguments}. {advice}"
            )
        self._kernels[name] = kernel
        return kernel


def open_driver() -> None:
    """Initialises the driver. Call it before anything of cuda.core, whose second call never returns without a driver.

    Raises BackendError: cuda-core, the driver or the GPU is missing.
    """
    try:
        import cuda.core  # noqa: F401
        from cuda.bindings import driver
    except ImportError as error:
        raise BackendError(f"a GPU needs cuda-core ({error}). pip install 'realisid_trt[gpu]'") from error
    try:
        (status,) = driver.cuInit(0)
    except Exception as error:  # the bindings' error for a missing library has no public base
        raise BackendError(
            "there is no NVIDIA driver here (libcuda.so.1 was not found). Install one; a container needs "
            "docker run --gpus all. On the CPU: device='cpu'."
        ) from error
    if status != driver.CUresult.CUDA_SUCCESS:
        raise BackendError(
            f"the NVIDIA driver found no GPU that it can use ({driver.CUresult(status).name}). nvidia-smi lists the "
            "GPUs, and CUDA_VISIBLE_DEVICES may hide some. On the CPU: device='cpu'."
        )


def choose(files: Collection[str], capability: tuple[int, int]) -> str:
    """The file for a device of this compute capability: the nearest cubin of its generation, else PTX of an older one.

    Raises EngineMismatch.
    """
    built, found = [], []
    for name in files:
        if match := re.search(r"\.((sm|compute)_(\d+)(\d))\.(cubin|ptx)$", name):
            built.append(match[1])
            binary, major, minor = match[2] == "sm", int(match[3]), int(match[4])
            if (major, minor) <= capability and (major == capability[0] or not binary):
                found.append((binary, major, minor, name))
    if not found:
        raise EngineMismatch(
            f"no kernels for this GPU (compute capability {capability[0]}.{capability[1]}); built: "
            f"{', '.join(sorted(built)) or 'none'}. Build the engine again with a version of realisid_trt that knows "
            "this GPU."
        )
    return max(found)[-1]


def _blocks(size: int) -> int:
    return -(-size // BLOCK)


def _agree(**arrays: tuple[Any, ...]) -> None:
    """Asserts dtype and shape of every array (array, dtype, *shape); without a shape only the dtype."""
    for name, (array, dtype, *shape) in arrays.items():
        assert array.dtype == dtype, f"{name} is {array.dtype}, expected {dtype}"
        assert not shape or array.shape == tuple(shape), f"{name} is {array.shape}, expected {tuple(shape)}"
