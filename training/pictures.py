"""What is learned from a folder of one's own pictures: their captions as files, their faces found by the runtime."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import DTypeLike, NDArray

from realisid_trt.errors import PhotoError, RequestError
from realisid_trt.faces import Face, FaceFinder
from realisid_trt.files import sha256
from realisid_trt.mesh import NUM_LANDMARKS
from realisid_trt.photo import WORKING_SIDE_PX, load_photo

from .store import LeftOut, check_least

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
METADATA = "metadata.jsonl"  # {"file_name": …, "text": …} per line, the layout of Hugging Face's image folders
ROOM = 0.15  # of the face square, kept between it and the edge of the picture where the photo has it


@dataclass(frozen=True, kw_only=True)
class PictureFolder:
    """Photos of single persons with captions.

    folder:      of the photos, with its sub-folders, without what is hidden; NAME.txt beside NAME.jpg says what it
                 shows, or a metadata.jsonl says so for the photos in and below its own folder.
    face_models: folder with the face models: the faces/ of an engine.
    size_px:     side S of the pictures: `sample_size` times the VAE's factor of the checkpoint that is trained. A photo
                 is cut to a square about its middle, moved as far as the face needs, and scaled.
    crop_px:     side s of the ID crops: the image encoder's. margin: `face_margin` of the checkpoint.
    least_face:  least side of a face over the picture's; a checkpoint's own least is f·2^(L-1) px.
    least_px:    least side, in the photo, of the square that is cut: a smaller one would be enlarged, and teach blur.
                 0: half of S.

    An example is as `WorldScenes` has it, for one person. The ID crop is of the picture itself, as in the paper. Photos
    that are too small, without a face, with several similar ones, or with a face that is too small are left out, and
    the store says why.

    Raises RequestError for a folder without pictures, for a picture without a caption and for wrong numbers.
    """

    folder: str
    face_models: str
    size_px: int = 1024
    crop_px: int = 224
    margin: float = 1.0
    least_face: float = 1 / 16
    least_px: int = 0

    def __post_init__(self) -> None:
        check_least(self, size_px=1, crop_px=1, margin=0.5, least_face=0, least_px=0)

    def shapes(self) -> Mapping[str, tuple[tuple[int, ...], DTypeLike]]:
        return {
            "rgb": ((self.size_px, self.size_px, 3), np.uint8),
            "num_persons": ((), np.uint8),
            "boxes": ((1, 4), np.float32),
            "landmarks": ((1, NUM_LANDMARKS, 2), np.float32),
            "crops": ((1, self.crop_px, self.crop_px, 3), np.uint8),
        }

    def __len__(self) -> int:
        return len(captions_of(self.folder))

    def __getitem__(self, index: int) -> Mapping[str, Any] | LeftOut:
        name, caption = captions_of(self.folder)[index]
        finder = _finder(self.face_models)
        try:
            photo = load_photo(Path(self.folder, name), name)
            if (side := min(photo.rgb.shape[:2])) < self._least_px:
                reduced = f", once reduced to {WORKING_SIDE_PX} px" if photo.scale > 1 else ""
                least = f"expected at least {self._least_px} px"
                return LeftOut(name, f"{name}: the shorter side is {side} px{reduced}, {least}.")
            face = finder.find(photo, name)
        except PhotoError as error:
            return LeftOut(name, str(error))
        photo = photo.turned(face.turns)
        rgb, box = framed(photo.rgb, tuple(value / photo.scale for value in face.square), self.size_px)
        if box[2] - box[0] < self.least_face * self.size_px:
            return LeftOut(name, f"{name}: the face is {box[2] - box[0]:.0f} px of {self.size_px} px wide.")
        straight = Face(face.box, face.landmarks, face.num_found)
        crop, _ = finder.crop(photo, straight, self.crop_px, self.margin)
        return {
            "rgb": rgb, "num_persons": 1, "boxes": np.array([box], np.float32),
            "landmarks": face.landmarks[None].astype(np.float32), "crops": crop[None], "caption": caption,
        }  # fmt: skip

    @property
    def _least_px(self) -> int:
        return self.least_px or (self.size_px + 1) // 2

    def describe(self) -> dict[str, Any]:
        """Hashes in the place of names: the same pictures elsewhere are the same examples."""
        photos = [(sha256(Path(self.folder, name).read_bytes()), text) for name, text in captions_of(self.folder)]
        options = {"size_px": self.size_px, "crop_px": self.crop_px, "margin": self.margin}
        found = sha256(json.dumps(photos).encode())
        return {
            "source": "pictures", "pictures": found, "faces": _finder(self.face_models).model_id,
            "least_face": self.least_face, "least_px": self._least_px, **options,
        }  # fmt: skip


def framed(
    rgb: NDArray[np.uint8], square: tuple[float, ...], size_px: int
) -> tuple[NDArray[np.uint8], tuple[float, float, float, float]]:
    """The largest square of a photo, about its middle, moved so that the face and some room lie inside; scaled.

    rgb: (H, W, 3); square: x0, y0, x1, y1 of the face, px of it.

    Returns (size_px, size_px, 3) uint8 and the face square in px of that; it may leave the picture where the face does.
    """
    side, corner = min(rgb.shape[:2]), []
    for length, low, high in ((rgb.shape[1], square[0], square[2]), (rgb.shape[0], square[1], square[3])):
        room = ROOM * (high - low)
        start = np.clip((length - side) / 2, high + room - side, low - room) if high - low + 2 * room < side else (
            (low + high - side) / 2)  # fmt: skip
        corner.append(int(round(float(np.clip(start, 0, length - side)))))
    x, y = corner
    cut = np.ascontiguousarray(rgb[y : y + side, x : x + side])
    how = cv2.INTER_AREA if size_px < side else cv2.INTER_CUBIC
    scale = size_px / side
    x0, y0, x1, y1 = ((value - offset) * scale for value, offset in zip(square, (x, y, x, y), strict=True))
    return np.asarray(cv2.resize(cut, (size_px, size_px), interpolation=how), np.uint8), (x0, y0, x1, y1)


@cache
def _finder(folder: str) -> FaceFinder:
    return FaceFinder.load(Path(folder))


@cache
def captions_of(folder: str) -> list[tuple[str, str]]:
    """(name, caption) of every picture in a folder and below, in the order of names, which count from the folder."""
    path = Path(folder)
    if not path.is_dir():
        raise RequestError(f"{folder} is no folder. Give one with pictures and captions.")
    below = (file.relative_to(path) for file in path.rglob("*"))
    files = sorted(f for f in below if not any(part.startswith(".") for part in f.parts) and (path / f).is_file())
    names = [file.as_posix() for file in files if file.suffix.lower() in SUFFIXES]
    if not names:
        raise RequestError(f"{folder} holds no pictures ({', '.join(SUFFIXES)}).")
    told: dict[str, str] = {}
    try:
        for file in sorted(files, key=lambda file: len(file.parts)):  # the nearest has the last word
            if file.name == METADATA:
                told |= _metadata(path, file)
        for name in names:
            text = (path / name).with_suffix(".txt")
            if name not in told and text.is_file():
                told[name] = text.read_text(encoding="utf-8").strip()
    except UnicodeDecodeError as error:
        raise RequestError(f"a caption in {folder} is not UTF-8: {error}. Write it again as UTF-8.") from error
    if missing := [name for name in names if not told.get(name)]:
        raise RequestError(
            f"{len(missing)} of {len(names)} pictures have no caption, {missing[0]} for one. Write it into "
            f"{Path(missing[0]).with_suffix('.txt')} beside it, or into {METADATA}."
        )
    return [(name, told[name]) for name in names]


def _metadata(folder: Path, file: Path) -> dict[str, str]:
    """Name → caption of a metadata.jsonl: its own names count from where it lies, those returned from `folder`."""
    told = {}
    for number, line in enumerate((folder / file).read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
            told[(file.parent / str(values["file_name"])).as_posix()] = str(values["text"])
        except (ValueError, KeyError, TypeError) as error:
            raise RequestError(
                f'{folder / file}, line {number}: {error}; expected {{"file_name": …, "text": …}}.'
            ) from error
    return told
