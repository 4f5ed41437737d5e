"""A photo in any common form → an upright RGB array, or a refusal that says what to do. Pillow decodes.

**Photo px**, in which faces' boxes are given and reported, are pixels of the upright original (EXIF orientation
applied), however small the array is that the face front end works on.

Footgun: never `cv2.imread`. It returns a half-grey picture for a truncated JPEG, drops transparency, and decodes a
400 MP bomb into 1.2 GB before anybody can say no.
"""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from .errors import PhotoError, RequestError
from .files import sha256

MAX_PIXELS = 100_000_000  # refused from the header, before anything is decoded
MIN_SIDE_PX = 64
WORKING_SIDE_PX = 2048  # a face front end gains nothing from more; larger photos are reduced to this longest side
WHITE, BLACK = (255, 255, 255), (0, 0, 0)  # what shines through where a picture is transparent
ON_ITS_SIDE = (5, 6, 7, 8)  # EXIF orientations that exchange width and height

Photo = str | os.PathLike[str] | bytes | bytearray | Image.Image | NDArray[np.generic]

# Not all that Pillow knows: it gives EPS to Ghostscript, and finds pictures in containers whose headers tell no size.
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "TIFF", "BMP", "GIF", "AVIF", "JPEG2000", "PPM", "TGA", "HEIF")

# What Pillow's decoders raise on damaged files besides OSError (found by flipping bytes of all common formats).
DECODER_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    EOFError,
    OverflowError,
    struct.error,
    zlib.error,
)


@dataclass(frozen=True, eq=False)
class LoadedPhoto:
    """A photo as the face front end works on it.

    rgb:  (h, w, 3) uint8, upright, its longest side at most 2048 px.
    size: (H, W) of the upright original, photo px.
    """

    rgb: NDArray[np.uint8]
    size: tuple[int, int]

    @property
    def scale(self) -> float:
        """Photo px per pixel of `rgb`; at least 1."""
        return max(self.size) / float(max(self.rgb.shape[:2]))

    def turned(self, turns: int) -> LoadedPhoto:
        """The photo turned counter-clockwise by quarter turns, as `numpy.rot90` does."""
        if turns % 4 == 0:
            return self
        size = self.size[::-1] if turns % 2 else self.size
        return LoadedPhoto(np.ascontiguousarray(np.rot90(self.rgb, turns)), size)


def load_photo(source: Photo, name: str | None = None) -> LoadedPhoto:
    """The photo, upright and reduced to at most 2048 px on its longest side.

    source: path, bytes of a file, PIL image, or array: (H, W), (H, W, 1), (H, W, 3) RGB or (H, W, 4) RGBA,
            uint8 or uint16.
    name:   what error messages call it; the path by default, else "photo".

    EXIF orientation is applied, transparency is laid on white, 16 bits are cut to 8, any colour mode becomes RGB, and
    of an animation the first frame is taken.

    Raises PhotoError: not_found, unreadable, corrupt, too_large, too_small, mode, dtype, shape, type.
    """
    name = name or _path(source) or "photo"
    with ExitStack() as stack, _typed_errors(name):
        picture = _open(source, name, stack)
        _check_size(picture, name)
        size = picture.size
        if picture is not source:  # the caller's own image is not ours to change
            picture.draft(picture.mode, (WORKING_SIDE_PX, WORKING_SIDE_PX))  # JPEG: decoded at 1/2, 1/4 or 1/8
        picture.load()
        if picture.getexif().get(ExifTags.Base.Orientation) in ON_ITS_SIDE:
            size = size[::-1]
        rgb = _to_rgb(ImageOps.exif_transpose(picture), WHITE, name)
        rgb.thumbnail((WORKING_SIDE_PX, WORKING_SIDE_PX), Image.Resampling.LANCZOS)
        return LoadedPhoto(np.array(rgb), (size[1], size[0]))


def load_crop(source: Photo, size_px: int, name: str) -> NDArray[np.uint8]:
    """A face crop of the caller's own, resized: the squared face with its background already zeroed.

    source: a square picture of any size, in any form that `load_photo` takes; transparent pixels become black.
    name:   what error messages call it.

    Returns (size_px, size_px, 3) uint8. Raises RequestError if it is not square, PhotoError as `load_photo`.
    """
    with ExitStack() as stack, _typed_errors(name):
        picture = _open(source, name, stack)
        _check_size(picture, name, least_px=1)
        rgb = _to_rgb(ImageOps.exif_transpose(picture), BLACK, name)
    if rgb.width != rgb.height:
        raise RequestError(
            f"{name} is {rgb.width}×{rgb.height}, expected a square (S, S, 3) picture of the face, background zeroed."
        )
    # Not Lanczos, whose ringing would light up the zeroed background along the face.
    return np.array(rgb.resize((size_px, size_px), Image.Resampling.BILINEAR))


