"""Training examples from the world, by number."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from realisid_trt.persons.faces.squares import as_box, crop_square, grown
from realisid_trt.persons.mesh import NUM_LANDMARKS

from .store import check_least
from .world import FACTORS, Scene, World, draw, id_crop

MOST_PERSONS = 3
LEAST_MARGIN = 0.5  # as a checkpoint's face_margin
HULLS = 3  # one in three ID crops keeps the face alone, as the runtime does without a face parser; the others the head


@dataclass(frozen=True, kw_only=True)
class WorldScenes:
    """Scenes of the world with their captions.

    pictures: how many; first: number of the first. seed: of the world.
    size_px:  side S of the pictures; grid_px: of the grid that face squares lie on (the checkpoint's box_snap).
    persons:  1 to 3 in a picture, taken in turn; none: 1, 2 and 3 at random, 55, 30 and 15 of 100.
    face:     least and greatest side of a face over the picture's.
    crop_px:  side s of the ID crops; 0 makes none. They show the same persons in other photos, in another
              pose and light, so that copying the crop is not rewarded. margin: `face_margin`.

    An example, for P persons at most, zeros after the last:
    rgb (S, S, 3) uint8, num_persons () uint8, boxes (P, 4) float32 px, landmarks (P, 478, 2) float32 in [0, 1] of the
    box, crops (P, s, s, 3) uint8, caption.

    Raises RequestError for numbers that the world does not have.
    """

    pictures: int
    first: int = 0
    seed: int = 0
    size_px: int = 128
    grid_px: int = 4
    persons: tuple[int, ...] = ()
    face: tuple[float, float] = (1 / 8, 1 / 2)
    crop_px: int = 0
    margin: float = 1.5

    def __post_init__(self) -> None:
        check_least(self, pictures=1, first=0, grid_px=1, crop_px=0, margin=LEAST_MARGIN)
        for index in range(max(len(self.persons), 1)):
            self._scene(index)

    def shapes(self) -> Mapping[str, tuple[tuple[int, ...], DTypeLike]]:
        persons, size, crop = max(self.persons, default=MOST_PERSONS), self.size_px, self.crop_px
        return {
            "rgb": ((size, size, 3), np.uint8),
            "num_persons": ((), np.uint8),
            "boxes": ((persons, 4), np.float32),
            "landmarks": ((persons, NUM_LANDMARKS, 2), np.float32),
            "crops": ((persons, crop, crop, 3), np.uint8),
        }

    def __len__(self) -> int:
        return self.pictures

    def _scene(self, index: int) -> Scene:
        world = World(self.seed, self.size_px // self.grid_px)
        persons = self.persons[index % len(self.persons)] if self.persons else None
        return world.scene(self.first + index, persons=persons, face=self.face)

    def caption_of(self, index: int) -> str:
        """The caption alone."""
        return self._scene(index).caption

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        world, scene = World(self.seed, self.size_px // self.grid_px), self._scene(index)
        index += self.first
        picture = draw(scene, self.size_px)
        example: dict[str, Any] = {name: np.zeros(shape, dtype) for name, (shape, dtype) in self.shapes().items()}
        example |= {"rgb": picture.rgb, "num_persons": len(scene.actors), "caption": scene.caption}
        example["boxes"][: len(scene.actors)] = picture.boxes
        example["landmarks"][: len(scene.actors)] = picture.landmarks
        if self.crop_px:
            for person, actor in enumerate(scene.actors):
                photo = draw(world.reference(actor.identity, index), self.size_px)
                keep = "head" if index % HULLS else "hull"
                example["crops"][person] = id_crop(photo, 0, self.crop_px, self.margin, keep)
        return example

    def describe(self) -> dict[str, Any]:
        return {"source": "world", **asdict(self)}


@dataclass(frozen=True, kw_only=True)
class WorldFaces:
    """Pairs of siblings, each person in several views: a recogniser must tell people apart, whatever the view.

    pairs:    how many; first: number of the first person of the "train" split.
    views:    V of each person, all different in pose, expression, light, shirt and place.
    photo_px: side s of the ID crops of portraits (background zeroed); 0 makes none.
    scene_px: side t of crops of scenes with their background: the face square times scene_margin, scaled to t;
              0 makes none.

    An example: photos (2, V, s, s, 3) uint8, scenes (2, V, t, t, 3) uint8, factors (2, 27) float32 of the identities.

    Raises RequestError for numbers that the world does not have.
    """

    pairs: int
    first: int = 0
    seed: int = 0
    size_px: int = 128
    grid_px: int = 4
    views: int = 3
    photo_px: int = 64
    margin: float = 1.5
    scene_px: int = 0
    scene_margin: float = 1.25
    face: tuple[float, float] = (1 / 8, 1 / 2)

    def __post_init__(self) -> None:
        check_least(self, pairs=1, first=0, grid_px=1, views=1, photo_px=0, margin=LEAST_MARGIN,
                    scene_px=0, scene_margin=LEAST_MARGIN)  # fmt: skip
        World(self.seed, self.size_px // self.grid_px).scene(0, persons=1, face=self.face)

    def shapes(self) -> Mapping[str, tuple[tuple[int, ...], DTypeLike]]:
        photo, scene = self.photo_px, self.scene_px
        return {
            "photos": ((2, self.views, photo, photo, 3), np.uint8),
            "scenes": ((2, self.views, scene, scene, 3), np.uint8),
            "factors": ((2, len(FACTORS)), np.float32),
        }

    def __len__(self) -> int:
        return self.pairs

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        world = World(self.seed, self.size_px // self.grid_px)
        one = world.identity(self.first + index)
        found: dict[str, Any] = {name: np.zeros(shape, dtype) for name, (shape, dtype) in self.shapes().items()}
        for person, identity in enumerate((one, world.sibling(one, 0))):
            found["factors"][person] = identity.factors
            for view in range(self.views):
                number = (self.first + index) * self.views + view
                if self.photo_px:
                    photo = draw(world.reference(identity, number), self.size_px)
                    keep = "head" if number % HULLS else "hull"
                    found["photos"][person, view] = id_crop(photo, 0, self.photo_px, self.margin, keep)
                if self.scene_px:
                    scene = world.scene(2 * number + person, persons=1, face=self.face, identities=[identity])
                    picture = draw(scene, self.size_px)
                    x0, y0, x1, y1 = picture.boxes[0]
                    square = grown(as_box((x0, y0, x1, y1)), self.scene_margin)
                    found["scenes"][person, view] = crop_square(picture.rgb, square, self.scene_px)[0]
        return found

    def describe(self) -> dict[str, Any]:
        return {"source": "world faces", **asdict(self)}
