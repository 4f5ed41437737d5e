"""crop_upsample: the face, cut out of the latents and up-sampled. RealisID Eq. (5), ẑ_t."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .resample import resize_matrix


def crop_upsample(
    latents: NDArray[np.float32], pictures: NDArray[np.int32], boxes: NDArray[np.int32], canvas: int
) -> NDArray[np.float32]:
    """The faces of several pictures, each on a square canvas.

    latents:  (B, C, H, W) float32.
    pictures: (F,) int32, the picture of each face.
    boxes:    (F, 4) int32, x0, y0, x1, y1 in latent cells, half-open, inside the picture; any rectangle.
    canvas:   side of the result in cells (the UNet's sample_size).

    Returns (F, C, canvas, canvas) float32: bilinear, half-pixel centres (align_corners=False).
    """
    faces = np.empty((len(boxes), latents.shape[1], canvas, canvas), np.float32)
    for face, picture, (x0, y0, x1, y1) in zip(faces, pictures, boxes, strict=True):
        crop = latents[picture, :, y0:y1, x0:x1]
        # Columns first: the small side, so the fewest products.
        np.matmul(resize_matrix(y1 - y0, canvas), crop @ resize_matrix(x1 - x0, canvas).T, out=face)
    return faces
