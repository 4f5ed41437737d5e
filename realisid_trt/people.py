"""A person asked for → ID tokens, pose image and box: the face line of the data, from photo to conditions."""

from __future__ import annotations

import os
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from .backends import Backend
from .boxes import FaceBox, Grid, cover_box, snap_box
from .checks import check_finite, own_array
from .conditions import id_pixels, pose_image
from .config import RealisIDConfig
from .errors import BoxError, RequestError
from .faces import Face, FaceFinder
from .faces.choice import CHOOSE_WITH, check_face_number, checked_box
from .files import sha256
from .identity import Identity
from .manifest import Model
from .mesh import checked_landmarks
from .photo import LoadedPhoto, Photo, load_crop, load_photo, photo_hash
from .recent import Recent
from .request import Person

CHOOSE_POSE_WITH = (
    "pose=engine.embed(photo, face={}) (face= of a person belongs to its ID photo; on the command line, embed the pose "
    "photo with --face and give the stored identity)"
)


@dataclass(frozen=True, eq=False)
class PreparedPerson:
    """One person of one picture, as the networks want it.

    id_tokens:   (T, D) float32.
    pose_image:  (3, S, S) float32 in [0, 1], S the side of the local canvas in px.
    face_box:    where the face goes.
    mask_source: what removed the photo's background: "bisenet", "hull+person", "hull" or "own"; None without a photo.
    notes:       what was decided about the photos, in sentences that name no photo.
    """

    id_tokens: NDArray[np.float32]
    pose_image: NDArray[np.float32]
    face_box: FaceBox
    mask_source: str | None
    notes: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class _Look:
    """A photo and what a caller says of its face, checked: what `FaceFinder.find` is asked."""

    photo: LoadedPhoto
    face: int | None
    box: tuple[float, float, float, float] | None
    landmarks: NDArray[np.float64] | None

    @property
    def key(self) -> Hashable:
        own = None if self.landmarks is None else self.landmarks.tobytes()
        return photo_hash(self.photo), self.face, self.box, own


