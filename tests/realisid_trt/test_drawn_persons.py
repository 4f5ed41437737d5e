"""What the branches of a request ask of its persons: a pose, a place, a body, and only if they draw them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from realisid_trt import Control, Request
from realisid_trt.config import RealisIDConfig, realisid_branches
from realisid_trt.errors import BoxError, PhotoError, RequestError
from realisid_trt.loop.controls import branches_of, drawings, settings
from realisid_trt.persons.faces import FaceFinder
from realisid_trt.persons.identity import Identity
from realisid_trt.persons.people import People
from realisid_trt.persons.person import Person
from realisid_trt.persons.photo import LoadedPhoto
from tests.realisid_trt.faces.photographs import beside, refusal
from tests.realisid_trt.test_people import BOX, CONFIG, GRID, MODEL, Encoder, embed

OPENPOSE = {"name": "openpose", "condition": "image", "tokens": "text", "pooled": "per_row", "style": "openpose-mmpose"}
FACE = {"name": "face", "condition": "pose", "style": "mediapipe-face", "tokens": "text", "pooled": "per_row"}
LANDMARKS, BODY = np.full((478, 2), 0.5), np.full((17, 2), 40.0)
DRAWING = np.zeros((3, 128, 128), np.float32)


class Asked:
    """An engine's answer to persons, before any network runs: what is seen of them, and what each branch is shown."""

    def __init__(self, finder: FaceFinder, *rows: dict[str, Any], **config: Any) -> None:
        self.config = RealisIDConfig.from_dict({"method": "controlnet", "branches": list(rows)} | config)
        self.people = People(Encoder(), finder, MODEL, self.config)  # type: ignore[arg-type]

    def __call__(self, *persons: Person, **controls: Control) -> tuple[Any, dict[str, Any]]:
        table = self.config.table
        given = settings(Request("x", persons, controls=controls).check(), table, GRID)
        seen = self.people.see_all(persons, GRID, branches_of(table, given))
        return seen, drawings(table, given, seen, GRID)


def test_a_face_that_is_drawn_needs_a_pose_and_a_place(finder: FaceFinder, photos: Any) -> None:
    ask = Asked(finder, FACE, OPENPOSE)
    with pytest.raises(
        RequestError, match=r"person 1 has no pose, and the branch face draws one. Give pose= or landmar"
    ):
        ask(Person(body=BODY, box=BOX))
    with pytest.raises(
        BoxError,
        match=r"person 1 has no box, and no photo that says where the face is. The branch face needs its place: Person",
    ):
        ask(Person(landmarks=LANDMARKS))
    with pytest.raises(BoxError, match="person 2 has no box. With several persons each of them needs one: Person"):
        ask(Person(landmarks=LANDMARKS, box=BOX), Person(landmarks=LANDMARKS))
    with pytest.raises(
        RequestError, match="person 1 has a pose_image, and the branch face draws landmarks into the who"
    ):
        ask(Person(pose_image=DRAWING, box=BOX))
    [seen], shown = ask(Person(photos.hopper, body=BODY))
    assert seen.face_box is not None and list(shown) == ["face", "openpose"]
    assert ask(Person(photos.hopper, box=(4, 4, 124, 124)))[1]["face"][0].any()


def test_a_face_that_is_not_drawn_needs_neither(finder: FaceFinder) -> None:
    """A drawing of the caller's own, a scale of 0, an optional branch: a body without box and pose is enough."""
    for more, control in (
        ({}, Control(DRAWING)),
        ({}, Control(scale=0)),
        ({"optional": True}, Control()),
        ({"scale": 0}, Control()),
    ):
        [first, second], shown = Asked(finder, {**FACE, **more}, OPENPOSE)(
            Person(body=BODY), Person(body=BODY), face=control
        )
        assert first.face_box is second.face_box is None and first.landmarks is None
        assert list(shown) == (["face", "openpose"] if control.image is not None else ["openpose"])
    [alone], _ = Asked(finder, FACE)(Person(landmarks=LANDMARKS), face=Control(DRAWING))
    assert alone.face_box is None and alone.landmarks is None
    [off], shown = Asked(finder, FACE)(Person(landmarks=LANDMARKS), face=Control(scale=0))
    assert off.face_box is None and shown == {}


def test_an_optional_face_is_drawn_of_those_who_give_one(finder: FaceFinder) -> None:
    ask = Asked(finder, {**FACE, "optional": True}, OPENPOSE)
    posed = Person(landmarks=LANDMARKS * np.linspace(0.5, 1.5, 478)[:, None], box=BOX)
    [first, second], shown = ask(posed, Person(body=BODY))
    assert first.landmarks is not None and second.landmarks is None
    np.testing.assert_array_equal(shown["face"][0], ask(posed)[1]["face"][0])
    with pytest.raises(BoxError, match="person 1 has no box. With several persons each"):  # a pose was given on purpose
        ask(Person(landmarks=LANDMARKS), posed)
    with pytest.raises(BoxError, match="person 1 has no box, and no photo that says where the face is"):
        ask(Person(landmarks=LANDMARKS))


