"""The procedural world: words, people and their parts are what the picture shows."""

from __future__ import annotations

import random
from typing import Any

import cv2
import numpy as np
import pytest

from realisid_trt.errors import RequestError
from realisid_trt.persons.mesh import (
    LEFT_IRIS,
    NOSE_RIDGE,
    OUTER_LIPS,
    RIGHT_IRIS,
)
from tests.training.support import WORLD, portrait, same
from training.world import (
    HATS,
    PARTS,
    PLACES,
    SHIRTS,
    VOCABULARY,
    Description,
    Identity,
    Pose,
    World,
    describe,
    draw,
    id_crop,
    landmarks,
)
from training.world.backdrops import MOST_LABELS, NUM_VARIATIONS, PAINTERS, paint_backdrop
from training.world.canvas import Canvas

# -- words ------------------------------------------------------------------------------------------------------------


def test_captions_and_descriptions_say_the_same() -> None:
    rng = random.Random(0)
    for _ in range(300):
        number = rng.randint(1, 3)
        alike = rng.random() < 0.4
        shirts = [rng.choice([*SHIRTS]) for _ in range(number)]
        hats = [rng.choice([None, *HATS]) for _ in range(number)]
        said = Description(
            tuple(shirts[:1] * number if alike else shirts), tuple(hats[:1] * number if alike else hats),
            rng.choice([*PLACES]),
        )  # fmt: skip
        assert describe(said.caption) == said
        assert set(said.caption.split()) <= set(VOCABULARY)
        labels = said.labels
        assert labels["persons"] == number - 1
        assert Description.from_labels(labels["place"], labels["shirts"], labels["hats"]) == said  # type: ignore[arg-type]
    assert len(VOCABULARY) < 40


def test_captions_name_what_is_drawn() -> None:
    seen_hats = 0
    for index in range(24):
        scene = WORLD.scene(index)
        picture, said = draw(scene, 256), describe(scene.caption)
        assert said == scene.description and said.num_persons == len(set(picture.owners.flat) - {0})
        for person, (shirt, hat) in enumerate(zip(said.shirts, said.hats, strict=True)):
            for part, names, name in (("shirt", SHIRTS, shirt), ("hat", HATS, hat)):
                seen = picture.shows(part, person)
                assert seen.any() == (name is not None)
                if name is None:
                    continue
                seen_hats += part == "hat"
                # most of its pixels have its colour in this light, and the named colour is the nearest of all
                colors, counts = np.unique(picture.rgb[seen], axis=0, return_counts=True)
                main_color = colors[counts.argmax()].astype(float)
                if part == "shirt":
                    assert np.array_equal(main_color, picture.color(part, person))
                lit = {word: scene.light.on(np.array(rgb)) * 255 for word, rgb in names.items()}
                if part == "shirt":
                    assert min(lit, key=lambda word: float(np.abs(lit[word] - main_color).sum())) == name
    assert seen_hats >= 3


@pytest.mark.parametrize("place", PLACES)
def test_every_place_covers_the_whole_picture(place: str) -> None:
    rng = np.random.default_rng(0)
    variations = [np.zeros(NUM_VARIATIONS), np.full(NUM_VARIATIONS, 1 - 1e-9), *rng.random((6, NUM_VARIATIONS))]
    for variation in variations:
        canvas = Canvas(256)
        colors = paint_backdrop(canvas, place, variation)
        assert canvas.labels.min() >= 1 and canvas.labels.max() < len(colors) <= MOST_LABELS + 1
    assert set(PAINTERS) == set(PLACES)


