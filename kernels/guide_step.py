"""guide_step: three-way guidance and the DDIM update. RealisID Eq. (8); DDIM with η = 0."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def guide_step(
    latents: NDArray[np.float32],
    step: NDArray[np.int32],
    noise_pred: NDArray[np.float32],
    decoder_of: NDArray[np.int32],
    weights: NDArray[np.float64],
    coefficients: NDArray[np.float64],
) -> None:
    """The next latents, and the next step, in place: z' = A·z + B·(c_none·none + c_text·text + c_full·full).

    latents:      (B, C, H, W) float32, updated.
    step:         (B,) int32, each picture's place in `coefficients`; increased by one.
    noise_pred:   (R, C, H, W) float32, rows of the UNet decoder (ε or v: Eq. (8) commutes with the conversion).
    decoder_of:   (B, 3) int32, the row of each picture's none, text and full prediction, -1 where it has none.
    weights:      (B, 3) float64, their coefficients; they sum to 1.
    coefficients: (S, 2) float64, A and B of every step.
    """
    for z, rows, row_weights, (scale, shift) in zip(latents, decoder_of, weights, coefficients[step], strict=True):
        z *= np.float32(scale)
        for row, weight in zip(rows, row_weights, strict=True):
            if row >= 0:
                z += np.float32(shift * weight) * noise_pred[row]
    step += 1
