"""The cases of the evaluation: unseen people, captions, boxes, poses and seeds; the same for every contender."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..world import PLACES, REGULAR, SHIRTS, SMALL, Description, Identity, Picture, Pose, Scene, World, draw, id_crop

SIZES = {"regular": REGULAR, "small": SMALL}
FIRST_SCENE = 5_000_000  # of the evaluation: no stage was trained on scenes from here on
GALLERY_VIEWS = 4
NUM_DISTRACTORS = 8
PROMPTS = 35
ELSEWHERE, SOMEBODY_ELSE = 20_000_000, 500  # added to a scene's number, and to a person's


@dataclass(frozen=True, eq=False)
class Case:
    """One picture to make: its people, their boxes, poses and clothes, the place, and the noise.

    scene:      the truth: what the world itself would draw.
    picture:    the truth, drawn.
    crops:      per actor the ID crop (s, s, 3) uint8 of another photo of the person.
    seed:       of the noise, and the number of the scene.
    identities: number of every actor among the unseen.
    face, layout: arguments of `World.scene`.
    """

    scene: Scene
    picture: Picture
    crops: tuple[NDArray[np.uint8], ...]
    seed: int
    identities: tuple[int, ...]
    face: tuple[float, float]
    layout: str


@dataclass(frozen=True, kw_only=True)
class Casting:
    """Makes cases. size_px, grid_px: of the pictures; crop_px, margin: of the ID crops, as the checkpoint has them."""

    size_px: int = 128
    grid_px: int = 4
    crop_px: int = 64
    margin: float = 1.5
    world_seed: int = 0

    @property
    def world(self) -> World:
        return World(self.world_seed, self.size_px // self.grid_px)

    def case(
        self,
        number: int,
        identities: tuple[int, ...],
        caption: str | None = None,
        face: tuple[float, float] = REGULAR,
        layout: str = "apart",
    ) -> Case:
        """Case `number`: poses, place and boxes depend on it alone."""
        scene = self._scene(number, identities, caption, face, layout)
        crops = tuple(self.crop(self.world.identity(who, "unseen"), number) for who in identities)
        return Case(scene, draw(scene, self.size_px), crops, number, identities, face, layout)

    def retake(self, case: Case) -> Picture:
        """The same people and words in another scene: another correct picture of them."""
        scene = self._scene(case.seed + ELSEWHERE, case.identities, case.scene.caption, case.face, case.layout)
        return draw(scene, self.size_px)

    def somebody_else(self, case: Case) -> Picture:
        """Other people in other poses at the same boxes: a floor for every measure of the person."""
        others = tuple((who + SOMEBODY_ELSE) % 1000 for who in case.identities)
        poses = [self.world.pose(case.seed * len(others) + person) for person in range(len(others))]
        return draw(self._scene(case.seed, others, case.scene.caption, case.face, case.layout, poses), self.size_px)

    def _scene(
        self, number: int, identities: tuple[int, ...], caption: str | None, face: tuple[float, float], layout: str,
        poses: Sequence[Pose] | None = None,
    ) -> Scene:  # fmt: skip
        return self.world.scene(
            FIRST_SCENE + number, "unseen", face=face, layout=layout, caption=caption, persons=len(identities),
            identities=[self.world.identity(who, "unseen") for who in identities], poses=poses,
        )  # fmt: skip

    def crop(self, person: Identity, number: int) -> NDArray[np.uint8]:
        """An ID crop of a photo that is in no case."""
        photo = draw(self.world.reference(person, FIRST_SCENE + number), self.size_px)
        return id_crop(photo, 0, self.crop_px, self.margin)

    def table(self, size: str, identities: int, count: int, first: int = 0, first_identity: int = 0) -> list[Case]:
        """`count` pictures of one person each: `identities` unseen people in turn, each time with the next caption.

        2800 pictures of 40 people show each of them with each of the 35 captions twice. size: a key of SIZES; first:
        number of the first case.
        """
        captions = one_person_captions()
        return [
            self.case(
                first + number, (first_identity + number % identities,),
                captions[(number % identities + number // identities) % len(captions)], SIZES[size],
            )
            for number in range(count)
        ]  # fmt: skip

    def groups(
        self, persons: int, count: int, face: tuple[float, float], layout: str, identities: int, first: int = 0,
        first_identity: int = 0,
    ) -> list[Case]:  # fmt: skip
        """`count` pictures of `persons` people each, drawn from `identities` unseen ones. first: added to the cases'
        numbers, less than a million."""
        rng = np.random.Generator(np.random.Philox(key=[self.world_seed, 77 + persons + first]))
        return [
            self.case(
                1_000_000 * persons + first + number,
                tuple(first_identity + int(who) for who in rng.choice(identities, persons, replace=False)),
                hatless_caption(persons, rng), face, layout,
            )
            for number in range(count)
        ]  # fmt: skip


def hatless_caption(persons: int, rng: np.random.Generator) -> str:
    """Random shirts and a place; no hats, which hide hair, and hair is identity."""
    shirts = tuple(str(shirt) for shirt in rng.choice(list(SHIRTS), persons))
    return Description(shirts, (None,) * persons, str(rng.choice(list(PLACES)))).caption


def one_person_captions(count: int = PROMPTS) -> list[str]:
    """Different captions of one person without a hat (a hat hides hair, which is identity), spread over clothes and
    places."""
    shirts, places = list(SHIRTS), list(PLACES)
    return [
        Description(
            (shirts[number % len(shirts)],), (None,), places[(number + number // len(shirts)) % len(places)]
        ).caption
        for number in range(count)
    ]
