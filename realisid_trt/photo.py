"""A photo in any common form → an upright RGB array, or a refusal that says what to do. Pillow decodes.

Footgun: never `cv2.imread`. It returns a half-grey picture for a truncated JPEG, drops transparency, and decodes a
400 MP bomb into 1.2 GB before anybody can say no.
"""

from __future__ import annotations

import hashlib
import io
import os
import struct
import zlib
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from .errors import PhotoError

MAX_PIXELS = 100_000_000  # refused from the header, before anything is decoded
MIN_SIDE_PX = 64
WORKING_SIDE_PX = 2048  # a face front end gains nothing from more; larger photos are reduced to this longest side
MATTE = (255, 255, 255)  # what shines through where a photo is transparent

Photo = str | os.PathLike[str] | bytes | bytearray | Image.Image | NDArray[np.generic]

# What Pillow's decoders raise on damaged files besides OSError (found by flipping bytes of all common formats).
DECODER_ERRORS = (
    OSError, SyntaxError, ValueError, TypeError, LookupError, EOFError, OverflowError, struct.error, zlib.error,
)  # fmt: skip


def load_photo(source: Photo, name: str | None = None) -> NDArray[np.uint8]:
    """The photo as upright RGB, its longest side at most 2048 px.

    source: path, bytes of a file, PIL image, or array: (H, W), (H, W, 1), (H, W, 3) RGB or (H, W, 4) RGBA,
            uint8 or uint16.
    name:   what error messages call it; the path by default, else "photo".

    EXIF orientation is applied, transparency is laid on white, 16 bits are cut to 8, any colour mode becomes RGB, and
    of an animation the first frame is taken. Coordinates elsewhere ("photo px") are pixels of the returned array.

    Returns (H, W, 3) uint8. Raises PhotoError: not_found, unreadable, corrupt, too_large, too_small, mode, dtype,
    shape, type.
    """
    name = name or (os.fspath(source) if isinstance(source, (str, os.PathLike)) else "photo")
    with ExitStack() as stack:
        if isinstance(source, np.ndarray):
            picture = _from_array(source, name)
        elif isinstance(source, Image.Image):
            picture = source
        elif isinstance(source, (str, os.PathLike, bytes, bytearray)):
            picture = stack.enter_context(_open(source, name))
        else:
            raise PhotoError(
                "type",
                f"{name}: a {type(source).__name__} is not a photo. Give a path, the bytes of a file, a PIL image or a "
                "uint8 RGB array.",
            )
        _check_size(picture, name)
        try:
            if picture is not source:  # the caller's own image is not ours to change
                picture.draft(picture.mode, (WORKING_SIDE_PX, WORKING_SIDE_PX))  # JPEG: decoded at 1/2, 1/4 or 1/8
            picture = ImageOps.exif_transpose(picture)
            return _to_rgb(picture, name)
        except PhotoError:
            raise
        except DECODER_ERRORS as error:
            raise PhotoError(
                "corrupt",
                f"{name}: the file is damaged or truncated ({error}). Copy or export it again from the original.",
            ) from error


def photo_hash(rgb: NDArray[np.uint8]) -> str:
    """SHA-256 of shape and pixels, in hex: the cache key of what was computed from a photo.

    rgb: (H, W, 3) uint8.
    """
    digest = hashlib.sha256(repr(rgb.shape).encode())
    digest.update(np.ascontiguousarray(rgb).data)
    return digest.hexdigest()


