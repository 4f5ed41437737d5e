"""`--check SAME SAME2 OTHER`: whether a face encoder, as it is configured, tells two people apart."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from realisid_trt.errors import CheckpointError, PhotoError
from realisid_trt.persons.faces import Face, FaceFinder
from realisid_trt.persons.faces.face_encoder import FaceEncoder as RunningEncoder
from realisid_trt.persons.photo import LoadedPhoto, load_photo

from ..checkpoint.face_encoder import FaceEncoder
from ..face_models import fetch_face_models


@dataclass(frozen=True)
class Likeness:
    """Cosines of embeddings. same: of two photos of one person. other: the higher one of these with another person."""

    same: float
    other: float

    @property
    def gap(self) -> float:
        return self.same - self.other


@dataclass(frozen=True)
class Checked:
    """Of three photos, the third of another person: `as_configured`, and with red and blue exchanged.

    embeddings: (3, 512) float32, as configured.
    """

    as_configured: Likeness
    exchanged: Likeness
    embeddings: NDArray[np.float32]


def check_same_person(folder: Path, encoder: FaceEncoder, photos: Sequence[str | Path]) -> Checked:
    """The cosines of three photographs: two of one person, one of another, by the runtime's own front end.

    folder: `face_encoder/`. encoder: its config.

    Raises PhotoError, BuildError if the face models cannot be obtained, and CheckpointError unless the same person's
    cosine is the higher one.
    """
    loaded = [load_photo(photo) for photo in photos]  # first: a mistyped name is reported before models are fetched
    with tempfile.TemporaryDirectory(prefix="realisid_trt-check-") as temporary:
        fetch_face_models(Path(temporary))
        finder = FaceFinder.load(Path(temporary))
        seen = [(photo, _face(finder, photo, path)) for photo, path in zip(loaded, photos, strict=True)]
    embeddings = _embeddings(folder, encoder.to_dict(), seen)
    other_order = {"rgb": "bgr", "bgr": "rgb"}[encoder.colour]
    exchanged = _embeddings(folder, {**encoder.to_dict(), "colour": other_order}, seen)
    found = Checked(_likeness(embeddings), _likeness(exchanged), embeddings)
    same, other = found.as_configured.same, found.as_configured.other
    if not same > other:
        raise CheckpointError(
            f"the face encoder {encoder.name} does not tell {photos[0]} and {photos[2]} apart: the cosine of the two "
            f"photos of one person is {same:.2f}, with the other person {other:.2f}, expected clearly more (about 0.5 "
            "and more beside 0.2 and less). Check that the first two photos show one person, --colour, and the file."
        )
    return found


def lines_of(checked: Checked, encoder: FaceEncoder) -> list[str]:
    """What was found, and what to look for, for people."""
    given, turned = checked.as_configured, checked.exchanged
    other_order = {"rgb": "bgr", "bgr": "rgb"}[encoder.colour].upper()
    return [
        f"check: cosine of the same person {given.same:.3f}, of another one {given.other:.3f}; expected about 0.5 and "
        "more beside 0.2 and less",
        f"check: with {other_order} instead of {encoder.colour.upper()} {turned.same:.3f} and {turned.other:.3f}; "
        + (
            "the gap shrinks, as it must where the colours are right"
            if turned.gap < given.gap
            else "the gap does not shrink: the colours are probably wrong. Try other photos, then --colour "
            + other_order.lower()
        ),
    ]


def _face(finder: FaceFinder, photo: LoadedPhoto, path: str | Path) -> Face:
    try:
        return finder.find(photo, str(path))
    except PhotoError as error:
        if error.code != "many_faces":
            raise
        raise PhotoError(
            error.code, f"--check {path} shows several faces of about one size, expected one. Crop it to one face."
        ) from error


def _embeddings(
    folder: Path, config: dict[str, object], seen: Sequence[tuple[LoadedPhoto, Face]]
) -> NDArray[np.float32]:
    running = RunningEncoder(folder, config)
    return np.stack([running(photo, face) for photo, face in seen])


def _likeness(embeddings: NDArray[np.float32]) -> Likeness:
    unit = embeddings.astype(np.float64) / np.linalg.norm(embeddings.astype(np.float64), axis=1, keepdims=True)
    cosines = unit @ unit.T
    return Likeness(float(cosines[0, 1]), float(max(cosines[0, 2], cosines[1, 2])))
