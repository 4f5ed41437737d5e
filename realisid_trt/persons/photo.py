"""A photo in any common form → an upright RGB array, or a refusal that says what to do. Pillow decodes.

**Photo px**, in which faces' boxes are given and reported, are pixels of the upright original (EXIF orientation
applied). They do not depend on the size of the array that the face front end works on.

Footgun: never `cv2.imread`. It returns a half-grey picture for a truncated JPEG, drops transparency, and decodes a
400 MP bomb into 1.2 GB before any check can refuse it.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import IO

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps

from ..errors import PhotoError, RequestError
from ..files import sha256
from .colours import narrowed, to_8_bits, to_srgb, wide_rgb
from .containers import DECODER_ERRORS, endings, open_bytes, open_path

MAX_PIXELS = 100_000_000  # refused from the header, before anything is decoded
MAX_REDUCED_PIXELS = 4 * MAX_PIXELS  # of a JPEG, which is decoded at 1/2, 1/4 or 1/8: today's telephones make 200 MP
MIN_SIDE_PX = 64
WORKING_SIDE_PX = 2048  # a face front end gains nothing from more; larger photos are reduced to this longest side
WHITE, BLACK = (255, 255, 255), (0, 0, 0)  # colours behind transparent pixels
ON_ITS_SIDE = (5, 6, 7, 8)  # EXIF orientations that exchange width and height

Photo = str | os.PathLike[str] | bytes | bytearray | Image.Image | NDArray[np.generic]


@dataclass(frozen=True, eq=False)
class LoadedPhoto:
    """A photo as the face front end uses it.

    rgb:   (h, w, 3) uint8 sRGB, upright, its longest side at most 2048 px.
    size:  (H, W) of the upright original, photo px.
    notes: decisions made while it was read, in sentences.
    """

    rgb: NDArray[np.uint8]
    size: tuple[int, int]
    notes: tuple[str, ...] = ()

    @property
    def scale(self) -> float:
        """Photo px per pixel of `rgb`; at least 1."""
        return max(self.size) / float(max(self.rgb.shape[:2]))

    def turned(self, turns: int) -> LoadedPhoto:
        """The photo turned counter-clockwise by quarter turns, as `numpy.rot90` does."""
        if turns % 4 == 0:
            return self
        size = self.size[::-1] if turns % 2 else self.size
        return LoadedPhoto(np.ascontiguousarray(np.rot90(self.rgb, turns)), size, self.notes)


def load_photo(
    source: Photo,
    name: str | None = None,
    background: tuple[int, int, int] = WHITE,
    longest_px: int | None = WORKING_SIDE_PX,
) -> LoadedPhoto:
    """The photo, upright and reduced to at most 2048 px on its longest side.

    source: path, bytes of a file, PIL image, or array: (H, W), (H, W, 1), (H, W, 3) RGB or (H, W, 4) RGBA,
            uint8 or uint16.
    name:   of the photo in error messages; the path by default, else "photo".

    background: colour behind transparent pixels. longest_px: of the longest side; None reduces nothing.

    EXIF orientation and the embedded colour profile are applied (pixels become sRGB), 16 bits are cut to 8, any colour
    mode becomes RGB, and of an animation the first frame is taken.

    Raises PhotoError: not_found, unreadable, corrupt, too_large, too_small, mode, dtype, shape, type.
    """
    name = name or _path(source) or "photo"
    with ExitStack() as stack:
        found = _upright(source, name, stack, reduce=longest_px is not None)
        if longest_px is not None:
            found.picture.thumbnail((longest_px, longest_px), Image.Resampling.LANCZOS)  # never the caller's own
        rgb = to_srgb(found.picture, found.profile, background, name)
    return LoadedPhoto(np.array(rgb), found.size[::-1], found.notes)


def load_crop(source: Photo, size_px: int, name: str) -> NDArray[np.uint8]:
    """A face crop of the caller's own, resized: the squared face with its background already zeroed.

    source: a square picture of any size, in any form that `load_photo` takes; transparent pixels become black.
    name:   of the crop in error messages.

    Returns (size_px, size_px, 3) uint8. Raises RequestError if it is not square, PhotoError as `load_photo`.
    """
    with ExitStack() as stack:
        found = _upright(source, name, stack, reduce=False, least_px=1)
        rgb = to_srgb(found.picture, found.profile, BLACK, name)
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


@dataclass(frozen=True, eq=False)
class _Upright:
    """A decoded picture as `to_8_bits` gives it. size: (width, height) of the upright original."""

    picture: Image.Image
    size: tuple[int, int]
    profile: bytes | None = None
    notes: tuple[str, ...] = ()


def _upright(source: Photo, name: str, stack: ExitStack, reduce: bool, least_px: int = MIN_SIDE_PX) -> _Upright:
    """reduce: a JPEG may be decoded at 1/2, 1/4 or 1/8. stack: closes what was opened."""
    if isinstance(source, np.ndarray):
        array, note = _checked_array(source, name)
        picture: Image.Image = Image.fromarray(array)
        _check_size(picture, picture.size, name, least_px)
        return _Upright(picture, picture.size, notes=(note,) if note else ())
    file = None if isinstance(source, Image.Image) else _opened(source, name, stack)
    with _typed_errors(name, file is None):
        picture = source if file is None else open_bytes(file, name)  # type: ignore[assignment]
        size = picture.size
        if reduce and file is not None:  # the caller's own image is not ours to change
            picture.draft(picture.mode, (WORKING_SIDE_PX, WORKING_SIDE_PX))
    _check_size(picture, size, name, least_px)
    with _typed_errors(name, file is None):
        picture = _decoded(picture, file, name, reduce)
        orientation = picture.getexif().get(ExifTags.Base.Orientation)
        upright = ImageOps.exif_transpose(picture)
    size = size[::-1] if orientation in ON_ITS_SIDE else size
    wide = None if file is None else wide_rgb(_content(file), picture)
    if wide is None:
        upright, note = to_8_bits(upright, name)
    else:
        array, note = narrowed(wide, name)
        upright = Image.fromarray(array)
        upright.getexif()[ExifTags.Base.Orientation] = orientation or 1
        upright = ImageOps.exif_transpose(upright)
    return _Upright(upright, size, picture.info.get("icc_profile"), (note,) if note else ())


def _decoded(picture: Image.Image, file: IO[bytes] | None, name: str, reduce: bool) -> Image.Image:
    """The picture with its pixels; also for a JPEG that lacks its last bytes but no pixel."""
    try:
        picture.load()
        return picture
    except OSError:
        attempts = []
        for content in endings(_content(file)) if file is not None else ():
            attempt = open_bytes(io.BytesIO(content), name)
            if reduce:
                attempt.draft(attempt.mode, (WORKING_SIDE_PX, WORKING_SIDE_PX))
            attempt.load()
            attempts.append(attempt)
        if not attempts or not np.array_equal(np.asarray(attempts[0]), np.asarray(attempts[1])):
            raise
        return attempts[0]


def _content(file: IO[bytes]) -> bytes:
    file.seek(0)
    return file.read()


def _opened(source: object, name: str, stack: ExitStack) -> IO[bytes]:
    """A file of the photo's bytes; `stack` closes it."""
    if isinstance(source, (bytes, bytearray)):
        return io.BytesIO(source)
    if isinstance(source, (str, os.PathLike)):
        return stack.enter_context(open_path(source, name))
    raise PhotoError(
        "type",
        f"{name}: a {type(source).__name__} is not a photo. Give a path, the bytes of a file, a PIL image or a "
        "uint8 RGB array.",
    )


