"""The content of a picture, as words and as labels: a caption ↔ a description, exactly, both ways.

a person in a red shirt and a blue hat in the park
two people in a green shirt at the beach                                 all dressed alike
a person in a red shirt and a person in a black shirt at night           from left to right
"""

from __future__ import annotations

from dataclasses import dataclass

from realisid_trt.checks import is_whole
from realisid_trt.errors import RequestError

from .people import Rgb

SHIRTS: dict[str, Rgb] = {
    "red": (0.86, 0.17, 0.18), "green": (0.16, 0.60, 0.30), "blue": (0.17, 0.36, 0.82), "yellow": (0.97, 0.80, 0.18),
    "purple": (0.52, 0.24, 0.68), "orange": (0.96, 0.52, 0.14), "white": (0.95, 0.95, 0.95),
    "black": (0.15, 0.15, 0.17),
}  # fmt: skip
HATS: dict[str, Rgb] = {
    "red": (0.80, 0.14, 0.16), "green": (0.15, 0.50, 0.28), "blue": (0.16, 0.32, 0.74), "white": (0.95, 0.95, 0.95),
}  # fmt: skip
PLACES = {
    "park": "in the park", "beach": "at the beach", "city": "in the city", "room": "in a room", "snow": "in the snow",
    "studio": "in a studio", "forest": "in the forest", "night": "at night",
}  # fmt: skip
NUMBERS = ("a person", "two people", "three people")
MOST_PERSONS = len(NUMBERS)
VOCABULARY = tuple(sorted({*" ".join([*NUMBERS, *PLACES.values(), *SHIRTS, *HATS, "in an shirt and hat"]).split()}))


@dataclass(frozen=True)
class Description:
    """The content of a caption, and the labels of an attribute classifier.

    shirts: one name of SHIRTS per person, from left to right.
    hats:   one name of HATS or None per person.
    place:  a key of PLACES.

    Raises RequestError for other words, and for another number of persons than 1 to 3.
    """

    shirts: tuple[str, ...]
    hats: tuple[str | None, ...]
    place: str

    def __post_init__(self) -> None:
        if not 1 <= len(self.shirts) <= MOST_PERSONS or len(self.hats) != len(self.shirts):
            raise RequestError(
                f"a picture shows {len(self.shirts)} shirts and {len(self.hats)} hats, expected one of each (None for "
                f"no hat) for 1 to {MOST_PERSONS} persons."
            )
        for what, words, known in (("shirt", self.shirts, (*SHIRTS,)), ("hat", self.hats, (*HATS, None))):
            for word in words:
                if word not in known:
                    raise RequestError(f"{what} is {word!r}, expected one of {', '.join(map(str, known))}.")
        if self.place not in PLACES:
            raise RequestError(f"place is {self.place!r}, expected one of {', '.join(PLACES)}.")

    @property
    def num_persons(self) -> int:
        return len(self.shirts)

    @property
    def caption(self) -> str:
        """In VOCABULARY's words."""
        clothes = [
            f"in {_a(shirt)} shirt" + (f" and {_a(hat)} hat" if hat else "")
            for shirt, hat in zip(self.shirts, self.hats, strict=True)
        ]
        if len(set(clothes)) == 1:
            people = f"{NUMBERS[len(clothes) - 1]} {clothes[0]}"
        else:
            people = " and ".join(f"{NUMBERS[0]} {worn}" for worn in clothes)
        return f"{people} {PLACES[self.place]}"

    @property
    def labels(self) -> dict[str, int | tuple[int, ...]]:
        """Class numbers: persons 0…2, place 0…7, and per person shirt 0…7 and hat 0 (none) … 4."""
        hats = (None, *HATS)
        return {
            "persons": self.num_persons - 1,
            "place": list(PLACES).index(self.place),
            "shirts": tuple(list(SHIRTS).index(shirt) for shirt in self.shirts),
            "hats": tuple(hats.index(hat) for hat in self.hats),
        }

    @classmethod
    def from_labels(cls, place: int, shirts: tuple[int, ...], hats: tuple[int, ...]) -> Description:
        """The description with these labels. Raises RequestError for a number that is not a class."""
        for what, numbers, known in (
            ("place", (place,), PLACES),
            ("shirts", shirts, SHIRTS),
            ("hats", hats, ["", *HATS]),
        ):
            for number in numbers:
                if not is_whole(number) or not 0 <= number < len(known):
                    raise RequestError(f"{what} is {number!r}, expected class numbers from 0 to {len(known) - 1}.")
        worn = (None, *HATS)
        return cls(tuple(list(SHIRTS)[n] for n in shirts), tuple(worn[n] for n in hats), list(PLACES)[place])


def describe(caption: str) -> Description:
    """The description of a caption: the inverse of `Description.caption`. Raises RequestError for a caption of another
    form."""
    place = next((place for place, phrase in PLACES.items() if caption.endswith(" " + phrase)), None)
    if place is None:
        raise RequestError(
            f"caption {caption!r} does not end with a place, expected one of: {', '.join(PLACES.values())}."
        )
    people = caption.removesuffix(" " + PLACES[place])
    number = next((number for number, word in enumerate(NUMBERS, 1) if people.startswith(word + " ")), None)
    if number is None:
        raise RequestError(f"caption {caption!r} does not begin with people, expected one of: {', '.join(NUMBERS)}.")
    one = NUMBERS[0] + " "
    worn = people.removeprefix(NUMBERS[number - 1] + " ")
    clothes = [_clothes(each, caption) for each in (worn.split(" and " + one) if number == 1 else [worn] * number)]
    return Description(tuple(shirt for shirt, _ in clothes), tuple(hat for _, hat in clothes), place)


def _clothes(words: str, caption: str) -> tuple[str, str | None]:
    match words.split(" "):
        case ["in", "a" | "an", shirt, "shirt"]:
            return shirt, None
        case ["in", "a" | "an", shirt, "shirt", "and", "a" | "an", hat, "hat"]:
            return shirt, hat
    raise RequestError(
        f"caption {caption!r}: {words!r} does not describe clothes, expected as in: in a red shirt and a blue hat."
    )


def _a(word: str) -> str:
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"
