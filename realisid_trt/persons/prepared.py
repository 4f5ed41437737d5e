"""A person on the way from the caller's Person to the networks' inputs: found, seen, prepared."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .boxes import FaceBox
from .person import PlacedPerson


@dataclass(frozen=True, eq=False, kw_only=True)
class DrawnPerson:
    """What the branches are shown of one person of one picture.

    pose_images: style → (3, S, S) float32 in [0, 1], S the side of the canvas in px: of the branches that see the face.
    landmarks:   (478, 2) float64 in [0, 1] of the face box; None if no branch needs them or a drawing was given.
    body:        (17, 2) or (17, 3) keypoints in px of the picture, or None.
    anchor:      (2,) float64 x, y of the nose in px of the picture, where the ID patch goes; None without patches.
    face_box:    where the face goes; None if no branch needs it and none was given.
    mask_source: as of an Identity; None without a photo.
    notes:       decisions about the photos, in sentences that name no photo.
    """

    pose_images: Mapping[str, NDArray[np.float32]]
    landmarks: NDArray[np.float64] | None
    body: NDArray[np.float64] | None
    anchor: NDArray[np.float64] | None
    face_box: FaceBox | None
    mask_source: str | None
    notes: tuple[str, ...]

    @property
    def placed(self) -> PlacedPerson:
        """What a result says of the person."""
        anchor = None if self.anchor is None else (float(self.anchor[0]), float(self.anchor[1]))
        return PlacedPerson(self.face_box.px if self.face_box else None, self.mask_source, self.notes, anchor)

    @property
    def landmarks_px(self) -> NDArray[np.float64]:
        """(478, 2): the landmarks in px of the picture."""
        assert self.landmarks is not None and self.face_box is not None
        return self.face_box.inside(self.landmarks)


@dataclass(frozen=True, eq=False)
class FaceCrop:
    """The ID encoder's input for a face, and the other fields of its Identity.

    id_pixels:  (3, S, S) float32, normalised.
    key:        of the identity in the cache. name: of the photo, for messages.
    The rest as in Identity.
    """

    id_pixels: NDArray[np.float32]
    key: Hashable
    name: str
    landmarks: NDArray[np.float64]
    box: tuple[float, float, float, float]
    photo_size: tuple[int, int]
    mask_source: str
    notes: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class FaceEmbedding:
    """The ID encoder's input for a face embedding. values: (E,) float32. name: of the person, for messages."""

    values: NDArray[np.float32]
    name: str


@dataclass(frozen=True, eq=False, kw_only=True)
class SeenPerson(DrawnPerson):
    """One person before the ID encoder: everything that needs no network of the engine.

    source: of the ID tokens: a face or an embedding that is not encoded yet, or the tokens themselves, (T, D); None
            without identities.
    """

    source: FaceCrop | FaceEmbedding | NDArray[np.float32] | None


@dataclass(frozen=True, eq=False)
class Seen:
    """A request before any network runs: its persons, and what every branch is shown, by the branch's name."""

    people: Sequence[SeenPerson]
    drawings: dict[str, list[NDArray[np.float32]]]


@dataclass(frozen=True, eq=False, kw_only=True)
class PreparedPerson(DrawnPerson):
    """One person of one picture, as the networks' input.

    id_tokens: (T, D) float32; None without identities.
    id_patch:  (3, s, s) float32, about the anchor, values beyond [0, 1] too; None where no branch shows it.
    """

    id_tokens: NDArray[np.float32] | None
    id_patch: NDArray[np.float32] | None


@dataclass(frozen=True, eq=False)
class PosedFace:
    """The face of a person whose identity the engine does not use. Fields as in Identity."""

    landmarks: NDArray[np.float64]
    box: tuple[float, float, float, float]
    photo_size: tuple[int, int]
    notes: tuple[str, ...]
    mask_source: str | None = None
