"""Identities and poses: factors of a person and of a face's movement, as numbers with names."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from realisid_trt.checks import is_finite
from realisid_trt.errors import RequestError

Floats = NDArray[np.float64]
Rgb = tuple[float, float, float]  # 0..1

# Each is uniform in [0, 1]. Colouring and hair come first: siblings share them.
COLORING = ("skin", "undertone", "hair_color", "hair_style", "volume", "fringe", "parting", "beard")
FEATURES = (
    "face_width", "jaw", "ears", "eye_color", "eye_gap", "eye_size", "eye_height", "eye_tilt", "lashes",
    "brow_thickness", "brow_angle", "nose_width", "nose_length", "mouth_width", "lip_fullness", "lip_color",
    "glasses", "freckles", "mole",
)  # fmt: skip
FACTORS = COLORING + FEATURES
_PLACE = {name: number for number, name in enumerate(FACTORS)}

SKINS: tuple[Rgb, ...] = ((1.0, 0.88, 0.79), (0.97, 0.79, 0.65), (0.87, 0.65, 0.48), (0.70, 0.48, 0.33),
                          (0.52, 0.34, 0.23), (0.36, 0.23, 0.16))  # fmt: skip
HAIR_COLORS: dict[str, Rgb] = {
    "black": (0.12, 0.11, 0.13), "dark brown": (0.27, 0.17, 0.11), "brown": (0.47, 0.29, 0.15),
    "auburn": (0.55, 0.20, 0.11), "ginger": (0.86, 0.42, 0.13), "blond": (0.95, 0.78, 0.40),
    "grey": (0.74, 0.74, 0.77), "violet": (0.45, 0.29, 0.68), "pink": (0.90, 0.45, 0.60),
}  # fmt: skip
HAIR_STYLES = ("shaved", "short", "parted", "curly", "bob", "long", "bun", "ring")
LONG_STYLES = ("bob", "long", "bun")  # never with a beard
EYE_COLORS: dict[str, Rgb] = {
    "brown": (0.36, 0.20, 0.10), "green": (0.22, 0.52, 0.26), "blue": (0.16, 0.45, 0.82), "grey": (0.42, 0.48, 0.54),
}  # fmt: skip
LIP_TINTS: tuple[Rgb, ...] = ((0.80, 0.42, 0.38), (0.78, 0.20, 0.25), (0.62, 0.26, 0.38), (0.68, 0.36, 0.28))
BEARDS = ("none", "moustache", "goatee", "full")
GLASSES = ("none", "round", "square")
FRAMES: tuple[Rgb, ...] = ((0.10, 0.10, 0.12), (0.70, 0.12, 0.14), (0.13, 0.30, 0.62))


@dataclass(frozen=True, eq=False)
class Identity:
    """A person. Identities with equal factors are the same person.

    name:    where it comes from, such as ("train", 17).
    factors: (27,) in [0, 1], in the order of FACTORS. Read-only.

    Raises RequestError for other factors.
    """

    name: tuple[str | int, ...]
    factors: Floats

    def __post_init__(self) -> None:
        factors = np.array(self.factors, np.float64)
        if factors.shape != (len(FACTORS),) or not bool(((factors >= 0) & (factors <= 1)).all()):
            raise RequestError(f"{self.name} has factors of shape {factors.shape}, expected {len(FACTORS)} in [0, 1].")
        factors.setflags(write=False)
        object.__setattr__(self, "factors", factors)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Identity) and bool(np.array_equal(self.factors, other.factors))

    def __hash__(self) -> int:
        return hash(self.factors.tobytes())

    def __getitem__(self, factor: str) -> float:
        return float(self.factors[_PLACE[factor]])

    def _choice(self, factor: str, number: int) -> tuple[int, float]:
        """Which of `number` equal parts of [0, 1] the factor lies in, and where in that part."""
        scaled = self[factor] * number
        place = min(int(scaled), number - 1)
        return place, scaled - place

    @cached_property
    def traits(self) -> dict[str, str]:
        """The person's traits in words: hair style and colour, eyes, beard, glasses."""
        style = HAIR_STYLES[self._choice("hair_style", len(HAIR_STYLES))[0]]
        beard = 0 if style in LONG_STYLES else int(np.searchsorted((0.45, 0.6, 0.75), self["beard"], side="right"))
        return {
            "hair_style": style,
            "hair_color": list(HAIR_COLORS)[self._choice("hair_color", len(HAIR_COLORS))[0]],
            "eye_color": list(EYE_COLORS)[self._choice("eye_color", len(EYE_COLORS))[0]],
            "beard": BEARDS[beard],
            "glasses": GLASSES[int(np.searchsorted((0.62, 0.81), self["glasses"], side="right"))],
        }

    @property
    def skin(self) -> Floats:
        """(3,) colour of the skin, 0..1."""
        stops = np.array(SKINS)
        place = self["skin"] * (len(stops) - 1)
        first = min(int(place), len(stops) - 2)
        mixed = stops[first] + (stops[first + 1] - stops[first]) * (place - first)
        return np.asarray(np.clip(mixed * (1 + (self["undertone"] - 0.5) * np.array([0.06, -0.02, -0.12])), 0, 1))

    @property
    def hair(self) -> Floats:
        """(3,) colour of hair, brows and beard, 0..1."""
        place, within = self._choice("hair_color", len(HAIR_COLORS))
        return np.clip(np.array(list(HAIR_COLORS.values())[place]) * (0.88 + 0.24 * within), 0, 1)

    @property
    def eyes(self) -> Floats:
        """(3,) colour of the irises, 0..1."""
        place, within = self._choice("eye_color", len(EYE_COLORS))
        return np.clip(np.array(list(EYE_COLORS.values())[place]) * (0.85 + 0.3 * within), 0, 1)

    @property
    def lips(self) -> Floats:
        """(3,) colour of the lips, 0..1: a tint over the skin."""
        place, within = self._choice("lip_color", len(LIP_TINTS))
        return np.array(LIP_TINTS[place]) * float((0.45 + 0.55 * self.skin.mean()) * (0.92 + 0.16 * within))

    @property
    def frames(self) -> Floats:
        """(3,) colour of the glasses' frames, 0..1."""
        return np.array(FRAMES[int(self["glasses"] * 97) % len(FRAMES)])