def test_a_photo_that_no_branch_draws_is_told(finder: FaceFinder, photos: Any) -> None:
    """It is not searched: a photo without a face is no error then."""
    for ask, control in (
        (Asked(finder, FACE, OPENPOSE), Control(DRAWING)),
        (Asked(finder, {**FACE, "optional": True}, OPENPOSE), Control()),
    ):
        nothing = np.zeros((200, 200, 3), np.uint8)
        seen, _ = ask(Person(nothing, body=BODY), Person(body=BODY), face=control)
        assert [person.notes for person in seen] == [
            ("the photo was not used: no branch of this request draws the face in it.",), ()
        ]  # fmt: skip
    with pytest.raises(PhotoError):
        Asked(finder, FACE)(Person(nothing))
    with pytest.raises(
        RequestError, match="person 1 is given by a photo, and this engine neither knows identities nor"
    ):
        Asked(finder, OPENPOSE)(Person(nothing))


def test_a_pose_and_a_body_that_no_branch_draws_are_told(finder: FaceFinder) -> None:
    [seen], _ = Asked(finder, {**OPENPOSE, "style": None})(Person(pose="nowhere.jpg", body=BODY))
    assert seen.notes == tuple(f"{key} was not used: no branch of this request draws it." for key in ("pose", "body"))
    [seen], _ = Asked(finder, FACE, OPENPOSE)(Person(landmarks=LANDMARKS, body=BODY, box=BOX))
    assert not [note for note in seen.notes if "not used" in note]
    [seen], _ = Asked(finder, FACE, OPENPOSE)(Person(landmarks=LANDMARKS, box=BOX, at=(900, 9)))
    assert seen.notes == ("at was not used: no branch of this request shows ID patches.",)


def test_a_place_is_needed_where_the_table_says_so(finder: FaceFinder, photos: Any) -> None:
    """The mask of a box, and a body that is written into its box; with identities, of which nobody draws a face."""
    body = {"name": "body", "condition": "pose", "style": "openpose-xinsir", "per": "person", "tokens": "id"}
    place = {"name": "place", "condition": "location", "tokens": "id", "pooled": "zeros"}
    config = {"method": "realisid"}
    somebody = Person(id_tokens=np.zeros((4, 12)), body=BODY)
    [seen], shown = Asked(finder, {**body, "pooled": "zeros"}, **config)(somebody)
    assert seen.face_box is None and list(shown) == ["body"]
    for rows in ([{**body, "pooled": "zeros", "writes": "box"}], [place]):
        ask = Asked(finder, *rows, **config)
        with pytest.raises(BoxError, match=f"The branch {rows[0]['name']} needs its place"):
            ask(somebody)
        [seen], shown = ask(somebody, **{str(rows[0]["name"]): Control(scale=0)})
        assert seen.face_box is None and shown == {}
        [seen], _ = ask(Person(photos.hopper, body=BODY))
        assert seen.face_box is not None
    with pytest.raises(
        RequestError, match="person 1 has no pose, and the branch local draws one. Give pose=, landmarks="
    ):
        Asked(finder, *realisid_branches("zeros"), **config)(Person(id_tokens=np.zeros((4, 12)), body=BODY, box=BOX))


def test_which_face_beside_a_stored_identity_is_refused(finder: FaceFinder, photos: Any, tmp_path: Path) -> None:
    """By an engine without identities too: it would have been ignored there."""
    stored = tmp_path / "hopper.safetensors"
    embed(People(Encoder(), finder, MODEL, CONFIG), photos.hopper).save(stored)  # type: ignore[arg-type]
    ask = Asked(finder, FACE)
    [seen], _ = ask(Person(stored))
    assert seen.face_box is not None
    for source, control in ((stored, Control()), (Identity.load(stored), Control()), (stored, Control(DRAWING))):
        with pytest.raises(
            RequestError,
            match="face=1 of person 1 chooses among the faces of a photo, but an identity was given: it is of one "
            "face. Leave face= out, or give the photo",
        ):
            ask(Person(source, face=1), face=control)


def test_a_pose_photo_with_several_faces_where_nothing_is_embedded(finder: FaceFinder, hopper: LoadedPhoto) -> None:
    group = beside(hopper, hopper).rgb
    text = refusal("many_faces", Asked(finder, FACE), Person(pose=group, box=BOX))
    assert "Choose one with Person(photo, face=0…1): without pose= the pose is that of the photo" in text
    [seen], _ = Asked(finder, FACE)(Person(group, face=1, box=BOX))
    assert seen.landmarks is not None