def photo_hash(photo: LoadedPhoto) -> str:
    """SHA-256 of size and pixels, in hex: the cache key of what was computed from a photo."""
    return sha256(repr((photo.size, photo.rgb.shape)).encode(), np.ascontiguousarray(photo.rgb).data)


def _path(source: object) -> str | None:
    return os.fsdecode(source) if isinstance(source, (str, os.PathLike)) else None


def _open(source: Photo, name: str, stack: ExitStack) -> Image.Image:
    """The picture with its header read and its pixels not yet decoded; `stack` closes its file."""
    if isinstance(source, np.ndarray):
        return _from_array(source, name)
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, (bytes, bytearray)):
        file: IO[bytes] = io.BytesIO(source)
    elif isinstance(source, (str, os.PathLike)):
        file = stack.enter_context(_open_file(source, name))
    else:
        raise PhotoError(
            "type",
            f"{name}: a {type(source).__name__} is not a photo. Give a path, the bytes of a file, a PIL image or a "
            "uint8 RGB array.",
        )
    Image.init()
    try:  # some come with newer Pillows, or with a package that adds them
        return stack.enter_context(Image.open(file, formats=[name for name in FORMATS if name in Image.OPEN]))
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


def _open_file(path: str | os.PathLike[str], name: str) -> io.BufferedReader:
    try:
        return open(path, "rb")
    except (FileNotFoundError, NotADirectoryError) as error:
        looked = "" if os.path.isabs(path) else f"; it was looked up in {Path.cwd()}"
        raise PhotoError("not_found", f"{name}: no such file. Check the path{looked}.") from error
    except IsADirectoryError as error:
        raise PhotoError("unreadable", f"{name}: this is a folder. Give the path of one photo.") from error
    except PermissionError as error:
        raise PhotoError("unreadable", f"{name}: no permission to read this file. Change its permissions.") from error
    except (OSError, ValueError) as error:  # a name of 5000 characters, or with a zero byte in it
        reason = getattr(error, "strerror", None) or error
        short = name if len(name) <= 200 else f"{name[:200]}…"
        raise PhotoError("unreadable", f"{short}: this file cannot be opened ({reason}). Check the path.") from error


@contextmanager
def _typed_errors(name: str) -> Iterator[None]:
    """Whatever a decoder raises becomes a PhotoError."""
    try:
        yield
    except PhotoError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:  # the latter: `python -W error`
        raise PhotoError(
            "too_large",
            f"{name}: the picture has more than {MAX_PIXELS / 1e6:.0f} megapixels, the limit. Reduce it; "
            f"{WORKING_SIDE_PX} pixels on the longer side are enough.",
        ) from error
    except DECODER_ERRORS as error:
        raise PhotoError(
            "corrupt", f"{name}: the file is damaged or truncated ({error}). Copy or export it again from the original."
        ) from error


def _check_size(picture: Image.Image, name: str, least_px: int = MIN_SIDE_PX) -> None:
    width, height = picture.size
    if width * height > MAX_PIXELS:
        raise PhotoError(
            "too_large",
            f"{name}: {width}×{height} is {width * height / 1e6:.0f} megapixels, the limit is {MAX_PIXELS / 1e6:.0f}. "
            f"Reduce it; {WORKING_SIDE_PX} pixels on the longer side are enough.",
        )
    if min(width, height) < least_px:
        raise PhotoError(
            "too_small",
            f"{name}: {width}×{height} is too small, at least {least_px} pixels per side are needed. "
            "Use a larger version of the photo; enlarging this one does not help.",
        )


def _to_rgb(picture: Image.Image, matte: tuple[int, int, int], name: str) -> Image.Image:
    """Any mode of Pillow → RGB, a picture of its own; matte: what shines through transparent pixels."""
    if picture.mode == "F":
        raise PhotoError("mode", f"{name}: floating-point pixels have no agreed range. Save it as 8 bits per channel.")
    if picture.mode == "I" or picture.mode.startswith("I;"):  # 16 or 32 bits, which convert("RGB") would clip to white
        picture = Image.fromarray(_grey_to_8_bits(np.asarray(picture), name))
    try:
        picture.load()
        if picture.has_transparency_data:
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, (*matte, 255)), picture)
        return picture.convert("RGB")
    except ValueError as error:
        if "conversion from" not in str(error):
            raise
        raise PhotoError(
            "mode", f"{name}: colour mode {picture.mode} cannot become RGB. Save the photo as sRGB JPEG or PNG."
        ) from error


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
