"""ID patches, painted onto a drawing at the persons' noses. ID-Patch, equation of the condition image."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray


def paint_patches(
    drawing: NDArray[np.float32], patches: Sequence[NDArray[np.float32]], anchors: Sequence[ArrayLike]
) -> NDArray[np.float32]:
    """C = D + Σ_p paste(P_p; x0 = round(ν_x - s/2), y0 = round(ν_y - s/2)), cut at the border.

        C, D     → the result, drawing
        P_p, ν_p → patches[p], anchors[p]
        s        → side of a patch, px

    drawing: (3, H, W) float32 in [0, 1].
    patches: of each person (3, s, s) float32. Their values leave [0, 1], and nothing is clipped.
    anchors: of each person (2,) x, y in px of the picture; rounded in float64, halves to even.

    Where patches overlap, they add up. A patch has the same size in every picture.

    Returns (3, H, W) float32, a new array.

    Footgun: the published code rounds anchors to bfloat16 first, which moves patches of large pictures by up to 3 px.
    """
    painted = drawing.copy()
    height, width = drawing.shape[1:]
    for patch, anchor in zip(patches, anchors, strict=True):
        side = patch.shape[-1]
        x0, y0 = (int(value) for value in np.rint(np.asarray(anchor, np.float64) - side / 2))
        left, top = max(x0, 0), max(y0, 0)
        right, bottom = min(x0 + side, width), min(y0 + side, height)
        if left < right and top < bottom:
            painted[:, top:bottom, left:right] += patch[:, top - y0 : bottom - y0, left - x0 : right - x0]
    return painted