POSE_LIMITS: dict[str, tuple[float, float]] = {
    "yaw": (-0.55, 0.55), "pitch": (-0.3, 0.3), "roll": (-0.3, 0.3), "mouth": (0, 1), "smile": (-1, 1),
    "brows": (-1, 1), "gaze_x": (-1, 1), "gaze_y": (-1, 1), "lids": (-1, 1),
}  # fmt: skip
POSE = tuple(POSE_LIMITS)


@dataclass(frozen=True)
class Pose:
    """The turn of a head, and its expression. All zero: frontal, neutral, looking at the viewer.

    yaw, pitch, roll: rad: towards the right of the picture, up, clockwise as seen.
    mouth:  0 closed … 1 wide open.
    smile:  -1 corners down … 1 corners up.
    brows:  -1 frown … 1 raised.
    gaze_x, gaze_y: -1 … 1: left to right, up to down.
    lids:   -1 closed … 0 … 1 wide open.

    Raises RequestError outside POSE_LIMITS.
    """

    yaw: float = 0.0
    pitch: float = 0.0
    roll: float = 0.0
    mouth: float = 0.0
    smile: float = 0.0
    brows: float = 0.0
    gaze_x: float = 0.0
    gaze_y: float = 0.0
    lids: float = 0.0

    def __post_init__(self) -> None:
        for name, (low, high) in POSE_LIMITS.items():
            if not is_finite(value := getattr(self, name)) or not low <= value <= high:
                raise RequestError(f"{name} of a pose is {value!r}, expected a number from {low:g} to {high:g}.")

    @property
    def values(self) -> Floats:
        """(9,) in the order of POSE."""
        return np.array([getattr(self, name) for name in POSE])


def random_pose(rng: np.random.Generator, amount: float = 1.0) -> Pose:
    """A pose between neutral (amount 0) and the limits (1). Half of the mouths and one pair of eyes in 12 are shut."""
    draw = dict(zip(POSE, rng.random(len(POSE)), strict=True))
    values = {name: (low + (high - low) * draw[name]) * amount for name, (low, high) in POSE_LIMITS.items()}
    values["mouth"] = max(0.0, draw["mouth"] * 2 - 1) * amount
    values["lids"] = (-1.0 if draw["lids"] < 1 / 12 else (draw["lids"] - 0.5) * 0.9) * amount
    return Pose(**values)
