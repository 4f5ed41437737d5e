"""The world: every person, pose and scene there is, by number. The same numbers, the same bytes."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence

import numpy as np

from realisid_trt.checks import is_finite, is_whole
from realisid_trt.errors import RequestError

from .backdrops import NUM_VARIATIONS
from .people import COLORING, FACTORS, Floats, Identity, Pose, random_pose
from .scenes import Actor, Light, Scene
from .words import HATS, MOST_PERSONS, PLACES, SHIRTS, Description, describe

SPLITS = {"train": 100_000, "unseen": 1_000}  # identities of each; no person is in both
REGULAR, SMALL = (1 / 4, 1 / 2), (1 / 7, 1 / 6)  # sides of the face square over the picture's, as the paper has them
LAYOUTS = ("apart", "overlap")
HEAD_ROOM = 1.3  # a head with its hair over its face square, in width
LEAST_FACE, MOST_FACE = 1 / 16, 2 / 3
# Every choice has its own stream of random numbers, so asking for another caption does not move anybody.
_STREAMS = {name: number for number, name in enumerate(
    ("identity", "sibling", "pose", "persons", "layout", "clothes", "place", "light", "reference", *SPLITS)
)}  # fmt: skip


class World:
    """A world of people. Pure: its results depend on seed, grid and arguments, and on nothing else."""

    def __init__(self, seed: int = 0, grid: int = 64) -> None:
        """seed: from 0 to 2³² - 1. grid: cells across a picture, on which face squares lie.

        Choose the grid so that a cell is the checkpoint's box_snap: 64 at 256 px for a snap of 4 px, 32 at 128 px. Then
        `realisid_trt.persons.boxes.snap_box` leaves every box where it is. Raises RequestError.
        """
        self.seed = _number(seed, "seed")
        if not is_whole(grid) or not 16 <= grid <= 256:
            raise RequestError(f"grid is {grid!r}, expected a whole number of cells from 16 to 256.")
        self.grid = int(grid)

    def identity(self, index: int, split: str = "train") -> Identity:
        """Person number `index` of "train" or "unseen". Raises RequestError."""
        rng = self._rng("identity", _split(split), _number(index, "index"))
        return Identity((split, int(index)), rng.random(len(FACTORS)))

    def sibling(self, identity: Identity, index: int) -> Identity:
        """Another person of the same skin, hair and beard, with other features: for a recogniser to tell apart."""
        rng = self._rng("sibling", _key(identity), _number(index, "index"))
        factors = rng.random(len(FACTORS))
        factors[: len(COLORING)] = identity.factors[: len(COLORING)]
        return Identity((*identity.name, "sibling", int(index)), factors)

    def pose(self, index: int, amount: float = 1.0) -> Pose:
        """A random pose and expression. amount: 0 neutral … 1 as far as poses go. Raises RequestError."""
        if not is_finite(amount) or not 0 <= amount <= 1:
            raise RequestError(f"amount is {amount!r}, expected a number from 0 to 1.")
        return random_pose(self._rng("pose", _number(index, "index")), amount)

    def scene(
        self,
        index: int,
        split: str = "train",
        *,
        persons: int | None = None,
        face: tuple[float, float] = (1 / 7, 1 / 2),
        layout: str = "apart",
        caption: str | None = None,
        identities: Sequence[Identity] | None = None,
        poses: Sequence[Pose] | None = None,
    ) -> Scene:
        """Scene number `index`: the given arguments are fixed, and the rest is drawn at random.

        persons:    1 to 3; None: 55, 30 and 15 of 100 scenes.
        face:       least and greatest side of a face square over the picture's: log-uniform between them, on the grid.
                    A size too large for that many heads side by side is reduced.
        layout:     "apart": no face touches another's square; "overlap": neighbours' squares overlap by a tenth to
                    three tenths (the nearer head hides part of the other).
        caption:    of the scene, see words.describe.
        identities: from left to right; None: of the split, all different.
        poses:      from left to right.

        Raises RequestError for a wrong or contradictory argument, and when so many heads do not fit.
        """
        key = _split(split), _number(index, "index")
        asked = None if caption is None else describe(caption)
        number = self._num_persons(key, persons, asked, identities, poses)
        if identities is None:
            draw = self._rng("persons", *key, 1)
            chosen = dict.fromkeys(int(u * SPLITS[split]) for u in draw.random(4 * number))  # all different
            identities = [self.identity(person, split) for person in list(chosen)[:number]]
        if poses is None:
            poses = [random_pose(self._rng("pose", *key, person)) for person in range(number)]
        squares = self._squares(self._rng("layout", *key), number, face, layout)
        place = self._rng("place", *key)
        said = asked or _clothes(self._rng("clothes", *key), number, _one_of(PLACES, place.random()))
        more = self._rng("clothes", *key, 1).random((number, 2))
        actors = [
            Actor(identity, pose, square, shirt, hat, float(trousers), float(gesture))
            for identity, pose, square, shirt, hat, (trousers, gesture) in zip(
                identities, poses, squares, said.shirts, said.hats, more, strict=True
            )
        ]
        variations = tuple(float(value) for value in self._rng("place", *key, 1).random(NUM_VARIATIONS))
        return Scene(self.grid, tuple(actors), said.place, variations, _light(self._rng("light", *key), 0.5))

    def reference(self, identity: Identity, index: int = 0) -> Scene:
        """A portrait of somebody: photo number `index`, in another pose, light, place and shirt each time, no hat.

        The face square is 2/5 to 1/2 of the picture.
        """
        key = _key(identity), _number(index, "index")
        rng = self._rng("reference", *key)
        side = round((0.40 + 0.10 * rng.random()) * self.grid)
        x = (self.grid - side) // 2 + round((rng.random() - 0.5) * 0.2 * self.grid)
        y = round((0.22 + 0.08 * rng.random()) * self.grid)
        shirt, place = _one_of(SHIRTS, rng.random()), _one_of(PLACES, rng.random())
        actor = Actor(identity, random_pose(rng, 0.6), (x, y, side), shirt, None, rng.random(), rng.random())
        variations = tuple(float(value) for value in rng.random(NUM_VARIATIONS))
        return Scene(self.grid, (actor,), place, variations, _light(rng, 1.0))

    def _rng(self, stream: str, *key: str | int) -> np.random.Generator:
        words = [_STREAMS[part] if isinstance(part, str) else part for part in (stream, *key)]
        numbers = [self.seed, len(words), *words]  # the length, since a SeedSequence takes [1] and [1, 0] for the same
        return np.random.Generator(np.random.PCG64(np.random.SeedSequence(numbers)))

    def _num_persons(
        self,
        key: tuple[str, int],
        persons: int | None,
        asked: Description | None,
        identities: Sequence[Identity] | None,
        poses: Sequence[Pose] | None,
    ) -> int:
        """The number that the arguments agree on, or a draw."""
        if persons is not None and (not is_whole(persons) or not 1 <= persons <= MOST_PERSONS):
            raise RequestError(f"persons is {persons!r}, expected a whole number from 1 to {MOST_PERSONS}.")
        said = {
            "persons": persons,
            "caption": None if asked is None else asked.num_persons,
            "identities": None if identities is None else len(identities),
            "poses": None if poses is None else len(poses),
        }
        numbers = {what: int(number) for what, number in said.items() if number is not None}
        if len(set(numbers.values())) > 1:
            told = ", ".join(f"{what} says {number}" for what, number in numbers.items())
            raise RequestError(f"the number of persons is contradictory: {told}. Make them agree, or leave some out.")
        if not numbers:
            draw = self._rng("persons", *key).random()
            return 1 if draw < 0.55 else 2 if draw < 0.85 else 3
        number = next(iter(numbers.values()))
        if not 1 <= number <= MOST_PERSONS:
            raise RequestError(f"{next(iter(numbers))} says {number} persons, expected 1 to {MOST_PERSONS}.")
        return number

    def _squares(
        self, rng: np.random.Generator, number: int, face: tuple[float, float], layout: str
    ) -> list[tuple[int, int, int]]:
        """x0, y0, side in cells of the grid, from left to right."""
        if layout not in LAYOUTS:
            raise RequestError(f"layout is {layout!r}, expected one of {', '.join(LAYOUTS)}.")
        low, high = _face_range(face)
        room = number if layout == "apart" else 1 + 0.8 * (number - 1)  # heads' widths side by side
        most = min(high, 1 / (HEAD_ROOM * room), MOST_FACE)
        if low > most + 1 / (2 * self.grid):
            raise RequestError(
                f"{number} heads with faces of at least 1/{1 / low:.3g} of the picture do not fit side by side; "
                f"expected at most 1/{1 / most:.3g}. Ask for smaller faces or fewer persons."
            )
        size_draw, gap_draw, height_draw = rng.random((3, number))
        shared_size, shared_height, shift = rng.random(3)
        spread = np.clip(shared_size + 0.3 * (size_draw - 0.5) * (number > 1), 0, 1)
        sides = np.round(self.grid * np.exp(np.log(low) + spread * (np.log(max(most, low)) - np.log(low)))).astype(int)
        if layout == "overlap":
            share = 0.1 + 0.2 * gap_draw[1:]
            steps = sides[:-1] - np.round(share * np.minimum(sides[:-1], sides[1:])).astype(int)
            x = np.concatenate([[0], np.cumsum(steps)])
            free = self.grid - (x[-1] + sides[-1])
            x = x + round(max(free, 0) * (0.15 + 0.7 * shift))
        else:
            free = self.grid - HEAD_ROOM * sides.sum()
            gaps = free * np.cumsum(gap_draw) / (gap_draw.sum() + shift)  # the rest of the free room is on the right
            x = np.round(gaps + HEAD_ROOM * (np.cumsum(sides) - sides) + (HEAD_ROOM - 1) / 2 * sides).astype(int)
        side = sides / self.grid
        top = np.maximum(0.30 * side, 0.84 - 5.0 * side)  # small figures stand on the ground
        bottom = np.maximum(top, 0.56 - 0.52 * side)
        where = shared_height + 0.5 * (height_draw - 0.5) * (number > 1)
        y = np.round(self.grid * (top + np.clip(where, 0, 1) * (bottom - top))).astype(int)
        x, y = np.clip(x, 0, self.grid - sides), np.clip(y, 0, self.grid - sides)
        return [(int(a), int(b), int(c)) for a, b, c in zip(x, y, sides, strict=True)]


def _clothes(rng: np.random.Generator, number: int, place: str) -> Description:
    """Random shirts and hats; half of the groups are dressed alike."""
    draw = rng.random((number, 3))
    if rng.random() < 0.5:
        draw[:] = draw[0]
    shirts = tuple(_one_of(SHIRTS, one) for one, _, _ in draw)
    hats = tuple(_one_of(HATS, two) if wears < 0.25 else None for _, two, wears in draw)
    return Description(shirts, hats, place)


def _light(rng: np.random.Generator, amount: float) -> Light:
    warmth, brightness, side = rng.random(3)
    return Light((2 * warmth - 1) * amount, 1 + (0.24 * brightness - 0.14) * amount, -1.0 if side < 0.5 else 1.0)


def _one_of(names: dict[str, Floats] | dict[str, str] | dict[str, tuple[float, float, float]], draw: float) -> str:
    return list(names)[int(draw * len(names))]


def _key(identity: Identity) -> int:
    if not isinstance(identity, Identity):
        raise RequestError(f"identity is {identity!r}, expected an Identity, such as world.identity(0).")
    return zlib.crc32(identity.factors.tobytes())


def _number(value: int, what: str) -> int:
    if not is_whole(value) or not 0 <= value < 2**32:  # one word of a SeedSequence: no two keys run together
        raise RequestError(f"{what} is {value!r}, expected a whole number from 0 to 2**32 - 1.")
    return int(value)


def _split(split: str) -> str:
    if split not in SPLITS:
        raise RequestError(f"split is {split!r}, expected one of {', '.join(SPLITS)}.")
    return split


def _face_range(face: tuple[float, float]) -> tuple[float, float]:
    try:
        low, high = face
    except (TypeError, ValueError):
        low = high = math.nan
    if not (is_finite(low) and is_finite(high) and LEAST_FACE <= low <= high <= MOST_FACE):
        raise RequestError(
            f"face is {face!r}, expected the least and the greatest side of a face over the picture's, between "
            f"1/{1 / LEAST_FACE:.0f} and 2/3."
        )
    return float(low), float(high)
