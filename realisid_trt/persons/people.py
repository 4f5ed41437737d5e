"""A requested person → ID tokens, pose image and box: the path of a face from photo to conditions."""

from __future__ import annotations

import os
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from ..backends import Backend
from ..checks import check_finite, own_array
from ..config import Branch, RealisIDConfig
from ..errors import BoxError, RequestError
from ..files import sha256
from ..manifest import Model
from .boxes import FaceBox, Grid, check_inside, cover_box, overlap, snap_box, what_changed
from .conditions import id_pixels, pose_image
from .faces import Face, FaceFinder
from .faces.choice import CHOOSE_WITH, checked_box, checked_face
from .identity import Identity
from .mesh import checked_landmarks
from .person import Person
from .photo import LoadedPhoto, Photo, load_crop, load_photo, photo_hash
from .prepared import FaceCrop, PosedFace, PreparedPerson, SeenPerson
from .recent import RecentCache

SAME_PLACE = 0.5  # intersection over union of two boxes from which a note is given
CHOOSE_POSE_WITH = (
    "pose=engine.embed(photo, face={}) (face= of a person belongs to its ID photo; on the command line, embed the pose "
    "photo with --face and give the stored identity)"
)
CHOOSE_POSE_WITHOUT_IDENTITIES = "Person(photo, face={}): without pose= the pose is that of the photo"


@dataclass(frozen=True, eq=False)
class _Look:
    """A photo and the caller's choice of a face, checked: the arguments of `FaceFinder.find`."""

    photo: LoadedPhoto
    face: int | None
    box: tuple[float, float, float, float] | None
    landmarks: NDArray[np.float64] | None

    @property
    def key(self) -> Hashable:
        own = None if self.landmarks is None else self.landmarks.tobytes()
        return photo_hash(self.photo), self.face, self.box, own


