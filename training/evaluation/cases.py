"""What is asked for: unseen people, captions, boxes, poses and seeds; the same for every contender."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..world import PLACES, REGULAR, SHIRTS, SMALL, Description, Identity, Picture, Scene, World, draw, id_crop

SIZES = {"regular": REGULAR, "small": SMALL}
FIRST_SCENE = 5_000_000  # of the evaluation: no stage was trained on scenes from here on
GALLERY_VIEWS = 4
NUM_DISTRACTORS = 8
PROMPTS = 35


@dataclass(frozen=True, eq=False)
class Case:
    """One picture: who shall be where, in which pose, in what clothes and place, from which noise.

    scene:      the truth: what the world itself would draw.
    picture:    the truth, drawn.
    crops:      per actor the ID crop (s, s, 3) uint8 of another photo of the person.
    seed:       of the noise.
    identities: number of every actor among the unseen.
    """

    scene: Scene
    picture: Picture
    crops: tuple[NDArray[np.uint8], ...]
    seed: int
    identities: tuple[int, ...]


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
        """Case `number`: poses, place and boxes hang on it alone."""
        world = self.world
        people = [world.identity(identity, "unseen") for identity in identities]
        scene = world.scene(
            FIRST_SCENE + number, "unseen", face=face, layout=layout, caption=caption, identities=people,
            persons=len(people),
        )  # fmt: skip
        crops = tuple(self.crop(person, number) for person in people)
        return Case(scene, draw(scene, self.size_px), crops, number, identities)

    def crop(self, person: Identity, number: int) -> NDArray[np.uint8]:
        """An ID crop of a photo that is in no case."""
        photo = draw(self.world.reference(person, FIRST_SCENE + number), self.size_px)
        return id_crop(photo, 0, self.crop_px, self.margin)

    def table(self, size: str, identities: int, prompts: int, images: int, first: int = 0) -> list[Case]:
        """`identities` unseen people × `prompts` captions × `images` pictures, one person each. size: of SIZES."""
        captions = one_person_captions(prompts)
        return [
            self.case(((identity * prompts) + prompt) * images + image + first, (identity,), caption, SIZES[size])
            for identity in range(identities)
            for prompt, caption in enumerate(captions)
            for image in range(images)
        ]

    def groups(self, persons: int, count: int, face: tuple[float, float], layout: str, identities: int) -> list[Case]:
        """`count` pictures of so many people each, drawn from the first `identities` unseen ones."""
        rng = np.random.Generator(np.random.Philox(key=[self.world_seed, 77 + persons]))
        return [
            self.case(
                1_000_000 * persons + number,
                tuple(int(who) for who in rng.choice(identities, persons, replace=False)),
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