@contextmanager
def _typed_errors(name: str, opened_by_caller: bool = False) -> Iterator[None]:
    """Turns every exception of a decoder into a PhotoError. opened_by_caller: the image is a caller's PIL image."""
    try:
        yield
    except (PhotoError, MemoryError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:  # the latter: `python -W error`
        raise PhotoError(
            "too_large",
            f"{name}: the picture has more than {MAX_PIXELS / 1e6:.0f} megapixels, the limit. Reduce it; "
            f"{WORKING_SIDE_PX} pixels on the longer side are enough.",
        ) from error
    except BaseException as error:
        # a panic of JPEG XL's decoder, which is written in Rust, is not an Exception
        if not isinstance(error, DECODER_ERRORS) and type(error).__name__ != "PanicException":
            raise
        if opened_by_caller:
            raise PhotoError(
                "corrupt",
                f"{name}: Pillow cannot read the pixels of this image ({str(error) or type(error).__name__}). Was it "
                "closed, or its file? Give it while it is open, or give the path.",
            ) from error
        raise PhotoError(
            "corrupt", f"{name}: the file is damaged or truncated ({error}). Copy or export it again from the original."
        ) from error


def _check_size(picture: Image.Image, size: tuple[int, int], name: str, least_px: int) -> None:
    """picture: as it will be decoded. size: as its file has it."""
    width, height = size
    decoded, limit = picture.width * picture.height, MAX_PIXELS
    if "progressive" in picture.info:  # decoding holds all coefficients, at any output size
        decoded = width * height
    elif decoded < width * height:
        decoded, limit = width * height, MAX_REDUCED_PIXELS
    if decoded > limit:
        raise PhotoError(
            "too_large",
            f"{name}: {width}×{height} is {width * height / 1e6:.0f} megapixels, the limit is {limit / 1e6:.0f}. "
            f"Reduce it; {WORKING_SIDE_PX} pixels on the longer side are enough.",
        )
    if min(width, height) < least_px:
        raise PhotoError(
            "too_small",
            f"{name}: {width}×{height} is too small, at least {least_px} pixels per side are needed. "
            "Use a larger version of the photo; enlarging this one does not help.",
        )


def _checked_array(array: NDArray[np.generic], name: str) -> tuple[NDArray[np.uint8], str | None]:
    """A caller's array as uint8, and a note if its numbers were scaled by their range."""
    note = None
    if array.dtype.kind in "ui" and array.dtype.itemsize == 2 and array.size:
        array, note = narrowed(array, name)
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
    return np.ascontiguousarray(array.astype(np.uint8)), note
