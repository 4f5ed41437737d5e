"""Photo → face → identity → what the networks take of it, each remembered for the last 64.

with an image encoder   photo ─► face ─► crop, background zeroed ─► id_encoder ─► Identity with ID tokens
with a face encoder     photo ─► face ─► aligned ─► embedding = Identity ─► id_encoder ─► ID tokens, ID patch
"""

from __future__ import annotations

import os
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from ..backends import Backend
from ..checks import check_finite
from ..config import RealisIDConfig
from ..files import sha256
from ..manifest import Model
from .conditions import id_pixels
from .faces import Face, FaceFinder
from .faces.choice import CHOOSE_WITH, checked_box, checked_face
from .faces.face_encoder import FaceEncoder
from .identity import Identity
from .mesh import checked_landmarks
from .photo import LoadedPhoto, Photo, load_crop, load_photo, photo_hash
from .prepared import FaceCrop, FaceEmbedding
from .recent import RecentCache

POINTS_OF_THE_MESH = (
    "the box was given, so the face was aligned by five points of its landmarks. The face encoder is used with those "
    "of a detector, which differ by a few px: without box= the identity is closer."
)


@dataclass(frozen=True, eq=False)
class Look:
    """A photo and the caller's choice of a face, checked: the arguments of `FaceFinder.find`."""

    photo: LoadedPhoto
    face: int | None
    box: tuple[float, float, float, float] | None
    landmarks: NDArray[np.float64] | None

    @classmethod
    def of(cls, photo: Photo, name: str, face: int | None = None, box: Any = None, landmarks: Any = None) -> Look:
        """Checked before they become the key of a cache. Raises PhotoError, RequestError."""
        loaded = load_photo(photo, name)
        return cls(
            loaded,
            checked_face(face, name),
            None if box is None else checked_box(box, loaded, name),
            None if landmarks is None else checked_landmarks(landmarks, f"landmarks of {name}"),
        )

    @property
    def key(self) -> Hashable:
        own = None if self.landmarks is None else self.landmarks.tobytes()
        return photo_hash(self.photo), self.face, self.box, own