@pytest.mark.parametrize(
    ("caption", "message"),
    [
        ("", "does not end with a place"),
        ("a person in a red shirt", "does not end with a place, expected one of: in the park"),
        ("four people in a red shirt at night", "does not begin with people, expected one of: a person, two people"),
        ("a person in a pink shirt at night", "shirt is 'pink', expected one of red"),
        ("a person in a red shirt and a black hat at night", "hat is 'black'"),
        ("a person in a red dress at night", "does not describe clothes"),
        ("two people in a red shirt and a person in a red shirt at night", "does not describe clothes"),
    ],
)
def test_captions_of_another_form_are_refused(caption: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        describe(caption)


# -- people -----------------------------------------------------------------------------------------------------------


def test_identities_differ_and_unseen_ones_are_new() -> None:
    train = np.stack([WORLD.identity(index).factors for index in range(300)])
    unseen = np.stack([WORLD.identity(index, "unseen").factors for index in range(60)])
    everybody = np.concatenate([train, unseen])
    apart = np.abs(everybody[:, None] - everybody[None]).max(axis=2) + np.eye(len(everybody))
    assert apart.min() > 0.3  # any two differ clearly in some factor
    np.testing.assert_allclose(everybody.mean(axis=0), 0.5, atol=0.07)
    drawn = {actor.identity.name for index in range(30) for actor in WORLD.scene(index, "unseen").actors}
    assert {name[0] for name in drawn} == {"unseen"}


def test_a_person_looks_alike_in_every_pose_and_others_do_not() -> None:
    person, other = WORLD.identity(1), WORLD.identity(2)
    pictures = [draw(portrait(person, WORLD.pose(index)), 128) for index in range(5)]
    parts = ("face", "hair", "brows", "arms", "neck")
    for picture in pictures:
        assert all(np.array_equal(picture.color(part, 0), pictures[0].color(part, 0)) for part in parts)
    assert len({picture.landmarks.tobytes() for picture in pictures}) == 5
    stranger = draw(portrait(other, Pose()), 128)
    assert any(np.abs(stranger.color(p, 0).astype(int) - pictures[0].color(p, 0)).max() > 20 for p in parts)

    def shape(identity: Identity, roll: float) -> Any:
        """Distances between features over the distance of the eyes: scale and roll do not change them."""
        points = landmarks(identity.factors[None], Pose(roll=roll).values[None])[0]
        chosen = points[[RIGHT_IRIS[0], LEFT_IRIS[0], OUTER_LIPS[0], OUTER_LIPS[10], NOSE_RIDGE[-1], 152, 10, 234, 454]]
        apart = np.linalg.norm(chosen[:, None] - chosen[None], axis=2)
        return apart / apart[0, 1]

    np.testing.assert_allclose(shape(person, 0.25), shape(person, -0.1), rtol=1e-9)
    assert np.abs(shape(person, 0) - shape(other, 0)).max() > 0.05


def test_siblings_share_skin_and_hair_and_nothing_else() -> None:
    person = WORLD.identity(6)
    siblings = [WORLD.sibling(person, index) for index in range(3)]
    assert len({person, *siblings}) == 4
    for sibling in siblings:
        assert np.array_equal(sibling.skin, person.skin) and np.array_equal(sibling.hair, person.hair)
        assert sibling.traits["hair_style"] == person.traits["hair_style"]
        assert landmarks(sibling.factors[None], Pose().values[None]).tobytes() != (
            landmarks(person.factors[None], Pose().values[None]).tobytes()
        )


def test_references_show_the_same_person_otherwise() -> None:
    person = WORLD.identity(8)
    scenes = [WORLD.reference(person, index) for index in range(6)]
    assert all(scene.actors[0].identity == person and scene.actors[0].hat is None for scene in scenes)
    for varied in (lambda s: s.actors[0].pose, lambda s: s.light, lambda s: s.variations):
        assert len({varied(scene) for scene in scenes}) == 6
    assert len({scene.place for scene in scenes}) > 1
    assert same(draw(World(WORLD.seed).reference(person, 4), 64), draw(scenes[4], 64))
    assert WORLD.reference(person).boxes(64)[0, 2] <= 64


# -- crops and parts --------------------------------------------------------------------------------------------------


def test_an_id_crop_shows_the_head_and_nothing_else() -> None:
    scene = WORLD.scene(2, persons=2)
    picture = draw(scene, 256)
    for person, (x0, y0, x1, y1) in enumerate(picture.boxes.astype(int)):
        crop = id_crop(picture, person, x1 - x0, margin=1.0)  # no resampling
        head = picture.head(person)[y0:y1, x0:x1]
        np.testing.assert_array_equal(crop, np.where(head[..., None], picture.rgb[y0:y1, x0:x1], 0))
        assert head.mean() > 0.5
        hull = id_crop(picture, person, 64, keep="hull")
        inner = id_crop(picture, person, 64)
        assert 0.1 < (hull.any(axis=2)).mean() < (inner.any(axis=2)).mean() < 1


def test_neck_and_body_stand_under_every_face_in_their_colours() -> None:
    for index in range(8):
        scene = WORLD.scene(index, persons=1)
        picture = draw(scene, 256)
        x0, _, x1, y1 = picture.boxes[0].astype(int)
        below = picture.parts[y1:, x0:x1]
        for part in ("neck", "shirt"):
            assert (below == PARTS.index(part)).any(), part
        neck = picture.rgb[picture.shows("neck", 0)].astype(int)
        assert (np.abs(neck - picture.color("neck", 0)).max(axis=1) <= 2).any()
        assert picture.owners.max() == 1 and ((picture.parts == 0) == (picture.owners == 0)).all()


@pytest.mark.parametrize("size_px", [16, 100, 333])
def test_any_size_shows_the_same_scene(size_px: int) -> None:
    scene = WORLD.scene(9)
    picture = draw(scene, size_px)
    assert picture.rgb.shape == (size_px, size_px, 3) and picture.rgb.dtype == np.uint8

    def distance(other: int) -> float:
        """The distance to another scene, drawn at 512 px and shrunk."""
        large = draw(WORLD.scene(other), 512).rgb
        shrunk = cv2.resize(large, (size_px, size_px), interpolation=cv2.INTER_AREA)
        return float(np.abs(shrunk.astype(float) - picture.rgb).mean())

    assert distance(9) * 4 < min(distance(other) for other in range(9))
    np.testing.assert_allclose(picture.boxes / size_px, scene.boxes(512) / 512, rtol=1e-12)
