"""Where ID patches go, and heads in the place of bodies that nobody gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from realisid_trt.errors import BoxError, RequestError
from realisid_trt.loop.controls import with_patches
from realisid_trt.persons.anchors import HEAD_ALONE, NOTHING_DRAWN
from realisid_trt.persons.bodies import body_drawing, head_body
from realisid_trt.persons.faces import FaceFinder
from realisid_trt.persons.identity import Identity
from realisid_trt.persons.patches import paint_patches
from realisid_trt.persons.people import People
from realisid_trt.persons.person import Person
from tests.realisid_trt.aligned import (
    BODY,
    CONFIG,
    EMBEDDING,
    PICTURE,
    Projections,
    encoder_in,
    people_of,
    prepared,
    seen,
)


@pytest.fixture
def people(finder: FaceFinder, tmp_path: Path) -> People:
    return people_of(Projections(), finder, encoder_in(tmp_path / "face_encoder"))


# -- anchors -----------------------------------------------------------------------------------------------------------


def test_an_embedding_and_a_place_are_enough_for_a_drawing(people: People) -> None:
    """Any number of persons, without box, pose and photo; patches are painted on the caller's drawing."""
    persons = [Person(embedding=EMBEDDING + number, at=(20 + 60 * number, 200.5)) for number in range(3)]
    found, shown = seen(people, *persons, image=PICTURE)
    ready = [people.prepare(person) for person in found]
    assert [person.anchor.tolist() for person in ready] == [[20, 200.5], [80, 200.5], [140, 200.5]]
    [painted] = with_patches(CONFIG.table, shown, ready)["id_patch"]
    expected = paint_patches(PICTURE, [p.id_patch for p in ready], [p.anchor for p in ready])
    assert np.array_equal(painted, expected) and not np.array_equal(painted, PICTURE)


def test_the_anchor_is_at_then_the_bodys_nose_then_the_faces(people: People, photos: Any) -> None:
    box, identity = (40, 60, 140, 160), people.look(photos.hopper)
    assert isinstance(identity, Identity)
    nose = np.array((40, 60)) + 100 * identity.landmarks[4]
    scored = np.column_stack([BODY, np.ones(17)])
    unseen = np.column_stack([BODY, [0.3, *[1.0] * 16]])  # a score of 0.3 is not above it
    five = np.array([(0.3, 0.3), (0.7, 0.3), (0.25, 0.75), (0.35, 0.8), (0.65, 0.8)])
    other = np.clip(identity.landmarks + 0.125, 0, 1)
    for expected, given in (
        ((9, 8), {"at": (9, 8), "body": BODY, "box": box}),
        (BODY[0], {"body": BODY, "box": box}),
        (BODY[0], {"body": scored}),
        (nose, {"body": unseen, "box": box}),
        (nose, {"box": box}),
        ((65, 135), {"box": box, "keypoints": five}),
        (np.array((40, 60)) + 100 * other[4], {"box": box, "landmarks": other}),
    ):
        [found], _ = seen(people, Person(identity, **given), image=PICTURE)  # type: ignore[arg-type]
        np.testing.assert_allclose(found.anchor, expected, atol=1e-9)
        assert found.anchor.dtype == np.float64
    [found], _ = seen(people, Person(embedding=EMBEDDING, box=box, pose=identity), image=PICTURE)
    np.testing.assert_allclose(found.anchor, nose, atol=1e-9)


def test_alone_the_nose_stays_where_it_is_in_the_photo(people: People, photos: Any) -> None:
    """A photo of 512 × 600 px covers 192 × 256 px: scaled by 256/600, 13 px cut off on either side."""
    [found], _ = seen(people, Person(photos.hopper), image=PICTURE)
    identity = people.look(photos.hopper)
    assert isinstance(identity, Identity)
    in_photo = np.array(identity.box[:2]) + identity.landmarks[4] * (identity.box[2] - identity.box[0])
    scale = 256 / 600
    expected = in_photo * scale - ((512 * scale - 192) / 2, 0)
    assert np.abs(found.anchor - expected).max() < 4  # the box is on the grid of 4 px


