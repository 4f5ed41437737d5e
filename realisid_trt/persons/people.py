"""A requested person → ID tokens, pose image and box: the path of a face from photo to conditions."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..backends import Backend
from ..branches import Branch
from ..checks import own_array
from ..config import RealisIDConfig
from ..errors import BoxError, RequestError
from ..manifest import Model
from .anchors import HEAD_ALONE, NOTHING_DRAWN, Anchor, draws_heads, given_anchor, has_body, patches_of, unused
from .bodies import head_body
from .boxes import FaceBox, Grid, check_inside, cover_box, overlap, snap_box, what_changed
from .conditions import pose_image
from .faces import FaceFinder
from .faces.face_encoder import FaceEncoder
from .identities import Identities, Look, is_stored, name_of
from .identity import Identity
from .mesh import NUM_LANDMARKS, checked_landmarks
from .person import WHO, Person
from .photo import Photo
from .prepared import DrawnPerson, FaceCrop, FaceEmbedding, PosedFace, PreparedPerson, SeenPerson

SAME_PLACE = 0.5  # intersection over union of two boxes from which a note is given
CHOOSE_POSE_WITH = (
    "pose=engine.embed(photo, face={}) (face= of a person belongs to its ID photo; on the command line, embed the pose "
    "photo with --face and give the stored identity)"
)
CHOOSE_POSE_WITHOUT_IDENTITIES = "Person(photo, face={}): without pose= the pose is that of the photo"


class People:
    """Finds faces, draws their poses and embeds them; remembers the last 64 photos.

    `look` and `see` do not use the backend: several threads may call them while another one generates.
    """

    def __init__(
        self,
        backend: Backend,
        finder: FaceFinder,
        model: Model,
        config: RealisIDConfig,
        encoder: FaceEncoder | None = None,
    ) -> None:
        """encoder: of an engine whose identities are embeddings, `FaceEncoder.of`."""
        self._identities = Identities(backend, finder, encoder, model, config)
        self._model = model
        self._token_shape = (model.num_id_tokens, model.cross_attention_dim)
        self._draws_faces = any(branch.draws_faces for branch in config.table)
        self._shows_patches = any(branch.condition == "id_patches" for branch in config.table)

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

        For an engine with a face encoder: photo → five points → aligned face → the identity, with an embedding.

        face:      which face, counted from the left; None takes the only or the clearly largest one.
        box:       x0, y0, x1, y1 of the face in photo px (of the upright original), instead of detecting it.
        landmarks: (478, 2) in [0, 1] of the squared box, instead of finding them.
        crop:      a square picture of any size, instead of cutting it out: the squared face with its background zeroed,
                   or the aligned face.
        name:      of the photo in messages, when it is not a path.

        Raises PhotoError, RequestError, NumericsError.
        """
        name = name_of(photo, name)
        return self._identities.look(Look.of(photo, name, face, box, landmarks), crop, name)

    def encode(self, crop: FaceCrop) -> Identity:
        """id_pixels → ID tokens. Uses the backend. Raises NumericsError."""
        return self._identities.encode(crop)

    def see(
        self,
        person: Person,
        grid: Grid,
        branches: Sequence[Branch],
        alone: bool,
        name: str,
        heads: bool = False,
        images: Collection[str] = (),
    ) -> SeenPerson:
        """Everything the networks need of `person` but the ID tokens of a photo.

        branches: those that draw the person or show its ID patch: it must give what they need.
        alone:    the only person of its picture, so that box=None can mean "where it is in the photo".
        name:     of the person in messages.
        heads:    nobody of the picture has a body, and the head stands in for it: see `head_body`.
        images:   the branches that are shown an image of the caller's in the place of a drawing, by name.

        Raises PhotoError, RequestError, BoxError, EngineMismatch.
        """
        faces = [branch for branch in branches if branch.draws_faces]
        places = [branch for branch in branches if branch.needs_box]
        patches = patches_of(branches)
        anchor, in_box = given_anchor(person, branches, grid, alone, name, heads)
        is_read = bool(faces or in_box or (places and person.box is None))
        identity, photo_notes = self._identity(person, is_read, name)
        face_box, place_notes = self._place(person, identity, grid, places or patches * in_box, alone, name)
        landmarks, drawing, pose_notes = self._pose(person, identity, faces, in_box, name)
        body, head_notes = person.body, tuple[str, ...]()
        if not (heads or has_body(person)) and any(branch.name not in images for branch in patches):
            head_notes = (NOTHING_DRAWN,)
        if in_box:
            points = landmarks if person.keypoints is None else person.keypoints
            if points is None and identity is not None:  # a pose_image does not say where the nose is
                points = checked_landmarks(identity.landmarks, f"landmarks of {name}")
            assert face_box is not None and points is not None
            head = head_body(face_box.inside(points))
            anchor = anchor or Anchor.of_face(head)
            if heads:
                body, head_notes = anchor.moved(head), (HEAD_ALONE,)
        styles = {branch.style for branch in faces if branch.view == "face" and branch.style}
        return SeenPerson(
            source=self._source(person, identity, name),
            pose_images={style: self._drawn(landmarks, drawing, style) for style in styles},
            landmarks=landmarks,
            body=body,
            anchor=None if anchor is None else anchor.inside(grid, name),
            face_box=face_box,
            mask_source=identity.mask_source if identity else None,
            notes=(
                *photo_notes,
                *unused(person, branches, images, in_box),
                *(f"pose photo: {note}" for note in pose_notes),
                *place_notes,
                *head_notes,
            ),
        )

    def _source(
        self, person: Person, identity: Identity | FaceCrop | PosedFace | None, name: str
    ) -> FaceCrop | FaceEmbedding | NDArray[np.float32] | None:
        """What the ID tokens are made of, or the tokens."""
        if isinstance(identity, FaceCrop):
            return identity
        if isinstance(identity, Identity):
            if identity.embedding is not None:
                return self._identities.embedding(identity.embedding, name, of_identity=True)
            return own_array(identity.id_tokens, self._token_shape, f"id_tokens of the identity of {name}")
        if person.embedding is not None:
            return self._identities.embedding(person.embedding, name)
        if person.id_tokens is not None:
            return own_array(person.id_tokens, self._token_shape, f"id_tokens of {name}")
        return None

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

    def see_all(
        self, persons: Sequence[Person], grid: Grid, branches: Sequence[Sequence[Branch]], images: Collection[str] = ()
    ) -> list[SeenPerson]:
        """All persons of one picture, in order. branches: of each of them. images, and what is raised: as of `see`."""
        heads = draws_heads(persons, branches, images)
        seen = [
            self.see(person, grid, drawn, len(persons) == 1, f"person {i}", heads, images)
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

    def prepare_all(self, people: Sequence[SeenPerson]) -> list[PreparedPerson]:
        """All persons of one picture, in order. Uses the backend. Raises NumericsError."""
        return [self.prepare(person) for person in people]

    def prepare(self, person: SeenPerson) -> PreparedPerson:
        """The person with ID tokens and ID patch. Uses the backend. Raises NumericsError."""
        source, id_patch = person.source, None
        if isinstance(source, FaceCrop):
            id_tokens = self.encode(source).id_tokens
        elif isinstance(source, FaceEmbedding):
            id_tokens, id_patch = self._identities.project(source)
        else:
            id_tokens = source
        drawn = {field.name: getattr(person, field.name) for field in fields(DrawnPerson)}
        return PreparedPerson(id_tokens=id_tokens, id_patch=id_patch, **drawn)

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
        if person.face is not None and (isinstance(source, Identity) or is_stored(source)):
            raise RequestError(
                f"face={person.face} of {name} chooses among the faces of a photo, but an identity was given: it is of "
                "one face. Leave face= out, or give the photo."
            )
        if self._identities.kind is None:
            return self._face_of(source, person, is_read, name)
        if source is None:
            self._check_own(person, name)
            return None, ()
        if isinstance(source, Identity):
            identity = source
        elif is_stored(source):
            identity = Identity.load(source)
        else:
            found = self.look(source, face=person.face, name=name)
            return found, found.notes
        identity.check(self._identities.key, f"the identity of {name}", self._identities.kind)
        return identity, identity.notes

    def _check_own(self, person: Person, name: str) -> None:
        """Raises RequestError if a person without photo and identity cannot be shown by this engine."""
        if person.id_tokens is None and person.embedding is None:
            refused = "embedding" if self._identities.kind != "embedding" else "id_tokens" * self._shows_patches
            who = [key for key in WHO if key != refused]
            raise RequestError(f"{name} needs exactly one of {', '.join(who[:-1])} and {who[-1]}; got none of them.")
        if person.embedding is not None and self._identities.kind != "embedding":
            raise RequestError(
                f"{name} has an embedding, and this engine has no face encoder: its ID tokens are made of a picture of "
                "the face. Give a photo, an identity of this engine, or id_tokens."
            )
        if person.id_tokens is not None and self._shows_patches:
            raise RequestError(
                f"{name} has id_tokens, and no ID patch can be made of them. Give a photo, an identity of this "
                "engine, or embedding=."
            )

    def _face_of(
        self, source: Photo | Identity | None, person: Person, is_read: bool, name: str
    ) -> tuple[PosedFace | None, tuple[str, ...]]:
        """The same for an engine without identities: the face of a photo or an identity gives pose and place alone."""
        for kind in ("id_tokens", "embedding"):
            if getattr(person, kind) is not None:
                raise RequestError(
                    f"{name} has {kind}, and this engine has no identities. Give a pose or a body alone."
                )
        if source is None:
            return None, ()
        if not self._draws_faces:
            raise RequestError(
                f"{name} is given by a photo, and this engine neither knows identities nor draws faces. Give "
                "Person(body=…), or the drawing: controls={…: Control(image)}."
            )
        if not is_read:
            return None, ("the photo was not used: no branch of this request draws the face in it.",)
        if isinstance(source, Identity) or is_stored(source):
            identity = source if isinstance(source, Identity) else Identity.load(source)
            return PosedFace(identity.landmarks, identity.box, identity.photo_size, identity.notes), identity.notes
        name = name_of(source, name)
        look = Look.of(source, name, person.face)
        face = self._identities.face(look, name)
        return PosedFace(face.landmarks, face.square, look.photo.turned(face.turns).size, face.notes), face.notes

    def _pose(
        self,
        person: Person,
        identity: Identity | FaceCrop | PosedFace | None,
        faces: Sequence[Branch],
        in_box: bool,
        name: str,
    ) -> tuple[NDArray[np.float64] | None, NDArray[np.float32] | None, tuple[str, ...]]:
        """Landmarks or the caller's own drawing of pose and expression, and notes about the pose photo.

        faces: the branches that draw them. in_box: the nose is needed too.
        """
        notes: tuple[str, ...] = ()
        if person.keypoints is not None and faces:
            raise RequestError(
                f"{name} has keypoints, and the branch {faces[0].name} draws {NUM_LANDMARKS} landmarks. Give pose= or "
                "landmarks=."
            )
        if person.pose_image is not None:
            return None, self._own_pose_image(person.pose_image, self._model.default_size, name), notes
        if person.keypoints is not None or not (faces or in_box):
            return None, None, notes
        if person.landmarks is not None:
            landmarks: NDArray[Any] = person.landmarks
        elif person.pose is not None:
            landmarks, notes = self._pose_of(person.pose, f"the pose of {name}")
        elif identity is not None:
            landmarks = identity.landmarks
        elif not faces:
            return None, None, notes
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
        if is_stored(source):
            return Identity.load(source).landmarks, ()
        name = name_of(source, name)
        choose_with = CHOOSE_POSE_WITH if self._identities.kind else CHOOSE_POSE_WITHOUT_IDENTITIES
        face = self._identities.face(Look.of(source, name), name, choose_with)
        return face.landmarks, face.notes

    def _own_pose_image(self, drawing: Any, side: int, name: str) -> NDArray[np.float32]:
        array = own_array(drawing, (3, side, side), f"pose_image of {name}")
        if array.min() < 0 or array.max() > 1:
            raise RequestError(
                f"pose_image of {name} reaches from {array.min():g} to {array.max():g}, expected [0, 1]. Divide by 255?"
            )
        return array