class People:
    """Finds faces, draws their poses and embeds them; remembers the last 64 photos.

    `look` and `see` do not use the backend: several threads may call them while another one generates.
    """

    def __init__(self, backend: Backend, finder: FaceFinder, model: Model, config: RealisIDConfig) -> None:
        self._backend, self._finder, self._model, self._config = backend, finder, model, config
        self._token_shape = (model.num_id_tokens, model.cross_attention_dim)
        self._id_encoder_key = model.id_encoder_key or ""
        self._has_identities = config.id_input != "none"
        self._draws_faces = any(branch.draws_faces for branch in config.table)
        self._faces: RecentCache[Face] = RecentCache()
        self._identities: RecentCache[Identity] = RecentCache()

    def look(
        self,
        photo: Photo,
        face: int | None = None,
        box: Sequence[float] | None = None,
        landmarks: NDArray[Any] | None = None,
        crop: Photo | None = None,
        name: str = "photo",
    ) -> FaceCrop | Identity:
        """photo → square face box → crop, background zeroed → id_pixels; and landmarks. The identity, if cached.

        face:      which face, counted from the left; None takes the only or the clearly largest one.
        box:       x0, y0, x1, y1 of the face in photo px (of the upright original), instead of detecting it.
        landmarks: (478, 2) in [0, 1] of the squared box, instead of finding them.
        crop:      the squared face with its background zeroed, a square picture of any size, instead of cutting it out.
        name:      of the photo in messages, when it is not a path.

        Raises PhotoError, RequestError.
        """
        name = _name(photo, name)
        look = self._look(photo, name, face, box, landmarks)
        own = None if crop is None else load_crop(crop, self._model.image_size, f"the crop of {name}")
        key = look.key, None if own is None else sha256(own.tobytes())
        return self._identities.find(key) or self._crop(look, own, name, key)

    def encode(self, crop: FaceCrop) -> Identity:
        """id_pixels → ID tokens. Uses the backend. Raises NumericsError."""
        return self._identities.get(crop.key, lambda: self._encode(crop))

    def see(self, person: Person, grid: Grid, branches: Sequence[Branch], alone: bool, name: str) -> SeenPerson:
        """Everything the networks need of `person` but the ID tokens of a photo.

        branches: those that draw the person: it must give what they draw.
        alone:    the only person of its picture, so that box=None can mean "where it is in the photo".
        name:     of the person in messages.

        Raises PhotoError, RequestError, BoxError, EngineMismatch.
        """
        faces = [branch for branch in branches if branch.draws_faces]
        places = [branch for branch in branches if branch.needs_box]
        identity, photo_notes = self._identity(person, bool(faces or (places and person.box is None)), name)
        face_box, place_notes = self._place(person, identity, grid, places, alone, name)
        source: FaceCrop | NDArray[np.float32] | None = None
        if isinstance(identity, (Identity, FaceCrop)):
            source = identity if isinstance(identity, FaceCrop) else identity.id_tokens
        elif person.id_tokens is not None:
            source = own_array(person.id_tokens, self._token_shape, f"id_tokens of {name}")
        landmarks, drawing, pose_notes = self._pose(person, identity, faces, name)
        styles = {branch.style for branch in faces if branch.view == "face" and branch.style}
        return SeenPerson(
            source=source,
            pose_images={style: self._drawn(landmarks, drawing, style) for style in styles},
            landmarks=landmarks,
            body=person.body,
            face_box=face_box,
            mask_source=identity.mask_source if identity else None,
            notes=(
                *photo_notes,
                *_unused(person, bool(faces), any(branch.draws_bodies for branch in branches)),
                *(f"pose photo: {note}" for note in pose_notes),
                *place_notes,
            ),
        )

    def _place(
        self,
        person: Person,
        identity: Identity | FaceCrop | PosedFace | None,
        grid: Grid,
        places: Sequence[Branch],
        alone: bool,
        name: str,
    ) -> tuple[FaceBox | None, tuple[str, ...]]:
        """Where the face goes, and notes. None where no branch needs to know. places: the branches that need it."""
        if person.box is not None:
            face_box = snap_box(person.box, grid)
            check_inside(person.box, grid)
            return face_box, what_changed(person.box, face_box)
        if not places:
            return None, ()
        if alone and identity is not None:
            return self._as_in_the_photo(identity, grid, name)
        if alone:
            raise BoxError(
                f"{name} has no box, and no photo that says where the face is. The branch {places[0].name} needs its "
                "place: Person(…, box=(x0, y0, x1, y1))."
            )
        raise BoxError(
            f"{name} has no box. With several persons each of them needs one: Person(…, box=(x0, y0, x1, y1))."
        )

    def see_all(self, persons: Sequence[Person], grid: Grid, branches: Sequence[Sequence[Branch]]) -> list[SeenPerson]:
        """All persons of one picture, in order. branches: those that draw each of them. Raises as `see`."""
        seen = [
            self.see(person, grid, drawn, len(persons) == 1, f"person {i}")
            for i, (person, drawn) in enumerate(zip(persons, branches, strict=True), start=1)
        ]
        for i, person in enumerate(seen):
            for j, other in enumerate(seen):
                if i == j or person.face_box is None or other.face_box is None:
                    continue
                if (common := overlap(person.face_box, other.face_box)) > SAME_PLACE:
                    note = f"stands nearly where person {j + 1} stands: their boxes share {common:.0%} of their union."
                    seen[i] = replace(seen[i], notes=(*seen[i].notes, note))
        return seen

    def prepare(self, person: SeenPerson) -> PreparedPerson:
        """The person with ID tokens. Uses the backend. Raises NumericsError."""
        source = person.source
        return PreparedPerson(
            id_tokens=self.encode(source).id_tokens if isinstance(source, FaceCrop) else source,
            pose_images=person.pose_images,
            landmarks=person.landmarks,
            body=person.body,
            face_box=person.face_box,
            mask_source=person.mask_source,
            notes=person.notes,
        )

    def _as_in_the_photo(
        self, identity: Identity | FaceCrop | PosedFace, grid: Grid, name: str
    ) -> tuple[FaceBox, tuple[str, ...]]:
        """Where the face goes when no box was given, and a note if it cannot stay where it is in the photo."""
        box = cover_box(identity.box, identity.photo_size, grid)
        side = max(box[2] - box[0], box[3] - box[1])
        if side < grid.multiple:
            raise BoxError(
                f"the face of {name} would be {side:.0f} px wide if the photo covered the picture of {grid.width}×"
                f"{grid.height} px, and at least {grid.multiple} px are needed. Give box=(x0, y0, x1, y1), where the "
                "face shall be, or crop the photo closer to the face."
            )
        face_box = snap_box(box, grid)
        if not what_changed(box, face_box):
            return face_box, ()
        where = f"({', '.join(map(str, face_box.px))})"
        return face_box, (
            f"the photo, scaled to cover the picture of {grid.width}×{grid.height} px, has its face at or beyond the "
            f"border: the face was put at {where}. Give box= to put it elsewhere.",
        )

    def _identity(
        self, person: Person, is_read: bool, name: str
    ) -> tuple[Identity | FaceCrop | PosedFace | None, tuple[str, ...]]:
        """What a person's photo or identity holds, and notes. is_read: whether pose or place may be taken from it."""
        source = person.identity if person.identity is not None else person.photo
        if person.face is not None and (isinstance(source, Identity) or _is_stored(source)):
            raise RequestError(
                f"face={person.face} of {name} chooses among the faces of a photo, but an identity was given: it is of "
                "one face. Leave face= out, or give the photo."
            )
        if not self._has_identities:
            return self._face_of(source, person, is_read, name)
        if source is None:
            if person.id_tokens is None:
                raise RequestError(f"{name} needs exactly one of photo, identity and id_tokens; got none of them.")
            return None, ()
        if isinstance(source, Identity):
            identity = source
        elif _is_stored(source):
            identity = Identity.load(source)
        else:
            found = self.look(source, face=person.face, name=name)
            return found, found.notes
        identity.check(self._id_encoder_key, f"the identity of {name}")
        own_array(identity.id_tokens, self._token_shape, f"id_tokens of the identity of {name}")
        return identity, identity.notes

    def _face_of(
        self, source: Photo | Identity | None, person: Person, is_read: bool, name: str
    ) -> tuple[PosedFace | None, tuple[str, ...]]:
        """The same for an engine without identities: the face of a photo or an identity gives pose and place alone."""
        if person.id_tokens is not None:
            raise RequestError(f"{name} has id_tokens, and this engine has no identities. Give a pose or a body alone.")
        if source is None:
            return None, ()
        if not self._draws_faces:
            raise RequestError(
                f"{name} is given by a photo, and this engine neither knows identities nor draws faces. Give "
                "Person(body=…), or the drawing: controls={…: Control(image)}."
            )
        if not is_read:
            return None, ("the photo was not used: no branch of this request draws the face in it.",)
        if isinstance(source, Identity) or _is_stored(source):
            identity = source if isinstance(source, Identity) else Identity.load(source)
            return PosedFace(identity.landmarks, identity.box, identity.photo_size, identity.notes), identity.notes
        name = _name(source, name)
        look = self._look(source, name, person.face)
        face = self._find(look, name)
        return PosedFace(face.landmarks, face.square, look.photo.turned(face.turns).size, face.notes), face.notes

    def _pose(
        self, person: Person, identity: Identity | FaceCrop | PosedFace | None, faces: Sequence[Branch], name: str
    ) -> tuple[NDArray[np.float64] | None, NDArray[np.float32] | None, tuple[str, ...]]:
        """Landmarks or the caller's own drawing of pose and expression, and notes about the pose photo.

        faces: the branches that draw them.
        """
        notes: tuple[str, ...] = ()
        if person.pose_image is not None:
            return None, self._own_pose_image(person.pose_image, self._model.default_size, name), notes
        if not faces:
            return None, None, notes
        if person.landmarks is not None:
            landmarks: NDArray[Any] = person.landmarks
        elif person.pose is not None:
            landmarks, notes = self._pose_of(person.pose, f"the pose of {name}")
        elif identity is not None:
            landmarks = identity.landmarks
        else:
            ways = ["pose=", "landmarks=", *["pose_image="] * all(branch.view == "face" for branch in faces)]
            raise RequestError(
                f"{name} has no pose, and the branch {faces[0].name} draws one. Give "
                f"{', '.join(ways[:-1])} or {ways[-1]}."
            )
        return checked_landmarks(landmarks, f"landmarks of {name}"), None, notes

    def _drawn(
        self, landmarks: NDArray[np.float64] | None, drawing: NDArray[np.float32] | None, style: str
    ) -> NDArray[np.float32]:
        """The drawing on the canvas of a branch that sees the face: the caller's own, or that of the landmarks."""
        if drawing is not None:
            return drawing
        assert landmarks is not None
        return pose_image(landmarks, self._model.default_size, style)

    def _pose_of(self, source: Photo | Identity, name: str) -> tuple[NDArray[np.float64], tuple[str, ...]]:
        """Landmarks of a pose photo, an identity or a stored one, and notes."""
        if isinstance(source, Identity):
            return source.landmarks, ()
        if _is_stored(source):
            return Identity.load(source).landmarks, ()
        name = _name(source, name)
        choose_with = CHOOSE_POSE_WITH if self._has_identities else CHOOSE_POSE_WITHOUT_IDENTITIES
        face = self._find(self._look(source, name), name, choose_with)
        return face.landmarks, face.notes

    def _look(self, photo: Photo, name: str, face: int | None = None, box: Any = None, landmarks: Any = None) -> _Look:
        """The arguments of a search, checked before they become the key of a cache."""
        loaded = load_photo(photo, name)
        return _Look(
            loaded,
            checked_face(face, name),
            None if box is None else checked_box(box, loaded, name),
            None if landmarks is None else checked_landmarks(landmarks, f"landmarks of {name}"),
        )

    def _find(self, look: _Look, name: str, choose_with: str = CHOOSE_WITH) -> Face:
        def find() -> Face:
            return self._finder.find(
                look.photo, name, face=look.face, box=look.box, landmarks=look.landmarks, choose_with=choose_with
            )

        return self._faces.get(look.key, find)

    def _crop(self, look: _Look, own: NDArray[np.uint8] | None, name: str, key: Hashable) -> FaceCrop:
        model, face = self._model, self._find(look, name)
        if own is None:
            crop, mask_source = self._finder.crop(look.photo, face, model.image_size, self._config.face_margin)
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
        fed = {"id_pixels": self._backend.put(crop.id_pixels[None], for_networks=True)}
        id_tokens = self._backend.get(self._backend.run("id_encoder", fed)["id_tokens"])[0].astype(np.float32)
        check_finite(id_tokens, f"id_tokens of {crop.name}")
        return Identity(
            id_tokens=id_tokens,
            landmarks=crop.landmarks,
            box=crop.box,
            photo_size=crop.photo_size,
            id_encoder_key=self._id_encoder_key,
            mask_source=crop.mask_source,
            notes=crop.notes,
        )

    def _own_pose_image(self, drawing: Any, side: int, name: str) -> NDArray[np.float32]:
        array = own_array(drawing, (3, side, side), f"pose_image of {name}")
        if array.min() < 0 or array.max() > 1:
            raise RequestError(
                f"pose_image of {name} reaches from {array.min():g} to {array.max():g}, expected [0, 1]. Divide by 255?"
            )
        return array


def _unused(person: Person, has_face: bool, has_body: bool) -> list[str]:
    """Notes on what a person gives and no branch draws. has_face, has_body: what is drawn."""
    pose = next((key for key in ("pose", "landmarks", "pose_image") if getattr(person, key) is not None), None)
    given = {pose: pose is not None and not has_face, "body": person.body is not None and not has_body}
    return [f"{key} was not used: no branch of this request draws it." for key, is_unused in given.items() if is_unused]


def _is_path(source: object) -> TypeGuard[str | os.PathLike[str]]:
    return isinstance(source, (str, os.PathLike))


def _is_stored(source: object) -> TypeGuard[str | os.PathLike[str]]:
    return _is_path(source) and str(source).lower().endswith(".safetensors")


def _name(source: object, otherwise: str) -> str:
    """The name of a photo in messages: its path, or `otherwise`."""
    return str(source) if _is_path(source) else otherwise