@pytest.mark.parametrize(
    ("persons", "message"),
    [
        (
            [{"photo": "hopper"}, {"photo": "hopper", "at": (9, 9)}],
            "person 1 has no anchor: nothing says where",
        ),
        (
            [{"embedding": EMBEDDING}],
            r"person 1 has no anchor.*Give at=\(x, y\) in px of .*, a body= with a nose",
        ),
        (
            [{"embedding": EMBEDDING, "box": (40, 60, 140, 160)}],
            "person 1 has neither a pose nor a photo that says where in the box the nose is, and the branch id_patch",
        ),
        ([{"embedding": EMBEDDING, "body": np.column_stack([BODY, np.zeros(17)])}], "person 1 has no anchor"),
    ],
)
def test_without_an_anchor(people: People, photos: Any, persons: list[dict[str, Any]], message: str) -> None:
    made = [Person(**given | ({"photo": photos.hopper} if "photo" in given else {})) for given in persons]
    with pytest.raises(RequestError, match=message):
        seen(people, *made, image=PICTURE)


def test_an_anchor_outside_of_the_picture_is_refused(people: People) -> None:
    """The rounded px decides, as in the published code, which leaves the patch out without a word."""
    for inside in ((0, 0), (-0.5, 0), (191.5 - 1e-9, 255), (191, 255.25)):
        assert prepared(people, Person(embedding=EMBEDDING, at=inside)).anchor.tolist() == list(inside)
    for outside in ((-0.51, 5), (191.6, 5), (192, 5), (5, 256), (5, -40)):
        with pytest.raises(BoxError, match=r"at of person 1 is \(.*\), outside of the picture of 192×256 px"):
            prepared(people, Person(embedding=EMBEDDING, at=outside))
    for at, told in (
        ((191.6, 5), r"\(191.6, 5\), rounded to \(192, 5\)"),
        ((-0.4, 300), r"\(-0.4, 300\), rounded to \(0, 300\)"),
        ((192, 5), r"\(192, 5\)"),
    ):
        with pytest.raises(BoxError, match=rf"at of person 1 is {told}, outside of the picture"):
            prepared(people, Person(embedding=EMBEDDING, at=at))
    with pytest.raises(BoxError, match=r"the nose of the body of person 1 is \(-60, 30\), outside"):
        prepared(people, Person(embedding=EMBEDDING, body=BODY - (100, 0)))


def test_a_branch_that_is_left_out_asks_for_nothing(people: People) -> None:
    """With scale 0 there is no patch, so no anchor is missing, and none lies outside."""
    for person in (Person(embedding=EMBEDDING), Person(embedding=EMBEDDING, at=(900, 900))):
        [found], shown = seen(people, person, scale=0)
        assert found.anchor is None and shown == {}
        found, shown = seen(people, person, image=PICTURE, scale=0)
        ready = [people.prepare(each) for each in found]
        assert np.array_equal(with_patches(CONFIG.table, shown, ready)["id_patch"][0], PICTURE)


# -- bodies and heads --------------------------------------------------------------------------------------------------


def test_a_body_is_drawn_and_the_patch_painted_on_its_nose(people: People) -> None:
    found, shown = seen(people, Person(embedding=EMBEDDING, body=BODY), Person(embedding=EMBEDDING, at=(9, 9)))
    assert found[1].body is None and [person.notes for person in found] == [(), (NOTHING_DRAWN,)]
    assert np.array_equal(shown["id_patch"][0], body_drawing([BODY], 256, 192, "openpose-mmpose"))


