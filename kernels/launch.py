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
MOST_ROWS = 255  # of one source, into one decoder row; relocate_merge.cuh, Counts
OVERLAPS = ("sum", "average", "priority")
LEVEL = np.dtype(
    [(name, "<u8") for name in ("skips", "out")]
    + [(name, "<i4") for name in ("first_block", "size", "height", "width", "box_level", "unused")]
)
SOURCE = np.dtype([("residuals", "<u8"), ("height", "<i4"), ("width", "<i4")])
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


ABSENT = Array(0, (), "float32")  # a null pointer, where a kernel takes one


@dataclass(frozen=True)
class Levels:
    """The tables of relocate_merge, and how it is launched. Made by `levels`.

    table:   (levels,) LEVEL.
    sources: (levels, S) SOURCE.
    """

    table: NDArray[np.void]
    sources: NDArray[np.void]
    blocks: int
    vector: int
    dtype: str
    rows: int


def levels(
    skips: Sequence[Array], residuals: Sequence[Sequence[Array]], out: Sequence[Array], of: Sequence[int]
) -> Levels:
    """The tables of relocate_merge's inputs and outputs, one entry per skip of the UNet.

    residuals: of every source, one array per skip.
    of:        the level of each entry, for its boxes.
    """
    dtype = skips[0].dtype
    sizes = [math.prod(skip.shape[1:]) for skip in skips]
    vector = 16 // ITEM_BYTES[dtype]
    if any(size % vector for size in sizes):
        vector = 1
    table, blocks = np.zeros(len(skips), LEVEL), 0
    sources = np.zeros((len(skips), len(residuals)), SOURCE)
    for entry, (skip, merged, level, size, *maps) in enumerate(zip(skips, out, of, sizes, *residuals, strict=True)):
        assert {array.dtype for array in (skip, merged, *maps)} == {dtype}
        assert skip.shape[1:] == merged.shape[1:] and merged.shape[0] == out[0].shape[0]
        assert all(array.shape[0] and array.shape[1] == skip.shape[1] for array in maps)
        assert all(max(array.shape[2:]) <= LARGEST_SIDE for array in (skip, *maps))
        assert not any(array.address % 16 for array in (skip, merged, *maps))
        table[entry] = skip.address, merged.address, blocks, size, *skip.shape[2:], level, 0
        for source, array in enumerate(maps):
            sources[entry, source] = array.address, *array.shape[2:]
        blocks += -(-size // (BLOCK * vector))
    return Levels(table, sources, blocks, vector, dtype, out[0].shape[0])


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
        kernels._find("take_float32", 4)  # the driver reads the file here, not in the middle of a picture
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
        sources: Array,
        encoder_of: Array,
        rows_of: Array,
        scales: Array,
        rules: Array,
        boxes: Array,
        mode: str,
        overlap: str,
    ) -> None:
        """One launch for every level, row and source. table, sources: `plan.table` and `plan.sources` on the device;
        the rest as in relocate_merge.py."""
        rows, num_sources, most_rows = rows_of.shape
        _, box_levels, _ = boxes.shape
        assert (rows, num_sources) == (plan.rows, plan.sources.shape[1]) and most_rows <= MOST_ROWS
        assert mode in ("bilinear", "area") and overlap in OVERLAPS
        _agree(encoder_of=(encoder_of, "int32", rows), rows_of=(rows_of, "int32"),
               scales=(scales, "float32", rows, num_sources), rules=(rules, "int32", num_sources, 3),
               boxes=(boxes, "int32", boxes.shape[0], box_levels, 4))  # fmt: skip
        name = f"relocate_merge_{mode}{'_single' if plan.vector == 1 else ''}_{plan.dtype}"
        arrays = table, sources, encoder_of, rows_of, scales, rules, boxes
        values = len(plan.table), rows, num_sources, most_rows, box_levels, OVERLAPS.index(overlap)
        self._launch(stream, name, (plan.blocks, 1), arrays, values)

    def guide_step(
        self,
        stream: Any,
        latents: Array,
        histories: Array | None,
        step: Array,
        tickets: Array,
        noise_pred: Array,
        decoder_of: Array,
        weights: Array,
        matrix: Array,
        noise: Array | None,
        preview: Array | None,
    ) -> None:
        """As in guide_step.py. tickets: (B,) int32, counters of finished blocks, zero before and after the launch."""
        pictures, *shape = latents.shape
        count = 0 if histories is None else histories.shape[1]
        assert histories is None or count in (1, 2), f"histories is {histories.shape}, expected one or two of them"
        optional = {
            "histories": (histories, "float32", pictures, count, *shape),
            "noise": (noise, "float32", pictures, *shape),
            "preview": (preview, "float32", pictures, *shape),
        }
        _agree(latents=(latents, "float32"), step=(step, "int32", pictures), tickets=(tickets, "int32", pictures),
               noise_pred=(noise_pred, noise_pred.dtype, noise_pred.shape[0], *shape),
               decoder_of=(decoder_of, "int32", pictures, 3), weights=(weights, "float64", pictures, 3),
               matrix=(matrix, "float64", matrix.shape[0], 4, 5),
               **{name: stated for name, stated in optional.items() if stated[0] is not None})  # fmt: skip
        size = math.prod(shape)
        arrays = latents, histories, step, tickets, noise_pred, decoder_of, weights, matrix, noise, preview
        given = [ABSENT if array is None else array for array in arrays]
        self._launch(stream, f"guide_step_{noise_pred.dtype}", (_blocks(size), pictures), given, (count, size))

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
