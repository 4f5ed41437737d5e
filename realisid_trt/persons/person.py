"""A person of a picture: as the caller asks for it, and as it was placed."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..branches import Branch
from ..checks import own_array, plain_number, whole
from ..errors import RequestError
from .bodies import checked_body
from .identity import Identity
from .mesh import NUM_LANDMARKS, checked_keypoints
from .photo import Photo

WHO = ("photo", "identity", "id_tokens", "embedding")
POSES = ("pose", "landmarks", "pose_image", "keypoints")


@dataclass(frozen=True, eq=False)
class Person:
    """One person of a picture: who, where, and in what pose.

    Who, exactly one of (none for an engine without identities: then a pose or a body)
        photo:      a path, bytes, PIL image or (H, W, 3) uint8 array; or an Identity; or the path of a stored one.
        identity:   an Identity, as `Engine.embed` returns it.
        id_tokens:  (T, D) float array of your own; box and a pose, or a body, must then be given.
        embedding:  (512,) floats of your own, for an engine with a face encoder: that encoder's output for an aligned
                    face. Copied; read-only.
    Where
        box:        x0, y0, x1, y1 in pixels of the output. None, for one person only: the photo is scaled to cover the
                    picture, centred, and the face stays where it is in the photo. None, for any number of persons: if
                    no branch of the request needs it.
        at:         x, y in pixels of the output, where the ID patch of an engine with patches goes. None: the nose of
                    `body`, else the nose of the pose in `box`.
    Pose and expression, at most one of (none: those of the photo)
        pose:       another photo, or an Identity, whose landmarks are taken.
        landmarks:  (478, 2) floats in [0, 1] of the squared face box.
        pose_image: (3, H, W) floats in [0, 1], a drawing of your own, for branches that see the face: as large
                    as their canvas.
        keypoints:  (5, 2) floats in [0, 1] of the squared face box: the eye on the picture's left, the other eye, nose,
                    corners of the mouth. Copied; read-only.
    Body, for branches that are shown one
        body:       (17, 2) or (17, 3) floats: x, y of COCO's joints in pixels of the output, and their scores. Copied;
                    read-only.
    Which
        face:       which face of the photo, counted from the left; None takes the only or the clearly largest one.
    """

    photo: Photo | Identity | None = None
    identity: Identity | None = None
    id_tokens: NDArray[Any] | None = None
    box: Sequence[float] | None = None
    pose: Photo | Identity | None = None
    landmarks: NDArray[Any] | None = None
    pose_image: NDArray[Any] | None = None
    face: int | None = None
    body: NDArray[Any] | None = None
    embedding: NDArray[Any] | None = None
    at: Sequence[float] | None = None
    keypoints: NDArray[Any] | None = None

    def __post_init__(self) -> None:
        who = [name for name in WHO if getattr(self, name) is not None]
        how = [name for name in POSES if getattr(self, name) is not None]
        if len(who) > 1 or not (who or how or self.body is not None):
            given = " and ".join(who) if who else "none of them"
            raise RequestError(
                f"Person needs exactly one of {', '.join(WHO[:-1])} and {WHO[-1]}; got {given}. For an engine without "
                "identities give a pose or a body."
            )
        if len(how) > 1:
            raise RequestError(
                f"Person takes at most one of {', '.join(POSES[:-1])} and {POSES[-1]}; got {' and '.join(how)}."
            )
        if self.id_tokens is not None and self.body is None and (self.box is None or not how):
            raise RequestError(
                "Person(id_tokens=…) has no photo: give box= and one of pose=, landmarks= and pose_image= too. Or give "
                "body=, for an engine that draws bodies alone."
            )
        if self.identity is not None and not isinstance(self.identity, Identity):
            raise RequestError(
                f"identity is {type(self.identity).__name__}, expected an Identity, as Engine.embed returns. "
                "A stored identity's path goes where the photo goes: Person('alice.safetensors', …)."
            )
        if self.face is not None and self.photo is None:
            raise RequestError("face= chooses among the faces of a photo; without a photo leave it out.")
        if self.box is not None and not isinstance(self.box, str):
            with suppress(TypeError):  # reported when a picture is requested
                object.__setattr__(self, "box", tuple(map(plain_number, self.box)))
        if self.face is not None:
            if (face := whole(self.face)) is None:
                raise RequestError(f"face is {self.face!r}, expected a whole number counted from the left, or None.")
            object.__setattr__(self, "face", face)
        if self.at is not None:
            object.__setattr__(self, "at", checked_anchor(self.at))
        arrays: dict[str, NDArray[Any]] = {}
        if self.body is not None:
            arrays["body"] = checked_body(self.body, "body")
        if self.keypoints is not None:
            arrays["keypoints"] = checked_keypoints(self.keypoints, "keypoints")
        if self.embedding is not None:
            arrays["embedding"] = own_array(self.embedding, None, "embedding")
            if arrays["embedding"].ndim != 1:
                raise RequestError(
                    f"embedding has shape {arrays['embedding'].shape}, expected (512,): one vector of one face."
                )
        for name, array in arrays.items():
            array.setflags(write=False)
            object.__setattr__(self, name, array)

    def __reduce__(self) -> Any:
        fields = (getattr(self, field.name) for field in dataclasses.fields(self))
        return type(self), tuple(fields)  # an unpickled person's arrays are read-only too


def names_drawing(person: Person, branch: Branch) -> bool:
    """Whether a person gives, on purpose, what a branch draws. A photo may be there for the identity alone."""
    if branch.draws_bodies:
        return person.body is not None
    if branch.draws_faces:
        drawing = person.pose_image is not None and branch.view == "face"
        return drawing or person.pose is not None or person.landmarks is not None
    return person.box is not None


def gives_all(person: Person, branch: Branch, alone: bool) -> bool:
    """Whether a person gives everything that a branch draws of it. alone: the only person of its picture."""
    has_photo = person.photo is not None or person.identity is not None
    if branch.needs_box and person.box is None and not (alone and has_photo):
        return False
    if branch.draws_faces and has_photo and person.pose_image is None:
        return True
    return names_drawing(person, branch) or branch.condition == "location"


def checked_anchor(at: Any) -> tuple[float, float]:
    """x, y in px of the output. Raises RequestError for anything else, and for shares of the picture."""
    try:
        numbers = own_array(at, None, "at", np.float64)
    except RequestError as error:
        raise RequestError(f"{error} Expected x, y in px of the output: at=(312, 240).") from None
    if numbers.shape != (2,):
        raise RequestError(f"at is {at!r}, expected x, y in px of the output: at=(312, 240).")
    x, y = numbers.tolist()
    if 0 < x < 1 and 0 < y < 1:
        raise RequestError(
            f"at is ({x:g}, {y:g}), expected px of the output. Multiply x by its width and y by its height."
        )
    return x, y


def placeholder(side_px: int, token_shape: tuple[int, int] | None, embedding_dim: int | None = None) -> Person:
    """A person with everything that a branch may draw, for a picture that is thrown away.

    side_px:       of its box.
    token_shape:   of the ID tokens; None for an engine without identities.
    embedding_dim: numbers of an embedding, for an engine with a face encoder: given in the place of the tokens.
    """
    return Person(
        id_tokens=None if token_shape is None or embedding_dim else np.zeros(token_shape, np.float32),
        embedding=None if embedding_dim is None else np.ones(embedding_dim, np.float32),
        at=(side_px / 2, side_px / 2),
        box=(0, 0, side_px, side_px),
        landmarks=np.full((NUM_LANDMARKS, 2), 0.5),
        body=np.full((17, 2), side_px / 2),
    )


@dataclass(frozen=True, eq=False)
class PlacedPerson:
    """The place of one person in the picture, and notes on the photo.

    box:         x0, y0, x1, y1 of the squared and snapped box in the output, px; None if no branch needs it and none
                 was given.
    mask_source: mask that removed the background: "bisenet", "hull+person", "hull" or "own"; "aligned" for a face
                 encoder, which sees the background; None without a photo.
    notes:       decisions about the photo, in sentences.
    anchor:      x, y in the output, px, about which the ID patch was painted; None without patches.
    """

    box: tuple[int, int, int, int] | None
    mask_source: str | None
    notes: tuple[str, ...]
    anchor: tuple[float, float] | None = None