def test_without_any_body_heads_are_drawn_and_said(people: People, photos: Any) -> None:
    identities = [people.look(path) for path in photos]
    boxes = [(0, 40, 88, 128), (100, 100, 180, 180)]
    persons = [Person(path, box=box) for path, box in zip(photos, boxes, strict=True)]
    found, shown = seen(people, *persons)
    heads = []
    for person, identity, (x0, y0, x1, _) in zip(found, identities, boxes, strict=True):
        assert isinstance(identity, Identity)
        points = np.array((x0, y0)) + (x1 - x0) * identity.landmarks
        head = np.zeros((17, 3))
        for joint, landmark in enumerate((4, 473, 468, 454, 234)):  # nose, left and right eye, left and right ear
            head[joint] = (*points[landmark], 1)
        np.testing.assert_allclose(person.body, head, atol=1e-9)
        np.testing.assert_allclose(person.anchor, head[0, :2], atol=1e-9)
        assert head[4, 0] < head[2, 0] < head[0, 0] < head[1, 0] < head[3, 0]  # from the person's right ear
        assert person.notes[-1].startswith("nobody of the picture has a body, so the head was drawn")
        assert "ours, and no published model" in person.notes[-1]
        heads.append(head)
    [drawing] = shown["id_patch"]
    assert np.array_equal(drawing, body_drawing(heads, 256, 192, "openpose-mmpose")) and drawing.max() > 0.9
    [alone], _ = seen(people, Person(photos.hopper))
    assert alone.body is not None and alone.body[0, 2] == 1


def test_a_head_stands_where_the_anchor_is(people: People, photos: Any) -> None:
    five = np.array([(0.3, 0.3), (0.7, 0.3), (0.5, 0.5), (0.35, 0.8), (0.65, 0.8)])
    person = Person(photos.hopper, box=(40, 40, 140, 140), at=(100, 120), keypoints=five)
    [found], _ = seen(people, person)
    expected = np.zeros((17, 3))
    expected[:3] = [(100, 120, 1), (120, 100, 1), (80, 100, 1)]  # keypoints have no ears
    np.testing.assert_allclose(found.body, expected, atol=1e-9)
    assert found.anchor.tolist() == [100, 120]


def test_no_head_where_a_body_or_a_drawing_is(people: People, photos: Any) -> None:
    box = (0, 40, 88, 128)
    found, _ = seen(people, Person(photos.hopper, box=box), image=PICTURE)
    assert found[0].body is None and found[0].notes == ()
    found, _ = seen(people, Person(photos.hopper, box=box), Person(photos.astronaut, body=BODY))
    assert found[0].body is None and found[0].anchor is not None
    assert [person.notes for person in found] == [(NOTHING_DRAWN,), ()]
    assert NOTHING_DRAWN.startswith("nothing was drawn for this person: it has no body")


def test_a_body_of_which_nothing_is_seen_is_as_good_as_none(people: People, photos: Any) -> None:
    """Heads are drawn, and the photo places a person that is alone; its scores are at most 0.3."""
    unseen, box = np.column_stack([BODY, np.full(17, 0.3)]), (0, 40, 88, 128)
    for persons in (
        [Person(photos.hopper, body=unseen)],
        [Person(photos.hopper, body=unseen, box=box), Person(photos.astronaut, box=(100, 100, 180, 180))],
    ):
        found, shown = seen(people, *persons)
        assert all(person.body[0, 2] == 1 and person.notes[-1] == HEAD_ALONE for person in found)
        assert shown["id_patch"][0].max() > 0.9
        assert found[0].notes[0] == (
            "body was not used: none of its joints is seen, as every score is at most 0.3."
        )  # fmt: skip
    found, _ = seen(people, Person(photos.hopper, body=unseen, box=box), Person(photos.astronaut, body=BODY))
    assert found[0].notes[-1] == NOTHING_DRAWN and found[1].notes == ()


