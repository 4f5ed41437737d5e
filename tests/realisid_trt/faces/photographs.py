"""The original packages' results on the two photographs, and ways to make other photos of these."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from realisid_trt.errors import PhotoError
from realisid_trt.persons.photo import LoadedPhoto, load_photo

Rgb = NDArray[np.uint8]

# Recorded by tests/faces_oracle.py.
EXPECTED: dict[str, Any] = json.loads((Path(__file__).parents[2] / "data" / "faces_expected.json").read_text())
NAMES = ("astronaut.png", "hopper.jpg")
GREY = (120, 120, 120)


def refusal(code: str, call: Any, *arguments: Any, **options: Any) -> str:
    """The text of the PhotoError that a call raises."""
    with pytest.raises(PhotoError) as caught:
        call(*arguments, **options)
    assert caught.value.code == code, str(caught.value)
    return str(caught.value)


def on_grey(photo: LoadedPhoto, scale: float, canvas: int = 400) -> LoadedPhoto:
    """The photo, scaled, in the corner of a grey picture."""
    height, width = photo.rgb.shape[:2]
    small = Image.fromarray(photo.rgb).resize((round(width * scale), round(height * scale)), Image.Resampling.LANCZOS)
    wide = Image.new("RGB", (canvas, canvas), GREY)
    wide.paste(small, (30, 30))
    return load_photo(wide)


def beside(*photos: LoadedPhoto) -> LoadedPhoto:
    """The photos in a row, as one."""
    height = max(len(photo.rgb) for photo in photos)
    return load_photo(np.hstack([np.pad(p.rgb, ((0, height - len(p.rgb)), (0, 0), (0, 0))) for p in photos]))


def enlarged(photo: LoadedPhoto, factor: int) -> Image.Image:
    """The photo with each pixel repeated factor × factor times, as from a camera with more pixels."""
    height, width = photo.rgb.shape[:2]
    return Image.fromarray(photo.rgb).resize((width * factor, height * factor), Image.Resampling.NEAREST)


def same_face(box: Any, other: Any) -> bool:
    """Whether two boxes share more of their union than MTCNN's own suppression lets two faces share."""
    x0, y0 = np.maximum(box[:2], other[:2])
    x1, y1 = np.minimum(box[2:], other[2:])
    shared = (x1 - x0) * (y1 - y0)
    areas = [(b[2] - b[0]) * (b[3] - b[1]) for b in (box, other)]
    return bool(x1 > x0 and y1 > y0 and shared / (sum(areas) - shared) > 0.7)
