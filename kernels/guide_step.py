"""guide_step: guidance and one step of a sampler. RealisID Eq. (8); a sampler is a table of matrices."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]


def guide_step(
    latents: Array,
    histories: Array | None,
    step: NDArray[np.int32],
    noise_pred: Array,
    decoder_of: NDArray[np.int32],
    weights: NDArray[np.float64],
    matrix: NDArray[np.float64],
    noise: Array | None,
    preview: Array | None,
) -> None:
    """The next latents, histories and step, and a preview, in place, cell by cell:

    [z'; h1'; h2'; d] = matrix[step] · [z; m; h1; h2; noise],    m = c_none·none + c_text·text + c_full·full

    latents:    (B, C, H, W) float32, z, updated.
    histories:  (B, K, C, H, W) float32, h1 and h2, updated: what the sampler keeps from step to step, zeros before the
                first. K is 1 or 2; None for a sampler that keeps nothing, K = 0.
    step:       (B,) int32, each picture's place in `matrix`; increased by one.
    noise_pred: (R, C, H, W) float32, rows of the UNet decoder (ε, v or z_0: Eq. (8) commutes with every
                conversion).
    decoder_of: (B, 3) int32, the row of each picture's none, text and full prediction, -1 where it has none.
    weights:    (B, 3) float64, their coefficients; they sum to 1.
    matrix:     (S, 4, 5) float64, the coefficients of every evaluation; unused rows and columns are zeros.
    noise:      (B, C, H, W) float32, fresh normal numbers; None for a sampler that draws none.
    preview:    (B, C, H, W) float32, becomes d, the clean latents as they are predicted now; None: not computed.

    A picture without a decoder row stays as it is: latents, histories, step and preview. All new values are computed
    from the old ones. Sums are float32, in the order of the equation; coefficients are float64, rounded once. A history
    or a noise whose coefficient is zero is not added, so it may hold NaN.
    """
    for b in np.flatnonzero((decoder_of >= 0).any(axis=1)):
        kept = {} if histories is None else dict(enumerate(histories[b], start=1))
        written = {0: latents[b], **kept} | ({} if preview is None else {3: preview[b]})  # by row of the matrix
        added = {1 + k: history for k, history in kept.items()} | ({} if noise is None else {4: noise[b]})  # by column
        new = []
        for row in matrix[step[b], list(written)]:
            total = np.float32(row[0]) * latents[b]
            for predicted, weight in zip(decoder_of[b], weights[b], strict=True):
                if predicted >= 0:
                    total += np.float32(row[1] * weight) * noise_pred[predicted]
            for column, values in added.items():
                if row[column] != 0:
                    total += np.float32(row[column]) * values
            new.append(total)
        for array, total in zip(written.values(), new, strict=True):
            array[...] = total
        step[b] += 1
