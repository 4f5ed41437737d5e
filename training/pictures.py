"""Training examples from a folder of the user's pictures: captions come from files, and the runtime finds the faces."""

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
from realisid_trt.files import sha256
from realisid_trt.persons.containers import suffixes
from realisid_trt.persons.faces import Face, FaceFinder
from realisid_trt.persons.mesh import NUM_LANDMARKS
from realisid_trt.persons.photo import WORKING_SIDE_PX, LoadedPhoto, load_photo

from .store import LeftOut, check_least

METADATA = "metadata.jsonl"  # {"file_name": …, "text": …} per line, the layout of Hugging Face's image folders
ROOM = 0.15  # of a face square, kept free between it and the edge of the picture if the photo is large enough
BYSTANDER = 0.5  # a face narrower than this share of the widest one belongs to a bystander


@dataclass(frozen=True, kw_only=True)
class PictureFolder:
    """Photos of people with captions.

    folder:      of the photos, with its sub-folders, without hidden files; NAME.txt beside NAME.jpg is its caption, or
                 a metadata.jsonl has the captions of the photos in and below its own folder.
    face_models: folder with the face models: the faces/ of an engine.
    size_px:     side S of the pictures: `sample_size` times the VAE's factor of the checkpoint that is trained. A photo
                 is cut to a square about its middle, moved as far as the faces need, and scaled.
    crop_px:     side s of the ID crops: the image encoder's. margin: `face_margin` of the checkpoint.
    least_face:  least side of a face over the picture's; a checkpoint's own least is f·2^(L-1) px.
    persons:     1: photos of one person, or of one who is clearly the largest. N: also photos of up to N people; all of
                 them are learned, merged as in inference.
    least_px:    least side of the square that is cut, in px of the photo: enlarging a smaller one would teach blur.
                 0: half of S.

    An example is as `WorldScenes` has it, for `persons` at most. ID crops are of the picture itself, as in the paper.
    A photo is left out, and the store says why, if it is too small, has no face, has more faces of similar size than
    `persons`, has a face that is too small, or has faces that no square holds together.

    Raises RequestError for a folder without pictures, for a picture without a caption and for wrong numbers.
    """

    folder: str
    face_models: str
    size_px: int = 1024
    crop_px: int = 224
    margin: float = 1.0
    least_face: float = 1 / 16
    persons: int = 1
    least_px: int = 0

    def __post_init__(self) -> None:
        check_least(self, size_px=1, crop_px=1, margin=0.5, least_face=0, persons=1, least_px=0)

    def shapes(self) -> Mapping[str, tuple[tuple[int, ...], DTypeLike]]:
        return {
            "rgb": ((self.size_px, self.size_px, 3), np.uint8),
            "num_persons": ((), np.uint8),
            "boxes": ((self.persons, 4), np.float32),
            "landmarks": ((self.persons, NUM_LANDMARKS, 2), np.float32),
            "crops": ((self.persons, self.crop_px, self.crop_px, 3), np.uint8),
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
            faces = self._faces(photo, name)
        except PhotoError as error:
            return LeftOut(name, str(error))
        photo = photo.turned(faces[0].turns)
        squares = np.array([face.square for face in faces]) / photo.scale
        rgb, boxes = framed(photo.rgb, squares, self.size_px)
        centres, sides = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2] - boxes[:, 0]
        if len(faces) > 1 and (centres.min() < 0 or centres.max() > self.size_px):
            return LeftOut(name, f"{name}: no square of the photo holds all of its {len(faces)} faces.")
        if sides.min() < self.least_face * self.size_px:
            return LeftOut(name, f"{name}: the face is {sides.min():.0f} px of {self.size_px} px wide.")
        example: dict[str, Any] = {key: np.zeros(shape, dtype) for key, (shape, dtype) in self.shapes().items()}
        example |= {"rgb": rgb, "num_persons": len(faces), "caption": caption}
        for person, (face, box) in enumerate(zip(faces, boxes, strict=True)):
            straight = Face(face.box, face.landmarks, face.keypoints, face.num_found)
            example["boxes"][person], example["landmarks"][person] = box, face.landmarks
            example["crops"][person] = finder.crop(photo, straight, self.crop_px, self.margin)[0]
        return example

    def _faces(self, photo: LoadedPhoto, name: str) -> list[Face]:
        """The faces of the people that a photo shows, from the left. Raises PhotoError."""
        finder = _finder(self.face_models)
        if self.persons == 1:
            return [finder.find(photo, name)]
        sides = np.ptp(finder.see(photo).boxes.reshape(-1, 2, 2), axis=1).max(axis=1)
        shown = np.flatnonzero(sides >= BYSTANDER * sides.max(initial=0))
        if not 1 < len(shown) <= self.persons:
            return [finder.find(photo, name)]  # or raises the reason
        return [finder.find(photo, name, face=int(number)) for number in shown]

    @property
    def _least_px(self) -> int:
        return self.least_px or (self.size_px + 1) // 2

    def describe(self) -> dict[str, Any]:
        """With hashes instead of names: the same pictures in another folder are the same examples."""
        photos = [(sha256(Path(self.folder, name).read_bytes()), text) for name, text in captions_of(self.folder)]
        options = {"size_px": self.size_px, "crop_px": self.crop_px, "margin": self.margin}
        found = sha256(json.dumps(photos).encode())
        return {
            "source": "pictures", "pictures": found, "faces": _finder(self.face_models).model_id,
            "least_face": self.least_face, "persons": self.persons, "least_px": self._least_px, **options,
        }  # fmt: skip