class People:
    """Finds faces, embeds them and draws their poses; remembers the last 64 photos."""

    def __init__(self, backend: Backend, finder: FaceFinder, model: Model, config: RealisIDConfig) -> None:
        self._backend, self._finder, self._model, self._config = backend, finder, model, config
        self._token_shape = (model.num_id_tokens, model.cross_attention_dim)
        self._faces: Recent[Face] = Recent()
        self._identities: Recent[Identity] = Recent()

    def embed(
        self,
        photo: Photo,
        face: int | None = None,
        box: Sequence[float] | None = None,
        landmarks: NDArray[Any] | None = None,
        crop: Photo | None = None,
        name: str = "photo",
    ) -> Identity:
        """photo → square face box → crop, background zeroed → id_pixels → ID tokens; and the landmarks.

        face:      which face, counted from the left; None takes the only or the clearly largest one.
        box:       x0, y0, x1, y1 of the face in photo px (of the upright original), instead of detecting it.
        landmarks: (478, 2) in [0, 1] of the squared box, instead of finding them.
        crop:      the squared face with its background zeroed, a square picture of any size, instead of cutting it out.
        name:      what messages call the photo when it is not a path.

        Raises PhotoError, RequestError.
        """
        name = _name(photo, name)
        look = self._look(photo, name, face, box, landmarks)
        own = None if crop is None else load_crop(crop, self._model.image_size, f"the crop of {name}")
        key = look.key, None if own is None else sha256(own.tobytes())
        return self._identities.get(key, lambda: self._embed(look, own, name))

    def prepare(self, person: Person, grid: Grid, alone: bool, name: str) -> PreparedPerson:
        """Everything the networks need of `person`.

        alone: the only person of its picture, so that box=None can mean "where it is in the photo".
        name:  what messages call the person.
        """
        identity = self._identity(person, name)
        if person.box is not None:
            box = person.box
        elif alone and identity is not None:
            box = cover_box(identity.box, identity.photo_size, grid)
        else:
            raise BoxError(
                f"{name} has no box. With several persons everybody needs one: Person(…, box=(x0, y0, x1, y1))."
            )
        if identity is None:
            id_tokens = own_array(person.id_tokens, self._token_shape, f"id_tokens of {name}")
        else:
            id_tokens = identity.id_tokens
        drawing, pose_notes = self._pose(person, identity, name)
        return PreparedPerson(
            id_tokens=id_tokens,
            pose_image=drawing,
            face_box=snap_box(box, grid),
            mask_source=identity.mask_source if identity else None,
            notes=(*(identity.notes if identity else ()), *(f"pose photo: {note}" for note in pose_notes)),
        )

    def _identity(self, person: Person, name: str) -> Identity | None:
        source = person.identity if person.identity is not None else person.photo
        if source is None:
            return None
        if isinstance(source, Identity):
            identity = source
        elif _is_stored(source):
            identity = Identity.load(source)
        else:
            return self.embed(source, face=person.face, name=name)
        if person.face is not None:
            raise RequestError(
                f"face={person.face} of {name} chooses among the faces of a photo, but an identity was given. Embed "
                "the photo with face= instead."
            )
        identity.check(self._model.id_encoder_key, f"the identity of {name}")
        own_array(identity.id_tokens, self._token_shape, f"id_tokens of the identity of {name}")
        return identity

    def _pose(
        self, person: Person, identity: Identity | None, name: str
    ) -> tuple[NDArray[np.float32], tuple[str, ...]]:
        """The drawing of pose and expression, and notes about the pose photo."""
        side, notes = self._model.default_size, tuple[str, ...]()
        if person.pose_image is not None:
            return self._own_pose_image(person.pose_image, side, name), notes
        if person.landmarks is not None:
            landmarks: NDArray[Any] = person.landmarks
        elif person.pose is not None:
            landmarks, notes = self._pose_of(person.pose, f"the pose of {name}")
        else:
            assert identity is not None  # Person refuses id_tokens without a pose
            landmarks = identity.landmarks
        return pose_image(checked_landmarks(landmarks, f"landmarks of {name}"), side, self._config.pose_style), notes

    def _pose_of(self, source: Photo | Identity, name: str) -> tuple[NDArray[np.float64], tuple[str, ...]]:
        """Landmarks of a pose photo, an identity or a stored one, and notes."""
        if isinstance(source, Identity):
            return source.landmarks, ()
        if _is_stored(source):
            return Identity.load(source).landmarks, ()
        name = _name(source, name)
        face = self._find(self._look(source, name), name, CHOOSE_POSE_WITH)
        return face.landmarks, face.notes

    def _look(self, photo: Photo, name: str, face: int | None = None, box: Any = None, landmarks: Any = None) -> _Look:
        """Checked before it becomes the key of a cache."""
        loaded = load_photo(photo, name)
        check_face_number(face, name)
        return _Look(
            loaded,
            face,
            None if box is None else checked_box(box, loaded, name),
            None if landmarks is None else checked_landmarks(landmarks, f"landmarks of {name}"),
        )

    def _find(self, look: _Look, name: str, choose_with: str = CHOOSE_WITH) -> Face:
        def find() -> Face:
            return self._finder.find(
                look.photo, name, face=look.face, box=look.box, landmarks=look.landmarks, choose_with=choose_with
            )

        return self._faces.get(look.key, find)

    def _embed(self, look: _Look, own: NDArray[np.uint8] | None, name: str) -> Identity:
        model, face = self._model, self._find(look, name)
        if own is None:
            crop, mask_source = self._finder.crop(look.photo, face, model.image_size, self._config.face_margin)
        else:
            crop, mask_source = own, "own"
        pixels = id_pixels(crop, model.image_mean, model.image_std)
        fed = {"id_pixels": self._backend.put(pixels[None], for_networks=True)}
        id_tokens = self._backend.get(self._backend.run("id_encoder", fed)["id_tokens"])[0].astype(np.float32)
        check_finite(id_tokens, f"id_tokens of {name}")
        return Identity(
            id_tokens=id_tokens,
            landmarks=face.landmarks,
            box=face.square,
            photo_size=look.photo.turned(face.turns).size,
            id_encoder_key=model.id_encoder_key,
            mask_source=mask_source,
            notes=(*face.notes, *self._finder.notes_on(mask_source)),
        )

    def _own_pose_image(self, drawing: Any, side: int, name: str) -> NDArray[np.float32]:
        array = own_array(drawing, (3, side, side), f"pose_image of {name}")
        if array.min() < 0 or array.max() > 1:
            raise RequestError(
                f"pose_image of {name} reaches from {array.min():g} to {array.max():g}, expected [0, 1]. Divide by 255?"
            )
        return array


def _is_path(source: object) -> TypeGuard[str | os.PathLike[str]]:
    return isinstance(source, (str, os.PathLike))


def _is_stored(source: object) -> TypeGuard[str | os.PathLike[str]]:
    return _is_path(source) and str(source).lower().endswith(".safetensors")


def _name(source: object, otherwise: str) -> str:
    """How to call a photo in a message: by its path, or as what it is for."""
    return str(source) if _is_path(source) else otherwise
