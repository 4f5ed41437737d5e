"""The oracle of relocate_merge for the two sources of RealisID: its NumPy reference and its launcher as they were when
it knew exactly these two. The kernel of that time is in two_sources.cpp. Not to be developed further.

out[r] = skip[encoder_of[r]] + s_g · mean_p global[global_of[r, p]] + s_l · Σ_p R(local[local_of[r, p]], box_p)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from realisid_trt.kernels import launch
from realisid_trt.kernels.launch import BLOCK, ITEM_BYTES, OVERLAPS
from realisid_trt.kernels.resample import resize_matrix
from tests.kernels.bench import HostKernels

Array = NDArray[np.float32]
LEVEL = np.dtype(
    [(name, "<u8") for name in ("skips", "local", "global", "out")]
    + [(name, "<i4") for name in ("first_block", "size", "height", "width", "local_height", "local_width", "box_level",
                                  "unused")]
)  # fmt: skip


def relocate_merge(
    skips: Sequence[Array],
    local_residuals: Sequence[Array],
    global_residuals: Sequence[Array],
    encoder_of: NDArray[np.int32],
    local_of: NDArray[np.int32],
    global_of: NDArray[np.int32],
    boxes: NDArray[np.int32],
    levels: Sequence[int],
    scales: Array,
    mode: str = "bilinear",
    overlap: str = "sum",
) -> list[Array]:
    """The decoder's inputs for all its rows.

    One entry of each sequence per skip of the UNet, the mid block's output last (ten at SDXL):
    skips:            (E, C, H, W) float32, rows of the UNet encoder.
    local_residuals:  (P, C, h, w) float32, rows of the local branch, on its canvas; empty if it was not evaluated.
    global_residuals: (Q, C, H, W) float32, rows of the global branch; empty if it was not evaluated.
    levels:           the level of that entry: which of the boxes it uses.

    encoder_of:  (R,) int32, the encoder row that decoder row r continues.
    local_of:    (R, N) int32, the rows of the local branch that decoder row r receives, in the order of the persons, -1
                 after the last.
    global_of:   (R, N) int32, those of the global branch.
    boxes:       (P, L, 4) int32, x0, y0, x1, y1 of each local row's face in cells of each level, half-open.
    scales:      (R, 2) float32, s_l and s_g.
    mode:        R's down-sampling, "bilinear" or "area".
    overlap:     "sum" (the paper), "average" (each cell divided by the number of boxes that cover it) or "priority"
                 (the later person covers).

    Returns a list of (R, C, H, W) float32.
    """
    assert overlap in ("sum", "average", "priority"), overlap
    merged = []
    absent = [np.empty((0, 0, 0, 0), np.float32)] * len(skips)
    entries = zip(skips, local_residuals or absent, global_residuals or absent, levels, strict=True)
    for skip, local, global_residual, level in entries:
        out = np.empty((len(encoder_of), *skip.shape[1:]), np.float32)
        injected: dict[tuple[bytes, bytes, bytes], Array] = {}  # rows that read the same residuals share their sum
        for r in range(len(encoder_of)):
            local_rows, global_rows = local_of[r][local_of[r] >= 0], global_of[r][global_of[r] >= 0]
            if not len(local_rows) and not len(global_rows):
                out[r] = skip[encoder_of[r]]
                continue
            key = local_rows.tobytes(), global_rows.tobytes(), scales[r].tobytes()
            if key not in injected:
                faces = [(local[row], boxes[row, level]) for row in local_rows]
                injected[key] = _inject(skip.shape[1:], faces, global_residual[global_rows], scales[r], mode, overlap)
            np.add(skip[encoder_of[r]], injected[key], out=out[r])
        merged.append(out)
    return merged


def _inject(
    shape: tuple[int, ...],
    faces: Sequence[tuple[Array, NDArray[np.int32]]],
    global_residual: Array,
    scales: Array,
    mode: str,
    overlap: str,
) -> Array:
    """(C, H, W), the shape: the injection into one decoder row at one level. faces: local residuals and their boxes."""
    local_scale, global_scale = scales
    relocated = np.zeros(shape, np.float32)
    covered = np.zeros(shape[1:], np.float32)
    for residual, (x0, y0, x1, y1) in faces:
        height, width = residual.shape[1:]
        placed = resize_matrix(height, y1 - y0, mode) @ (residual @ resize_matrix(width, x1 - x0, mode).T)
        if overlap == "priority":
            relocated[:, y0:y1, x0:x1] = placed
        else:
            relocated[:, y0:y1, x0:x1] += placed
        covered[y0:y1, x0:x1] += 1
    if overlap == "average":
        relocated /= covered.clip(1)
    relocated *= local_scale
    if len(global_residual):
        relocated += global_scale * global_residual.mean(axis=0)
    return relocated


class TwoSources(HostKernels):
    """The kernel of that time, two_sources.cpp, built with g++."""

    def merge(self, bench: Any, dtype: str, mode: str, overlap: str, **given: Any) -> list[launch.Array]:
        """What it writes. bench: an OnCpu. given: the first nine arguments of `relocate_merge`."""

        def put(name: str) -> list[launch.Array]:
            return [bench.put(array, dtype) for array in given[name]]

        rows, persons = given["local_of"].shape
        skips = put("skips")
        absent = [launch.Array(skip.address, (0, skip.shape[1], 1, 1), dtype) for skip in skips]
        residuals = zip(put("local_residuals") or absent, put("global_residuals") or skips, strict=True)
        out = [bench.empty((rows, *skip.shape[1:]), dtype) for skip in skips]
        sizes = [math.prod(skip.shape[1:]) for skip in skips]
        vector = 16 // ITEM_BYTES[dtype]
        if any(size % vector for size in sizes):
            vector = 1
        table, blocks = np.zeros(len(skips), LEVEL), 0
        for index, (skip, (local, whole), merged, size) in enumerate(zip(skips, residuals, out, sizes, strict=True)):
            addresses = skip.address, local.address, whole.address, merged.address
            shapes = *skip.shape[2:], *local.shape[2:]
            table[index] = (*addresses, blocks, size, *shapes, given["levels"][index], 0)
            blocks += -(-size // (BLOCK * vector))
        names = "encoder_of", "local_of", "global_of", "boxes", "scales"
        arrays = [bench.put(table.view(np.int32)), len(table), *(bench.put(given[name]) for name in names)]
        values = rows, persons, given["boxes"].shape[1], OVERLAPS.index(overlap)
        name = f"two_sources_{mode}{'_single' if vector == 1 else ''}_{dtype}"
        self._launch(None, name, (blocks, 1), arrays, values)
        return out
