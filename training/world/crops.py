"""The ID crop of a person of this world, made as the runtime makes it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from realisid_trt.checks import is_finite, is_whole
from realisid_trt.errors import RequestError
from realisid_trt.persons.faces.mask import hull_mask
from realisid_trt.persons.faces.squares import apply, as_box, crop_square, grown

from .scenes import Picture

KEPT = ("head", "hull")


def id_crop(picture: Picture, person: int, size_px: int, margin: float = 1.5, keep: str = "head") -> NDArray[np.uint8]:
    """The face of an actor, its background zeroed.

    person:  number of the actor, from the left.
    size_px: side of the crop.
    margin:  side of the crop over the side of the face square: `face_margin` of a checkpoint.
    keep:    "head": the visible face, hair, ears, glasses and hat (for `Engine.embed(…, crop=…)`); "hull": the part
             that the runtime keeps of a photo with given landmarks and no face parser, `hull_mask`.

    Returns (size_px, size_px, 3) uint8. Raises RequestError.
    """
    if not is_whole(person) or not 0 <= person < len(picture.boxes):
        raise RequestError(f"person is {person!r}, expected 0 to {len(picture.boxes) - 1}, counted from the left.")
    if not is_whole(size_px) or size_px < 1 or not is_finite(margin) or margin <= 0:
        raise RequestError(f"size_px is {size_px!r}, margin {margin!r}; expected at least 1 px and a margin > 0.")
    if keep not in KEPT:
        raise RequestError(f"keep is {keep!r}, expected one of {', '.join(KEPT)}.")
    x0, y0, x1, y1 = picture.boxes[person]
    square = grown(as_box((x0, y0, x1, y1)), margin)
    crop, to_crop = crop_square(picture.rgb, square, size_px)
    if keep == "hull":
        points = picture.landmarks[person] * (x1 - x0) + (x0, y0)
        mask: NDArray[np.float32] = hull_mask(apply(to_crop, points), size_px)
    else:
        head = np.repeat(picture.head(person)[..., None].astype(np.uint8) * 255, 3, axis=2)
        mask = np.asarray(crop_square(head, square, size_px)[0][..., 0] / np.float32(255), np.float32)
    return np.round(crop * mask[..., None]).astype(np.uint8)
