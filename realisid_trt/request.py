"""What a caller asks for and gets: Person, Request, Result. Everything is checked before any network runs."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .checks import finite, plain_number, whole
from .errors import RequestError
from .identity import Identity
from .photo import Photo

MAX_PERSONS = 8


class Omitted(enum.Enum):
    """The value of an argument that was not given, where None means something."""

    OMITTED = "the engine's default"


OMITTED = Omitted.OMITTED


@dataclass(frozen=True, eq=False)
class Person:
    """One person of a picture: who, where, and in what pose.

    Who, exactly one of
        photo:      a path, bytes, PIL image or (H, W, 3) uint8 array; or an Identity; or the path of a stored one.
        identity:   what `Engine.embed` returned.
        id_tokens:  (T, D) float array of your own; box and a pose must then be given.
    Where
        box:        x0, y0, x1, y1 in pixels of the output. None, for one person only: the photo is scaled to cover the
                    picture, centred, and the face stays where it is in the photo.
    Pose and expression, at most one of (none: those of the photo)
        pose:       another photo, or an Identity, whose landmarks are taken.
        landmarks:  (478, 2) floats in [0, 1] of the squared face box.
        pose_image: (3, H, W) floats in [0, 1], a drawing of your own at the size of the local canvas.
    Which
        face:       which face of the photo, counted from the left; None takes the only or the clearly largest one.
    """

    photo: Photo | Identity | None = None
    identity: Identity | None = None
    id_tokens: NDArray[Any] | None = None
    box: Sequence[float] | None = None
    pose: Photo | Identity | None = None
    landmarks: NDArray[Any] | None = None
    pose_image: NDArray[Any] | None = None
    face: int | None = None

    def __post_init__(self) -> None:
        who = [name for name in ("photo", "identity", "id_tokens") if getattr(self, name) is not None]
        if len(who) != 1:
            given = " and ".join(who) if who else "none of them"
            raise RequestError(f"Person needs exactly one of photo, identity and id_tokens; got {given}.")
        how = [name for name in ("pose", "landmarks", "pose_image") if getattr(self, name) is not None]
        if len(how) > 1:
            raise RequestError(f"Person takes at most one of pose, landmarks and pose_image; got {' and '.join(how)}.")
        if self.id_tokens is not None and (self.box is None or not how):
            raise RequestError(
                "Person(id_tokens=…) knows no photo: give box= and one of pose=, landmarks= and pose_image= too."
            )
        if self.identity is not None and not isinstance(self.identity, Identity):
            raise RequestError(
                f"identity is {type(self.identity).__name__}, expected what Engine.embed returned. "
                "A stored identity's path goes where the photo goes: Person('alice.safetensors', …)."
            )
        if self.face is not None and self.photo is None:
            raise RequestError("face= chooses among the faces of a photo; without a photo leave it out.")
        if self.box is not None and not isinstance(self.box, str):
            with suppress(TypeError):  # which is said when a picture is asked for
                object.__setattr__(self, "box", tuple(map(plain_number, self.box)))
        if self.face is not None:
            if (face := whole(self.face)) is None:
                raise RequestError(f"face is {self.face!r}, expected a whole number counted from the left, or None.")
            object.__setattr__(self, "face", face)


@dataclass(frozen=True, eq=False)
class Request:
    """One prompt with its persons. What is omitted takes the engine's default.

    prompt, negative_prompt: strings. negative_prompt None: zeros, if the checkpoint says so; "" is encoded.
    persons:    0 to 8; none is plain text-to-image.
    num_images: pictures of this request; picture j starts from the noise of seed + j.
    seed:       whole number from 0; None is drawn, and returned.
    latents:    (num_images, C, h, w) floats to start from instead of noise.
    guidance_scale, id_guidance_scale: λt and λi of Eq. (8).
    subject_conditioning_ratio: α of the delay in [0, 1]; None switches the delay off.
    local_scale, global_scale: factors of the branches' residuals.
    """

    prompt: str
    persons: Sequence[Person] = ()
    negative_prompt: str | None = None
    num_images: int = 1
    seed: int | None = None
    latents: NDArray[Any] | None = None
    guidance_scale: float | None = None
    id_guidance_scale: float | None = None
    subject_conditioning_ratio: float | None | Omitted = OMITTED
    local_scale: float = 1.0
    global_scale: float = 1.0

    def check(self) -> Request:
        """The request with its numbers as Python's own. Raises RequestError for an argument that cannot be meant."""
        if not isinstance(self.persons, Sequence) or not all(isinstance(person, Person) for person in self.persons):
            raise RequestError("persons is not a list of Person. Write [Person('alice.jpg', box=(…))].")
        if len(self.persons) > MAX_PERSONS:
            raise RequestError(f"{len(self.persons)} persons were asked for; an engine takes 0 to {MAX_PERSONS}.")
        num_images, seed = whole(self.num_images), whole(self.seed)
        if num_images is None or num_images < 1:
            raise RequestError(f"num_images is {self.num_images!r}, expected a whole number of at least 1.")
        if self.seed is not None and (seed is None or not 0 <= seed < 2**63):
            raise RequestError(f"seed is {self.seed!r}, expected a whole number from 0, or None to draw one.")
        numbers: dict[str, Any] = {"num_images": num_images, "seed": seed}
        for name in ("guidance_scale", "id_guidance_scale", "local_scale", "global_scale"):
            value = getattr(self, name)
            if value is None and name.endswith("guidance_scale"):
                continue
            numbers[name] = finite(value)
            if numbers[name] is None:
                raise RequestError(f"{name} is {value!r}, expected a finite number.")
        ratio = self.subject_conditioning_ratio
        if ratio is not None and ratio is not OMITTED:
            numbers["subject_conditioning_ratio"] = alpha = finite(ratio)
            if alpha is None or not 0 <= alpha <= 1:
                raise RequestError(
                    f"subject_conditioning_ratio is {ratio!r}, expected a number from 0 to 1, or None for no delay."
                )
        return replace(self, **numbers)


@dataclass(frozen=True, eq=False)
class PlacedPerson:
    """What became of one person.

    box:         x0, y0, x1, y1 of the squared and snapped box in the output, px.
    mask_source: what removed the photo's background: "bisenet", "hull+person", "hull" or "own"; None without a photo.
    notes:       what was decided about the photo, in sentences.
    """

    box: tuple[int, int, int, int]
    mask_source: str | None
    notes: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Result:
    """The pictures of one request.

    images:  PIL images, or (H, W, 3) float32 arrays in [0, 1] for output="np"; empty for output="latents".
    latents: (num_images, C, h, w) float32, the final z_0.
    seed:    of the first picture.
    persons: where everybody stands, and what was decided about the photos.
    timings: milliseconds of each stage of the whole batch; inside "denoise", of each network and kernel too,
              unless its steps were replayed as CUDA graphs.
    step_ms: milliseconds of each denoising step.
    rows:    rows that each network evaluated for the whole batch, counted by the backend.
    backend: which backend ran, on which device, in which precision.
    """

    images: list[Any]
    latents: NDArray[np.float32]
    seed: int
    persons: tuple[PlacedPerson, ...]
    timings: Mapping[str, float]
    step_ms: tuple[float, ...]
    rows: Mapping[str, int]
    backend: str
