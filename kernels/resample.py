"""Resampling as a matrix: a resize of X is R_y·X·R_xᵀ."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray


@lru_cache(maxsize=1024)
def resize_matrix(size_in: int, size_out: int, mode: str = "bilinear") -> NDArray[np.float32]:
    """(size_out, size_in) float32: row j holds the weights of the inputs that make output j; each row sums to 1.

    mode: "bilinear" (half-pixel centres, edges clamped, no antialias) or "area" (mean over the cells that output j
          covers, whole cells only), both as torch's F.interpolate defines them.

    Positions and weights are computed in float64, then rounded to float32.
    """
    assert mode in ("bilinear", "area"), mode
    matrix = np.zeros((size_out, size_in))
    j = np.arange(size_out)
    if mode == "area":
        start, end = j * size_in // size_out, -(-(j + 1) * size_in // size_out)
        for row, first, last in zip(matrix, start, end, strict=True):
            row[first:last] = 1 / (last - first)
    else:
        position = ((j + 0.5) * size_in / size_out - 0.5).clip(0)
        left = position.astype(np.int64).clip(max=size_in - 1)
        right = (left + 1).clip(max=size_in - 1)
        np.add.at(matrix, (j, left), 1 - (position - left))
        np.add.at(matrix, (j, right), position - left)
    rounded = matrix.astype(np.float32)
    rounded.flags.writeable = False
    return rounded
