"""A decoded picture of any mode, depth and colour profile → 8-bit sRGB."""

from __future__ import annotations

import io
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms

from ..errors import PhotoError

ALPHA = ("RGBA", "LA", "PA", "RGBa", "La")
SPACES = {"RGB": "RGB ", "L": "GRAY", "CMYK": "CMYK", "LAB": "Lab "}  # mode → the colour space of its profiles
SAME_LEVELS = 2  # a profile that changes no colour by more is taken for sRGB


def to_8_bits(picture: Image.Image, name: str) -> tuple[Image.Image, str | None]:
    """The picture with 8 bits per channel in mode L, LA, RGB, RGBA, CMYK or LAB, and a note if its numbers were scaled.

    Raises PhotoError(mode).
    """
    if picture.mode == "F":
        raise PhotoError("mode", f"{name}: floating-point pixels have no agreed range. Save it as 8 bits per channel.")
    if picture.mode == "I" or picture.mode.startswith("I;"):  # 16 or 32 bits, which convert("RGB") would clip to white
        grey, note = narrowed(np.asarray(picture), name)
        return Image.fromarray(grey), note
    try:
        if picture.mode in ("RGBa", "La"):
            picture = picture.convert({"RGBa": "RGBA", "La": "LA"}[picture.mode])
        if picture.has_transparency_data and picture.mode not in ALPHA:
            return picture.convert("RGBA"), None  # a palette with a transparent colour, and the like
        known = {"PA": "RGBA", "P": "RGB", "1": "L"}
        return (picture if picture.mode in (*SPACES, *ALPHA) and picture.mode != "PA" else
                picture.convert(known.get(picture.mode, "RGB"))), None  # fmt: skip
    except (ValueError, TypeError) as error:  # TypeError: of a transparency that is not of this mode
        raise _refused(picture, name) from error


def to_srgb(picture: Image.Image, profile: bytes | None, matte: tuple[int, int, int], name: str) -> Image.Image:
    """The picture from `to_8_bits` as a new RGB picture.

    profile: the file's ICC profile, which defines its numbers. An unusable profile is ignored.
    matte:   colour behind transparent pixels.

    Raises PhotoError(mode).
    """
    alpha = None
    if picture.mode in ALPHA:
        alpha = picture.getchannel("A")
        picture = picture.convert("RGB" if picture.mode == "RGBA" else "L")
    converted = _by_profile(picture, profile) if profile else None
    if converted is None:
        try:
            converted = picture.convert("RGB")
        except (ValueError, TypeError) as error:
            raise _refused(picture, name) from error
    if alpha is not None:
        return Image.composite(converted, Image.new("RGB", converted.size, matte), alpha)
    return converted.copy() if converted is picture else converted


def narrowed(wide: NDArray[Any], name: str) -> tuple[NDArray[np.uint8], str | None]:
    """Integers up to 65535 → uint8, by as many bits as they use: 8, 10, 12 or 16; and a note if that is not all 16."""
    low, high = int(np.min(wide)), int(np.max(wide))
    if low < 0 or high > 65535:
        raise PhotoError(
            "mode", f"{name}: grey values from {low} to {high}, more than 16 bits hold. Save it as 8 bits per channel."
        )
    bits = next(bits for bits in (8, 10, 12, 16) if high < 2**bits)
    note = f"the photo's 16-bit numbers use at most {bits} bits and were read as such." if bits in (10, 12) else None
    return (wide.astype(np.uint16) >> (bits - 8)).astype(np.uint8), note


def wide_rgb(content: bytes, picture: Image.Image) -> NDArray[np.uint16] | None:
    """(H, W, 3) of an RGB file of 16 bits whose numbers use 12 of them or fewer; else None.

    Pillow keeps the upper 8 of 16 bits, which are empty in such a file.
    """
    if picture.mode != "RGB" or picture.format not in ("PNG", "TIFF") or np.asarray(picture).max() >= 2**4:
        return None
    decoded = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED | cv2.IMREAD_IGNORE_ORIENTATION)
    if decoded is None or decoded.dtype != np.uint16 or decoded.ndim != 3 or decoded.shape[2] != 3:
        return None
    return np.ascontiguousarray(decoded[..., ::-1])


def _by_profile(picture: Image.Image, content: bytes) -> Image.Image | None:
    """The picture in sRGB; None if the profile cannot be used, or is sRGB's own."""
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(content))
        space = profile.profile.xcolor_space
        if space == "RGB " and picture.mode == "L":
            picture = picture.convert("RGB")
        if SPACES.get(picture.mode) != space:
            return None
        transform = ImageCms.buildTransform(
            profile,
            ImageCms.createProfile("sRGB"),
            picture.mode,
            "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
        if transform is None or (picture.mode == "RGB" and _changes_little(transform)):
            return None
        return ImageCms.applyTransform(picture, transform)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError, AttributeError):
        return None


def _changes_little(transform: ImageCms.ImageCmsTransform) -> bool:
    levels = np.linspace(0, 255, 9).round().astype(np.uint8)
    grid = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1).reshape(27, 27, 3)
    converted = ImageCms.applyTransform(Image.fromarray(grid), transform)
    return converted is not None and int(np.abs(np.asarray(converted, int) - grid).max()) <= SAME_LEVELS


def _refused(picture: Image.Image, name: str) -> PhotoError:
    return PhotoError(
        "mode", f"{name}: colour mode {picture.mode} cannot become RGB. Save the photo as sRGB JPEG or PNG."
    )