def framed(
    rgb: NDArray[np.uint8], squares: NDArray[np.float64], size_px: int
) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    """The largest square of a photo, about its middle, moved so that the faces and some room lie inside; scaled.

    rgb: (H, W, 3); squares: (n, 4) x0, y0, x1, y1 of the faces, px of it.

    Returns (size_px, size_px, 3) uint8 and the face squares in px of that; they may leave the picture where faces do,
    and where no square holds all.
    """
    side, corner = min(rgb.shape[:2]), []
    room = ROOM * (squares[:, 2] - squares[:, 0])
    for axis, length in ((0, rgb.shape[1]), (1, rgb.shape[0])):
        low, high = (squares[:, axis] - room).min(), (squares[:, axis + 2] + room).max()
        start = np.clip((length - side) / 2, high - side, low) if high - low < side else (low + high - side) / 2
        corner.append(int(round(float(np.clip(start, 0, length - side)))))
    x, y = corner
    cut = np.ascontiguousarray(rgb[y : y + side, x : x + side])
    how = cv2.INTER_AREA if size_px < side else cv2.INTER_CUBIC
    boxes = (squares - (x, y, x, y)) * (size_px / side)
    return np.asarray(cv2.resize(cut, (size_px, size_px), interpolation=how), np.uint8), boxes


@cache
def _finder(folder: str) -> FaceFinder:
    return FaceFinder.load(Path(folder))


@cache
def captions_of(folder: str) -> list[tuple[str, str]]:
    """(name, caption) of every picture in a folder and below, in the order of names, which are relative to the
    folder."""
    path = Path(folder)
    if not path.is_dir():
        raise RequestError(f"{folder} is not a folder. Give one with pictures and captions.")
    files = _files_of(path)
    names = [file.as_posix() for file in files if file.suffix.lower() in suffixes()]
    if not names:
        raise RequestError(f"{folder} holds no pictures ({', '.join(sorted(suffixes()))}).")
    captions: dict[str, str] = {}
    try:
        for file in sorted(files, key=lambda file: len(file.parts)):  # the nearest one overrides the others
            if file.name == METADATA:
                captions |= _metadata(path, file)
        for name in names:
            text = (path / name).with_suffix(".txt")
            if name not in captions and text.is_file():
                captions[name] = text.read_text(encoding="utf-8-sig").strip()  # Notepad writes a byte order mark
    except UnicodeDecodeError as error:
        raise RequestError(f"a caption in {folder} is not UTF-8: {error}. Write it again as UTF-8.") from error
    if missing := [name for name in names if not captions.get(name)]:
        raise RequestError(
            f"{len(missing)} of {len(names)} pictures have no caption, {missing[0]} for one. Write it into "
            f"{Path(missing[0]).with_suffix('.txt')} beside it, or into {METADATA}."
        )
    return [(name, captions[name]) for name in names]


def others_of(folder: str) -> list[str]:
    """Names of the files in a folder and below that are neither pictures nor captions, without hidden ones."""
    return [
        file.as_posix()
        for file in _files_of(Path(folder))
        if file.suffix.lower() not in (*suffixes(), ".txt") and file.name != METADATA
    ]


def _files_of(path: Path) -> list[Path]:
    below = (file.relative_to(path) for file in path.rglob("*"))
    return sorted(f for f in below if not any(part.startswith(".") for part in f.parts) and (path / f).is_file())


def _metadata(folder: Path, file: Path) -> dict[str, str]:
    """Name → caption of a metadata.jsonl: its names are relative to its own folder, the returned ones to `folder`."""
    captions = {}
    for number, line in enumerate((folder / file).read_text(encoding="utf-8-sig").splitlines(), 1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
            captions[(file.parent / str(values["file_name"])).as_posix()] = str(values["text"])
        except (ValueError, KeyError, TypeError) as error:
            raise RequestError(
                f'{folder / file}, line {number}: {error}; expected {{"file_name": …, "text": …}}.'
            ) from error
    return captions
