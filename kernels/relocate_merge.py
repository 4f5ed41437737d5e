"""relocate_merge: the residuals of both branches, brought into the UNet. RealisID Eq. (4) and "Inference for
Multi-Person Customization".

out[r] = skip[encoder_of[r]] + s_g · mean_p global[row(r, p)] + s_l · Σ_p R(local[row(r, p)], box_p)
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .resample import resize_matrix

Array = NDArray[np.float32]


def relocate_merge(
    skips: Sequence[Array],
    local_residuals: Sequence[Array],
    global_residuals: Sequence[Array],
    encoder_of: NDArray[np.int32],
    branches_of: NDArray[np.int32],
    boxes: NDArray[np.int32],
    levels: Sequence[int],
    scales: Array,
    mode: str = "bilinear",
    overlap: str = "sum",
) -> list[Array]:
    """The decoder's inputs for all its rows.

    One entry of each sequence per skip of the UNet, the mid block's output last (ten at SDXL):
    skips:            (E, C, H, W) float32, rows of the UNet encoder.
    local_residuals:  (P, C, h, w) float32, rows of the local branch, on its canvas.
    global_residuals: (P, C, H, W) float32, rows of the global branch.
    levels:           the level of that entry: which of the boxes it uses.

    encoder_of:  (R,) int32, the encoder row that decoder row r continues.
    branches_of: (R, N) int32, the branch rows of decoder row r in the order of the persons, -1 behind the last.
    boxes:       (P, L, 4) int32, x0, y0, x1, y1 of each branch row's face in cells of each level, half-open.
    scales:      (R, 2) float32, s_l and s_g.
    mode:        R's down-sampling, "bilinear" or "area".
    overlap:     "sum" (the paper), "average" (each cell divided by the number of boxes that cover it) or "priority"
                 (the later person covers).

    Returns a list of (R, C, H, W) float32.
    """
    assert overlap in ("sum", "average", "priority"), overlap
    merged = []
    for skip, local, whole, level in zip(skips, local_residuals, global_residuals, levels, strict=True):
        out = np.empty((len(encoder_of), *skip.shape[1:]), np.float32)
        injected: dict[tuple[bytes, bytes], Array] = {}  # rows that read the same residuals share their sum
        for r, branches in enumerate(branches_of):
            rows = branches[branches >= 0]
            if not len(rows):
                out[r] = skip[encoder_of[r]]
                continue
            key = rows.tobytes(), scales[r].tobytes()
            if key not in injected:
                injected[key] = _inject(local, whole, rows, boxes[:, level], scales[r], mode, overlap)
            np.add(skip[encoder_of[r]], injected[key], out=out[r])
        merged.append(out)
    return merged


def _inject(
    local: Array,
    whole: Array,
    rows: NDArray[np.int32],
    boxes: NDArray[np.int32],
    scales: Array,
    mode: str,
    overlap: str,
) -> Array:
    """(C, H, W): what one decoder row receives at one level."""
    local_scale, global_scale = scales
    relocated = np.zeros(whole.shape[1:], np.float32)
    covered = np.zeros(whole.shape[2:], np.float32)
    for row in rows:
        x0, y0, x1, y1 = boxes[row]
        residual = local[row]
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
    relocated += global_scale * whole[rows].mean(axis=0)
    return relocated