def _open(source: str | os.PathLike[str] | bytes | bytearray, name: str) -> Image.Image:
    """The picture with its header read and its pixels not yet decoded."""
    if not isinstance(source, (bytes, bytearray)):
        path = Path(source)
        if not path.exists():
            raise PhotoError("not_found", f"{name}: no such file. Check the path; it was looked up in {Path.cwd()}.")
        if path.is_dir():
            raise PhotoError("unreadable", f"{name}: this is a folder. Give the path of one photo.")
    try:
        return Image.open(io.BytesIO(source) if isinstance(source, (bytes, bytearray)) else source)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:  # the latter: `python -W error`
        raise PhotoError(
            "too_large",
            f"{name}: the picture has more than {MAX_PIXELS / 1e6:.0f} megapixels, the limit. Reduce it; "
            f"{WORKING_SIDE_PX} pixels on the longer side are enough.",
        ) from error
    except PermissionError as error:
        raise PhotoError("unreadable", f"{name}: no permission to read this file. Change its permissions.") from error
    except UnidentifiedImageError as error:
        raise PhotoError(
            "unreadable",
            f"{name}: not a picture that can be read. JPEG, PNG, WebP, TIFF, BMP and GIF are; save it as one of them "
            "(8 bits per channel).",
        ) from error
    except DECODER_ERRORS as error:
        raise PhotoError(
            "unreadable",
            f"{name}: the header of this picture cannot be read ({error}). Copy or export it again from the original.",
        ) from error


def _check_size(picture: Image.Image, name: str) -> None:
    width, height = picture.size
    if width * height > MAX_PIXELS:
        raise PhotoError(
            "too_large",
            f"{name}: {width}×{height} is {width * height / 1e6:.0f} megapixels, the limit is {MAX_PIXELS / 1e6:.0f}. "
            f"Reduce it; {WORKING_SIDE_PX} pixels on the longer side are enough.",
        )
    if min(width, height) < MIN_SIDE_PX:
        raise PhotoError(
            "too_small",
            f"{name}: {width}×{height} is too small, at least {MIN_SIDE_PX} pixels per side are needed. "
            "Use a larger version of the photo; enlarging this one does not help.",
        )


def _to_rgb(picture: Image.Image, name: str) -> NDArray[np.uint8]:
    """Any mode of Pillow → (H, W, 3) uint8, at most WORKING_SIDE_PX on the longer side."""
    if picture.mode == "F":
        raise PhotoError("mode", f"{name}: floating-point pixels have no agreed range. Save it as 8 bits per channel.")
    if picture.mode == "I" or picture.mode.startswith("I;"):  # 16 or 32 bits, which convert("RGB") would clip to white
        picture = Image.fromarray(_grey_to_8_bits(np.asarray(picture), name))
    try:
        picture.load()
        if picture.has_transparency_data:
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, (*MATTE, 255)), picture)
        picture = picture.convert("RGB")
    except ValueError as error:
        if "conversion from" not in str(error):
            raise
        raise PhotoError(
            "mode", f"{name}: colour mode {picture.mode} cannot become RGB. Save the photo as sRGB JPEG or PNG."
        ) from error
    if max(picture.size) > WORKING_SIDE_PX:
        picture = picture.copy()
        picture.thumbnail((WORKING_SIDE_PX, WORKING_SIDE_PX), Image.Resampling.LANCZOS)
    return np.array(picture)


def _grey_to_8_bits(grey: NDArray[np.generic], name: str) -> NDArray[np.uint8]:
    """(H, W) integers up to 65535 → uint8. Files that keep 8-bit values in a wide container are taken as 8-bit."""
    low, high = int(np.min(grey)), int(np.max(grey))
    if low < 0 or high > 65535:
        raise PhotoError(
            "mode", f"{name}: grey values from {low} to {high}, more than 16 bits hold. Save it as 8 bits per channel."
        )
    wide = grey.astype(np.uint16)
    return (wide >> 8 if high > 255 else wide).astype(np.uint8)


def _from_array(array: NDArray[np.generic], name: str) -> Image.Image:
    if array.dtype == np.uint16:
        array = array.astype(np.uint16) >> 8
    elif array.dtype != np.uint8:
        raise PhotoError(
            "dtype",
            f"{name}: the array is {array.dtype}, expected uint8. For floats from 0 to 1: "
            "(array * 255).round().astype(numpy.uint8).",
        )
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)) or array.size == 0:
        raise PhotoError(
            "shape",
            f"{name}: the array is {array.shape}, expected (H, W), (H, W, 3) RGB or (H, W, 4) RGBA. "
            "Transpose (3, H, W) arrays and give one photo at a time.",
        )
    return Image.fromarray(np.ascontiguousarray(array.astype(np.uint8)))
