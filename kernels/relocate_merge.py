"""relocate_merge: the residuals of all branches, brought into the UNet. RealisID Eq. (4) and "Inference for
Multi-Person Customization", for any number of branches.

out[r] = skip[encoder_of[r]] + Σ_s scale[r, s] · acc_s[r]
acc_s[r]: the sum, or the mean, over n of residual_s[rows_of[r, s, n]], each placed as the rule of source s says
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .resample import resize_matrix

Array = NDArray[np.float32]
EVERYWHERE, INSIDE, RELOCATED = range(3)  # where a source places its residuals


def relocate_merge(
    skips: Sequence[Array],
    residuals: Sequence[Sequence[Array]],
    encoder_of: NDArray[np.int32],
    rows_of: NDArray[np.int32],
    scales: Array,
    rules: NDArray[np.int32],
    boxes: NDArray[np.int32],
    levels: Sequence[int],
    mode: str = "bilinear",
    overlap: str = "sum",
) -> list[Array]:
    """The decoder's inputs for all its rows.

    A source is a branch that has rows in this step; there are S. An entry is a skip of the UNet, the mid block's output
    last (ten at SDXL).
    skips:     (E, C, H, W) float32 per entry, rows of the UNet encoder.
    residuals: of every source, (P, C, h, w) float32 per entry: its P rows. (h, w) is (H, W), or for RELOCATED the size
               of the source's canvas.
    levels:    the level of each entry: which of the boxes it uses.

    encoder_of: (R,) int32, the encoder row that decoder row r continues.
    rows_of:    (R, S, N) int32, the rows of source s that decoder row r receives, in the order of the persons, -1 after
                the last; the first is -1 where it receives none.
    scales:     (R, S) float32.
    rules:      (S, 3) int32: the source's placement; 1 for the mean over its rows, 0 for their sum; the index in
                `boxes` of its first row's, -1 for EVERYWHERE.
    boxes:      (ΣP, L, 4) int32, x0, y0, x1, y1 in cells of each level, half-open: one for every row of the sources
                that have boxes, one source after another.
    mode:       R's down-sampling, "bilinear" or "area".
    overlap:    of the boxes of one source: "sum" (the paper), "average" (each cell divided by the number of boxes that
                cover it) or "priority" (the later row covers).

    Placements: EVERYWHERE, the residual as it is; INSIDE, the residual inside the box and zero outside; RELOCATED, the
    residual down-sampled by R to the box, and zero outside.

    Returns a list of (R, C, H, W) float32.
    """
    assert overlap in ("sum", "average", "priority"), overlap
    merged = []
    for skip, level, *maps in zip(skips, levels, *residuals, strict=True):
        out = np.empty((len(encoder_of), *skip.shape[1:]), np.float32)
        injected: dict[tuple[bytes, bytes], Array] = {}  # decoder rows that receive the same share their sum
        for r, encoder_row in enumerate(encoder_of):
            if not (rows_of[r] >= 0).any():
                out[r] = skip[encoder_row]
                continue
            key = rows_of[r].tobytes(), scales[r].tobytes()
            if key not in injected:
                injected[key] = _inject(maps, rows_of[r], scales[r], rules, boxes, level, skip.shape[1:], mode, overlap)
            np.add(skip[encoder_row], injected[key], out=out[r])
        merged.append(out)
    return merged


def _inject(
    maps: Sequence[Array],
    rows_of: NDArray[np.int32],
    scales: Array,
    rules: NDArray[np.int32],
    boxes: NDArray[np.int32],
    level: int,
    shape: tuple[int, ...],
    mode: str,
    overlap: str,
) -> Array:
    """(C, H, W), the shape: the injection into one decoder row at one level. maps: every source's residuals there."""
    injected: Array | None = None
    for residual, of, scale, (placement, is_mean, first_box) in zip(maps, rows_of, scales, rules, strict=True):
        rows = of[of >= 0]
        if not len(rows):
            continue
        if placement == EVERYWHERE:
            total = residual[rows].sum(axis=0)
        else:
            total = _placed(residual, rows, boxes[first_box + rows, level], shape, placement, mode, overlap)
        # The mean is a flag; the caller does not give scale/N. Here the sum is divided, in the kernel the scale: each
        # gives to the bit what it gave when there were two branches.
        if is_mean:
            total /= len(rows)
        total *= scale
        injected = total if injected is None else np.add(injected, total, out=injected)
    assert injected is not None
    return injected


def _placed(
    residual: Array,
    rows: NDArray[np.int32],
    boxes: NDArray[np.int32],
    shape: tuple[int, ...],
    placement: int,
    mode: str,
    overlap: str,
) -> Array:
    """(C, H, W), the shape: the rows of one source, each in its box, put together as `overlap` says."""
    total = np.zeros(shape, np.float32)
    covered = np.zeros(shape[1:], np.float32)
    for row, (x0, y0, x1, y1) in zip(rows, boxes, strict=True):
        if placement == INSIDE:
            inside = residual[row, :, y0:y1, x0:x1]
        else:
            height, width = residual.shape[2:]
            across = residual[row] @ resize_matrix(width, x1 - x0, mode).T
            inside = resize_matrix(height, y1 - y0, mode) @ across
        if overlap == "priority":
            total[:, y0:y1, x0:x1] = inside
        else:
            total[:, y0:y1, x0:x1] += inside
        covered[y0:y1, x0:x1] += 1
    if overlap == "average":
        total /= covered.clip(1)
    return total
