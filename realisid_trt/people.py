"""A person asked for → ID tokens, pose image and box: the face line of the data, from photo to conditions."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .backends import Backend
from .boxes import FaceBox, Grid, cover_box, snap_box
from .conditions import id_pixels, pose_image
from .config import RealisIDConfig
from .errors import BoxError, RequestError
from .faces import Face, FaceFinder
from .identity import Identity
from .manifest import Model
from .photo import load_photo, photo_hash
from .recent import Recent
from .request import Person, Photo


@dataclass(frozen=True, eq=False)
class Conditions:
    """One person of one picture, as the networks want it.

    id_tokens:  (T, D) float32.
    pose_image: (3, S, S) float32 in [0, 1], S the side of the local canvas in px.
    face_box:   where the face goes.
    """

    id_tokens: NDArray[np.float32]
    pose_image: NDArray[np.float32]
    face_box: FaceBox
    mask_source: str | None
    notes: tuple[str, ...]


class People:
    """Finds faces, embeds them and draws their poses; remembers the last 64 photos."""

    def __init__(self, backend: Backend, finder: FaceFinder, model: Model, config: RealisIDConfig) -> None:
        self._backend, self._finder, self._model, self._config = backend, finder, model, config
        self._faces: Recent[Face] = Recent()
        self._identities: Recent[Identity] = Recent()

    def embed(
        self,
        photo: Photo,
        face: int | None = None,
        box: Any = None,
        landmarks: NDArray[Any] | None = None,
        name: str = "photo",
    ) -> Identity:
        """photo → square face box → crop, background zeroed → id_pixels → ID tokens; and the landmarks.

        name: what messages call the photo when it is not a path.
        """
        name = _name(photo, name)
        rgb = load_photo(photo, name)
        key = self._key(rgb, face, box, landmarks)
        return self._identities.get(key, lambda: self._embed(rgb, self._find(rgb, key, face, box, landmarks, name)))

    def conditions(self, person: Person, grid: Grid, alone: bool, name: str) -> Conditions:
        """Everything the networks need of `person`.

        alone: the only person of its picture, so that box=None can mean "where it is in the photo".
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
        return Conditions(
            id_tokens=self._own_tokens(person.id_tokens, name) if identity is None else identity.id_tokens,
            pose_image=self._pose(person, identity, name),
            face_box=snap_box(box, grid),
            mask_source=identity.mask_source if identity else None,
            notes=identity.notes if identity else (),
        )

    def _identity(self, person: Person, name: str) -> Identity | None:
        source = person.identity if person.identity is not None else person.photo
        if source is None:
            return None
        if not isinstance(source, Identity) and not _is_stored(source):
            return self.embed(source, face=person.face, name=name)
        identity = source if isinstance(source, Identity) else Identity.load(source)  # type: ignore[arg-type]
        identity.check(self._model.id_encoder_key, f"the identity of {name}")
        return identity

    def _pose(self, person: Person, identity: Identity | None, name: str) -> NDArray[np.float32]:
        side = self._model.default_size
        if person.pose_image is not None:
            return self._own_pose_image(person.pose_image, side, name)
        if person.landmarks is not None:
            landmarks = _own_landmarks(person.landmarks, name)
        elif person.pose is not None:
            landmarks = self._landmarks(person.pose, f"the pose of {name}")
        else:
            assert identity is not None  # Person refuses id_tokens without a pose
            landmarks = identity.landmarks
        return pose_image(landmarks, side, self._config.pose_style)

    def _landmarks(self, source: Photo | Identity, name: str) -> NDArray[np.float64]:
        if isinstance(source, Identity):
            return source.landmarks
        if _is_stored(source):
            return Identity.load(source).landmarks  # type: ignore[arg-type]
        name = _name(source, name)
        rgb = load_photo(source, name)
        return self._find(rgb, self._key(rgb, None, None, None), None, None, None, name).landmarks

    def _key(self, rgb: NDArray[np.uint8], face: int | None, box: Any, landmarks: Any) -> tuple[object, ...]:
        return photo_hash(rgb), face, _fingerprint(box), _fingerprint(landmarks), self._finder.model_id

    def _find(
        self, rgb: NDArray[np.uint8], key: tuple[object, ...], face: int | None, box: Any, landmarks: Any, name: str
    ) -> Face:
        return self._faces.get(key, lambda: self._finder.find(rgb, name, face=face, box=box, landmarks=landmarks))

    def _embed(self, rgb: NDArray[np.uint8], face: Face) -> Identity:
        model = self._model
        crop, mask_source = self._finder.crop(rgb, face, model.image_size, self._config.face_margin)
        pixels = id_pixels(crop, model.image_mean, model.image_std)
        outputs = self._backend.run("id_encoder", {"id_pixels": self._backend.put(pixels[None])})
        height, width = rgb.shape[:2] if face.turns % 2 == 0 else rgb.shape[1::-1]
        return Identity(
            id_tokens=self._backend.get(outputs["id_tokens"])[0].astype(np.float32),
            landmarks=face.landmarks,
            box=face.square,
            photo_size=(height, width),
            id_encoder_key=model.id_encoder_key,
            mask_source=mask_source,
            notes=face.notes,
        )

    def _own_tokens(self, tokens: Any, name: str) -> NDArray[np.float32]:
        expected = (self._model.num_id_tokens, self._model.cross_attention_dim)
        return _own(tokens, expected, f"id_tokens of {name}")

    def _own_pose_image(self, drawing: Any, side: int, name: str) -> NDArray[np.float32]:
        array = _own(drawing, (3, side, side), f"pose_image of {name}")
        if array.min() < 0 or array.max() > 1:
            raise RequestError(
                f"pose_image of {name} reaches from {array.min():g} to {array.max():g}, expected [0, 1]. Divide by 255?"
            )
        return array


def _own_landmarks(landmarks: Any, name: str) -> NDArray[np.float64]:
    return _own(landmarks, (478, 2), f"landmarks of {name}").astype(np.float64)


def _own(array: Any, shape: tuple[int, ...], what: str) -> NDArray[np.float32]:
    """A caller's array, as float32. Raises RequestError for another shape and for NaN."""
    try:
        values = np.asarray(array, np.float32)
    except (TypeError, ValueError):
        raise RequestError(f"{what} is not an array of numbers. Expected shape {shape}.") from None
    if values.shape != shape:
        raise RequestError(f"{what} has shape {values.shape}, expected {shape}.")
    if not np.isfinite(values).all():
        raise RequestError(f"{what} holds NaN or infinity. Give finite numbers.")
    return values


def _fingerprint(values: Any) -> str | None:
    """A hash of what a caller gave, numbers or not: whether it makes sense is the face finder's to say."""
    if values is None:
        return None
    try:
        content = np.asarray(values, np.float64).tobytes()
    except (TypeError, ValueError):
        content = repr(values).encode()
    return hashlib.sha256(content).hexdigest()


def _is_path(source: object) -> bool:
    return isinstance(source, (str, os.PathLike))


def _is_stored(source: object) -> bool:
    return _is_path(source) and str(source).endswith(".safetensors")


def _name(source: object, otherwise: str) -> str:
    """How to call a photo in a message: by its path, or as what it is for."""
    return str(source) if _is_path(source) else otherwise