class Identities:
    """What an engine knows of faces. Only `encode` and `project` use the backend.

    kind: what its identities hold, "id_tokens" or "embedding"; None for an engine without identities.
    """

    def __init__(
        self,
        backend: Backend,
        finder: FaceFinder,
        encoder: FaceEncoder | None,
        model: Model,
        config: RealisIDConfig,
    ) -> None:
        self._backend, self._finder, self._encoder = backend, finder, encoder
        self._model, self._face_margin = model, config.face_margin
        self.kind = {"face_crop": "id_tokens", "aligned_face": "embedding"}.get(config.id_input)
        self.key = model.id_encoder_key or ""
        self._faces: RecentCache[Face] = RecentCache()
        self._known: RecentCache[Identity] = RecentCache()
        self._projected: RecentCache[tuple[NDArray[np.float32], NDArray[np.float32] | None]] = RecentCache()

    def face(self, look: Look, name: str, choose_with: str = CHOOSE_WITH) -> Face:
        """The face of a photo. choose_with: how an error tells the caller to choose. Raises PhotoError."""

        def find() -> Face:
            return self._finder.find(
                look.photo, name, face=look.face, box=look.box, landmarks=look.landmarks, choose_with=choose_with
            )

        return self._faces.get(look.key, find)

    def look(self, look: Look, crop: Photo | None, name: str) -> FaceCrop | Identity:
        """The face that is still to be encoded, or the identity if it is known or needs no backend.

        crop: the caller's own picture of the face. Raises PhotoError, RequestError, NumericsError.
        """
        side = self._encoder.alignment.size if self._encoder else self._model.image_size
        own = None if crop is None else load_crop(crop, side, f"the crop of {name}")
        key = look.key, None if own is None else sha256(own.tobytes())
        if self._encoder is None:
            return self._known.find(key) or self._crop(look, own, name, key)
        encoder = self._encoder
        return self._known.get(key, lambda: self._aligned(encoder, look, own, name))

    def encode(self, crop: FaceCrop) -> Identity:
        """id_pixels → ID tokens. Raises NumericsError."""
        return self._known.get(crop.key, lambda: self._encode(crop))

    def project(self, embedding: FaceEmbedding) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
        """Embedding → ID tokens (T, D) and ID patch (3, s, s), None without patches. Raises NumericsError."""
        return self._projected.get(embedding.values.tobytes(), lambda: self._project(embedding))

    def embedding(self, values: Any, name: str, of_identity: bool = False) -> FaceEmbedding:
        """A caller's embedding in the norm of the face encoder. of_identity: this engine's encoder made it.

        Raises RequestError.
        """
        assert self._encoder is not None
        return FaceEmbedding(self._encoder.checked(values, name, of_identity), name)

    def _aligned(self, encoder: FaceEncoder, look: Look, own: NDArray[np.uint8] | None, name: str) -> Identity:
        face = self.face(look, name)
        aligned = encoder.alignment(look.photo, face) if own is None else own
        from_mesh = face.num_found == 0 and own is None
        return Identity(
            id_tokens=None,
            landmarks=face.landmarks,
            box=face.square,
            photo_size=look.photo.turned(face.turns).size,
            id_encoder_key=self.key,
            mask_source="aligned" if own is None else "own",
            notes=(*face.notes, *[POINTS_OF_THE_MESH] * from_mesh),
            embedding=encoder.embed(aligned, name),
            keypoints=face.keypoints,
        )

    def _crop(self, look: Look, own: NDArray[np.uint8] | None, name: str, key: Hashable) -> FaceCrop:
        model, face = self._model, self.face(look, name)
        if own is None:
            crop, mask_source = self._finder.crop(look.photo, face, model.image_size, self._face_margin)
        else:
            crop, mask_source = own, "own"
        return FaceCrop(
            id_pixels=id_pixels(crop, model.image_mean, model.image_std),
            key=key,
            name=name,
            landmarks=face.landmarks,
            box=face.square,
            photo_size=look.photo.turned(face.turns).size,
            mask_source=mask_source,
            notes=(*face.notes, *self._finder.notes_on(mask_source)),
        )

    def _encode(self, crop: FaceCrop) -> Identity:
        id_tokens = self._run(id_pixels=crop.id_pixels[None])["id_tokens"][0].astype(np.float32)
        check_finite(id_tokens, f"id_tokens of {crop.name}")
        return Identity(
            id_tokens=id_tokens,
            landmarks=crop.landmarks,
            box=crop.box,
            photo_size=crop.photo_size,
            id_encoder_key=self.key,
            mask_source=crop.mask_source,
            notes=crop.notes,
        )

    def _project(self, embedding: FaceEmbedding) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
        found = {}
        for name, values in self._run(embedding=embedding.values[None, None]).items():
            found[name] = check_finite(values[0].astype(np.float32), f"{name} of {embedding.name}")
            found[name].setflags(write=False)
        return found["id_tokens"], found.get("id_patch")

    def _run(self, **inputs: NDArray[np.float32]) -> dict[str, NDArray[Any]]:
        fed = {name: self._backend.put(values, for_networks=True) for name, values in inputs.items()}
        return {name: self._backend.get(output) for name, output in self._backend.run("id_encoder", fed).items()}


def is_path(source: object) -> TypeGuard[str | os.PathLike[str]]:
    return isinstance(source, (str, os.PathLike))


def is_stored(source: object) -> TypeGuard[str | os.PathLike[str]]:
    """Whether a photo is the path of a stored identity."""
    return is_path(source) and str(source).lower().endswith(".safetensors")


def name_of(source: object, otherwise: str) -> str:
    """The name of a photo in messages: its path, or `otherwise`."""
    return str(source) if is_path(source) else otherwise
