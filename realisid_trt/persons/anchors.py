"""The anchor of a person: the nose in the picture, about which an ID patch is painted."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..branches import Branch
from ..errors import BoxError, RequestError
from .bodies import LEAST_SCORE, NOSE, is_seen, nose_of
from .boxes import Grid
from .person import POSES, Person

HEAD_ALONE = (
    "nobody of the picture has a body, so the head was drawn: nose, eyes and ears of the face. This stand-in is ours, "
    "and no published model is known to be trained with it. Give body=, or a drawing."
)
NOTHING_DRAWN = (
    "nothing was drawn for this person: it has no body, and heads are drawn only where nobody of the picture has one. "
    "Its ID patch stands on black. Give body=."
)
BODY_UNSEEN = f"body was not used: none of its joints is seen, as every score is at most {LEAST_SCORE:g}."


@dataclass(frozen=True, eq=False)
class Anchor:
    """px: (2,) float64 x, y in px of the picture. source: what it is, for messages."""

    px: NDArray[np.float64]
    source: str

    @classmethod
    def given(cls, person: Person) -> Anchor | None:
        """The caller's own, else the nose of the body; None if it follows from neither."""
        if person.at is not None:
            return cls(np.array(person.at, np.float64), "at")
        nose = None if person.body is None else nose_of(person.body)
        return None if nose is None else cls(nose, "the nose of the body")

    @classmethod
    def of_face(cls, head: NDArray[np.float64]) -> Anchor:
        """The nose of a face. head: of `head_body`."""
        return cls(head[NOSE, :2].copy(), "the nose of the face")

    def moved(self, head: NDArray[np.float64]) -> NDArray[np.float64]:
        """The head, moved so that its nose is here. head: (17, 3), of `head_body`."""
        moved = head.copy()
        moved[:, :2] += np.where(head[:, 2:] > 0, self.px - head[NOSE, :2], 0)
        return moved

    def inside(self, grid: Grid, name: str) -> NDArray[np.float64]:
        """`px`. Raises BoxError if the whole px next to it lies outside of the picture: the published code leaves such
        a patch out without a word."""
        x, y = np.rint(self.px)
        if 0 <= x < grid.width and 0 <= y < grid.height:
            return self.px
        rounded = "" if (x, y) == tuple(self.px) else f", rounded to ({x + 0:g}, {y + 0:g})"
        raise BoxError(
            f"{self.source} of {name} is ({self.px[0]:g}, {self.px[1]:g}){rounded}, outside of the picture of "
            f"{grid.width}×{grid.height} px, and the ID patch goes there. Give at=(x, y) inside, or move the person."
        )


def has_body(person: Person) -> bool:
    """Whether a body with a seen joint was given: one of which nothing is seen is as good as none."""
    return person.body is not None and is_seen(person.body)


def patches_of(branches: Sequence[Branch]) -> list[Branch]:
    """Those of the branches that show ID patches."""
    return [branch for branch in branches if branch.condition == "id_patches"]


def draws_heads(persons: Sequence[Person], branches: Sequence[Sequence[Branch]], images: Collection[str]) -> bool:
    """Whether ID patches are shown on bodies that nobody gives, and on no image: then heads stand in for the bodies.

    branches: of each person. images: the branches that are shown an image of the caller's, by name.
    """
    on_bodies = any(branch.name not in images for of_person in branches for branch in patches_of(of_person))
    return on_bodies and not any(map(has_body, persons))


def check_anchors(
    persons: Sequence[Person], branches: Sequence[Sequence[Branch]], images: Collection[str], grid: Grid
) -> None:
    """Raises RequestError or BoxError if an ID patch has no place in the picture. Searches no face.

    Parameters as of `draws_heads`. A face that is found may still lie outside of the picture.
    """
    heads = draws_heads(persons, branches, images)
    for number, (person, of_person) in enumerate(zip(persons, branches, strict=True), start=1):
        given_anchor(person, of_person, grid, len(persons) == 1, f"person {number}", heads)


def given_anchor(
    person: Person, branches: Sequence[Branch], grid: Grid, alone: bool, name: str, heads: bool
) -> tuple[Anchor | None, bool]:
    """The anchor that a request gives, and whether the face in its box is needed: for its nose, or to draw the head.

    Parameters as of `People.see`. Raises RequestError if the anchor follows from nothing, BoxError if it lies outside.
    """
    patches = patches_of(branches)
    if not patches:
        return None, False
    anchor = Anchor.given(person)
    if anchor is not None:
        anchor.inside(grid, name)
        if not heads:
            return anchor, False
    has_photo = person.photo is not None or person.identity is not None
    # A body that is drawn places the person, and where its photo has the face says nothing then.
    if person.box is None and not (alone and has_photo and not has_body(person)):
        raise no_anchor(patches[0], heads, name)
    if not has_photo and all(getattr(person, key) is None for key in POSES if key != "pose_image"):
        raise no_nose(patches[0], heads, person.pose_image is not None, name)
    return anchor, True


def no_anchor(branch: Branch, heads: bool, name: str) -> RequestError:
    """The error for a person whose face has no place in the picture. heads: as in `People.see`."""
    if heads:
        return RequestError(
            f"{name} has neither body nor box, and the branch {branch.name} needs something to draw. Give body=, or "
            f'box= for a head alone, or at= and the drawing: controls={{"{branch.name}": Control("picture.png")}}.'
        )
    return RequestError(
        f"{name} has no anchor: nothing says where the ID patch goes in the picture. Give at=(x, y) in px of the "
        "output, a body= with a nose, or box=."
    )


def no_nose(branch: Branch, heads: bool, has_drawing: bool, name: str) -> RequestError:
    """The error for a person of whose face nothing is known but the box. has_drawing: and a pose_image."""
    unlike = " (a pose_image does not)" if has_drawing else ""
    if heads:
        return RequestError(
            f"{name} has neither a pose nor a photo that says how its head looks{unlike}, and the branch {branch.name} "
            "needs something to draw. Give body=, or pose=, landmarks= or keypoints= for a head alone, or at= and the "
            f'drawing: controls={{"{branch.name}": Control("picture.png")}}.'
        )
    return RequestError(
        f"{name} has neither a pose nor a photo that says where in the box the nose is{unlike}, and the branch "
        f"{branch.name} needs it. Give at=(x, y), body=, pose=, landmarks= or keypoints=."
    )


def unused(person: Person, branches: Sequence[Branch], images: Collection[str], in_box: bool) -> list[str]:
    """Notes on what a person gives and no branch shows. Parameters as of `People.see`; in_box: of `given_anchor`."""
    notes, patches = list[str](), patches_of(branches)
    draws_faces = any(branch.draws_faces for branch in branches)
    draws_bodies = any(branch.draws_bodies and branch.name not in images for branch in branches)
    pose = next((key for key in POSES if getattr(person, key) is not None), None)
    if pose and not (draws_faces or (in_box and pose != "pose_image")):
        notes.append(f"{pose} was not used: no branch of this request draws it.")
    if person.body is not None and not is_seen(person.body):
        notes.append(BODY_UNSEEN)
    elif person.body is not None and not draws_bodies:
        is_anchor = patches and person.at is None and nose_of(person.body) is not None
        notes.append(
            "of body the nose alone was used, as the place of the ID patch: no branch of this request draws bodies."
            if is_anchor
            else "body was not used: no branch of this request draws it."
        )
    if person.at is not None and not patches:
        notes.append("at was not used: no branch of this request shows ID patches.")
    return notes