def test_what_is_given_and_not_shown_is_told(people: People, photos: Any) -> None:
    nose_alone = (
        "of body the nose alone was used, as the place of the ID patch: no branch of this request draws bodies."
    )
    body, at = "body was not used: no branch of this request draws it.", (9, 9)
    no_patches = "at was not used: no branch of this request shows ID patches."
    for given, image, scale, notes in (
        ({"body": BODY}, PICTURE, None, (nose_alone,)),
        ({"body": BODY, "at": at}, PICTURE, None, (body,)),
        ({"body": BODY, "at": at}, None, None, ()),
        ({"at": at}, None, 0, (no_patches,)),
        ({"body": BODY, "at": at}, PICTURE, 0, (body, no_patches)),
    ):
        [found], _ = seen(people, Person(embedding=EMBEDDING, **given), image=image, scale=scale)  # type: ignore[arg-type]
        assert found.notes == notes


def test_a_pose_image_leaves_the_nose_to_the_photo(people: People, photos: Any) -> None:
    box, drawing = (40, 60, 140, 160), np.zeros((3, 128, 128), np.float32)
    [plain], _ = seen(people, Person(photos.hopper, box=box))
    [drawn], _ = seen(people, Person(photos.hopper, box=box, pose_image=drawing))
    assert np.array_equal(drawn.anchor, plain.anchor) and np.array_equal(drawn.body, plain.body)
    assert drawn.notes == ("pose_image was not used: no branch of this request draws it.", HEAD_ALONE)
    with pytest.raises(RequestError, match=r"where in the box the nose is \(a pose_image does not\), and the branch"):
        seen(people, Person(embedding=EMBEDDING, box=box, pose_image=drawing), image=PICTURE)


def test_the_frame_of_the_photo_says_nothing_beside_a_body(people: People, photos: Any) -> None:
    """A body whose nose is not seen stands somewhere in the picture; the face of the photo would be elsewhere."""
    no_nose = np.column_stack([BODY, [0.3, *[1.0] * 16]])
    for image in (None, PICTURE):
        with pytest.raises(RequestError, match="person 1 has no anchor: nothing says where the ID patch goes"):
            seen(people, Person(photos.hopper, body=no_nose), image=image)
        [found], _ = seen(people, Person(photos.hopper, body=no_nose, at=(50, 60)), image=image)
        assert found.anchor.tolist() == [50, 60]


@pytest.mark.parametrize("given", [{"photo": "hopper", "at": (9, 9)}, {"embedding": EMBEDDING, "at": (9, 9)}])
def test_heads_that_cannot_be_drawn(people: People, photos: Any, given: dict[str, Any]) -> None:
    photo = {"photo": photos.hopper} if "photo" in given else {}
    message = (
        "person 1 has neither body nor box, and the branch id_patch needs something to draw. Give body=, or box= for a "
        'head alone, or at= and the drawing: controls={"id_patch"'
    )
    with pytest.raises(RequestError, match=message):
        seen(people, Person(**given | photo), Person(photos.astronaut, box=(0, 40, 88, 128)))


def test_a_head_of_which_only_the_box_is_known(people: People) -> None:
    """The advice does not name at= alone, which says where a head is and not how it looks."""
    for given in ({}, {"at": (50, 60)}):
        message = (
            "person 1 has neither a pose nor a photo that says how its head looks, and the branch id_patch needs "
            "something to draw. Give body=, or pose=, landmarks= or keypoints= for a head alone, or at= and the "
            'drawing: controls={"id_patch": Control("picture.png")}.'
        )
        with pytest.raises(RequestError) as refused:
            seen(people, Person(embedding=EMBEDDING, box=(40, 60, 140, 160), **given))  # type: ignore[arg-type]
        assert str(refused.value) == message


def test_heads_of_both_kinds_of_points() -> None:
    points = np.random.default_rng(0).random((478, 2)) * 100
    from_mesh, from_five = head_body(points), head_body(points[[468, 473, 4, 61, 291]])
    assert np.array_equal(from_mesh[:3], from_five[:3]) and not from_five[3:].any() and not from_mesh[5:].any()
