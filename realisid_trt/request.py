"""Request, its options, and Result. A request is checked before any network runs."""

from __future__ import annotations

import enum
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from .checks import finite, whole
from .errors import RequestError
from .loop.samplers import Sampler
from .persons.person import Person, PlacedPerson
from .persons.photo import Photo

MAX_PERSONS = 8


class Omitted(enum.Enum):
    """Sentinel: argument not given, where None is a valid value."""

    OMITTED = "the engine's default"


OMITTED = Omitted.OMITTED


@dataclass(frozen=True, eq=False)
class Control:
    """What a request says about one branch of the engine. Omitted fields take the defaults of the engine's table.

    image: what the branch is shown: a path, bytes, PIL image, (H, W, 3) uint8 array or (C, H, W) floats in [0, 1], in
           the aspect of the picture.
    scale: factor of its residuals; 0 leaves it out.
    start, end: it takes part in step i of S unless i/S < start or (i + 1)/S > end.
    """

    image: Photo | NDArray[Any] | None = None
    scale: float | None = None
    start: float | None = None
    end: float | None = None


@dataclass(frozen=True, eq=False)
class Request:
    """One prompt with its persons. Omitted fields take the engine's defaults.

    prompt, negative_prompt: strings. negative_prompt None: zeros, if the checkpoint says so; "" is encoded.
    persons:    0 to 8; none is plain text-to-image.
    num_images: pictures of this request; picture j starts from the noise of seed + j.
    seed:       whole number from 0; None: drawn, and returned in the Result.
    latents:    (num_images, C, h, w) floats in the place of the seed's standard normal noise.
    guidance_scale, id_guidance_scale: λt and λi of Eq. (8).
    subject_conditioning_ratio: α of the delay in [0, 1]; None switches the delay off.
    guidance_interval: (low, high] in noise levels σ = √((1 - ᾱ)/ᾱ), such as (0.28, 5.42) or (0.28, math.inf): steps
                outside of it have no guidance, λt = λi = 1, and cost one row. None guides every step.
    controls:   name of a branch → Control. `inspect` shows the names that an engine has.
    local_scale, global_scale: the same as controls={"local": Control(scale=…), "global": Control(scale=…)}.
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
    guidance_interval: tuple[float, float] | None = None
    controls: Mapping[str, Control] | None = None
    local_scale: float | None = None
    global_scale: float | None = None

    def check(self) -> Request:
        """The request with plain Python numbers. Raises RequestError for an impossible argument."""
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
            if value is None:
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
        numbers["guidance_interval"] = self._checked_interval()
        numbers |= {"local_scale": None, "global_scale": None}  # in controls from now on
        return replace(self, **(numbers | {"controls": self._checked_controls()}))

    def _checked_interval(self) -> tuple[float, float] | None:
        if self.guidance_interval is None:
            return None
        given: Any = self.guidance_interval
        pair = list(given) if isinstance(given, (Sequence, np.ndarray)) and not isinstance(given, str) else []
        if len(pair) == 2:
            low, high = finite(pair[0]), math.inf if pair[1] == math.inf else finite(pair[1])
            if low is not None and high is not None and 0 <= low < high:
                return low, high
        raise RequestError(
            f"guidance_interval is {given!r}, expected two noise levels σ, 0 <= low < high, such as (0.28, 5.42)."
        )

    def _checked_controls(self) -> dict[str, Control]:
        """`controls` with plain numbers, the scales of the aliases among them."""
        given = {} if self.controls is None else self.controls
        if not isinstance(given, Mapping) or not all(isinstance(control, Control) for control in given.values()):
            raise RequestError('controls is not a dict of Control. Write {"openpose": Control("pose.png")}.')
        controls = {}
        for name, control in given.items():
            numbers = {key: getattr(control, key) for key in ("scale", "start", "end")}
            for key, value in numbers.items():
                if value is not None and (number := finite(value)) is None:
                    raise RequestError(f"{key} of the control {name} is {value!r}, expected a finite number.")
                numbers[key] = None if value is None else number
            controls[name] = replace(control, **numbers)
        for name in ("local", "global"):
            if (scale := finite(getattr(self, f"{name}_scale"))) is not None:
                if controls.get(name, Control()).scale is not None:
                    raise RequestError(
                        f'{name}_scale and the scale of controls["{name}"] are both given. They are the same: give one.'
                    )
                controls[name] = replace(controls.get(name, Control()), scale=scale)
        return controls


class RequestOptions(TypedDict, total=False):
    """The keywords of `Engine.generate` for its Request: all of its fields but prompt and persons."""

    negative_prompt: str | None
    num_images: int
    seed: int | None
    latents: NDArray[Any] | None
    guidance_scale: float | None
    id_guidance_scale: float | None
    subject_conditioning_ratio: float | None | Omitted
    guidance_interval: tuple[float, float] | None
    controls: Mapping[str, Control] | None
    local_scale: float | None
    global_scale: float | None


Progress = Callable[[int, int], object]


class BatchOptions(TypedDict, total=False):
    """Options that all pictures of a batch share. See `Engine.generate_batch`."""

    num_inference_steps: int | None
    sampler: str | Mapping[str, Any] | Sampler | None
    height: int | None
    width: int | None
    output: str
    progress: Progress | None


class GenerateOptions(RequestOptions, BatchOptions, total=False):
    """The keywords of `Engine.generate`."""


def check_output(output: object) -> None:
    """Raises RequestError for an unknown kind of pictures."""
    if output not in ("pil", "np", "latents"):
        raise RequestError(f'output is {output!r}, expected "pil", "np" or "latents".')


def check_request(request: object) -> None:
    """Raises RequestError for what is not a Request."""
    if not isinstance(request, Request):
        raise RequestError(f"{request!r:.200} is not a Request. Write Request('…', [Person(…)]).")


def check_batch(requests: object, output: object, errors: object) -> None:
    """Raises RequestError for arguments of `Engine.generate_batch` that are of no use."""
    check_output(output)
    if errors not in ("raise", "return"):
        raise RequestError(f'errors is {errors!r}, expected "raise" or "return".')
    if not isinstance(requests, Sequence) or not requests or not all(isinstance(r, Request) for r in requests):
        raise RequestError("requests is empty or not a list of Request. Write [Request('…', [Person(…)]), …].")


def spelled_out(generate: Callable[..., Any], generate_batch: Callable[..., Any]) -> inspect.Signature:
    """The signature of `Engine.generate` with every keyword and its default: for `help`, `inspect` and notebooks."""
    signature = inspect.signature(generate)
    fields, common = inspect.signature(Request).parameters, inspect.signature(generate_batch).parameters
    named = [fields[name] for name in fields if name in RequestOptions.__optional_keys__]
    named += [common[name] for name in common if name in BatchOptions.__optional_keys__]
    first = [parameter for name, parameter in signature.parameters.items() if name != "options"]
    return signature.replace(parameters=[*first, *(each.replace(kind=each.KEYWORD_ONLY) for each in named)])


@dataclass(frozen=True, eq=False)
class Result:
    """The pictures of one request.

    images:  PIL images, or (H, W, 3) float32 arrays in [0, 1] for output="np"; empty for output="latents".
    latents: (num_images, C, h, w) float32, the final z_0.
    seed:    of the first picture.
    persons: the place of each person, and notes on the photos.
    timings: milliseconds of each stage ("persons": of the whole batch's search for faces too). "denoise" is the sum of
             `step_ms`; inside it, of each network and kernel, unless its steps were replayed as CUDA graphs.
    step_ms: milliseconds of each evaluation of the networks, of all requests that took it together. A step of heun or
             dpmpp-sde has two, but for the last.
    rows:    rows that each network evaluated for this request.
    backend: which backend ran, on which device, in which precision.
    sampler: its name, and how many steps it took.
    notes:   decisions about the pictures in `controls`, and what is unusual about the steps, in sentences.
    """

    images: list[Any]
    latents: NDArray[np.float32]
    seed: int
    persons: tuple[PlacedPerson, ...]
    timings: Mapping[str, float]
    step_ms: tuple[float, ...]
    rows: Mapping[str, int]
    backend: str
    sampler: str
    notes: tuple[str, ...] = ()
