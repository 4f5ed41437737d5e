"""Samplers by name. A sampler is a table: a few numbers for every step, which one kernel applies."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from ..checks import finite, whole
from ..errors import RequestError
from .first_order import ddim, euler, lcm, tcd
from .higher_order import dpmpp_2m, dpmpp_sde, heun, unipc
from .noise_levels import (
    SPACINGS,
    Array,
    NoiseSchedule,
    distilled_timesteps,
    karras_sigmas,
    sigmas_of,
    spaced_timesteps,
)
from .sampler_tables import Steps, Table

__all__ = ["NAMES", "NoiseSchedule", "Sampler", "table_of"]

ORIGINAL_INFERENCE_STEPS = 50  # of LCM's and TCD's distillation, as diffusers


class _Kind(NamedTuple):
    """A row of the table of samplers.

    table:   makes a Table of its steps.
    options: fields of a Sampler that it has.
    levels:  "listed": ᾱ of whole timesteps. "sigmas": its σ may lie between timesteps, and noise begins at its own σ
             unless the spacing is "leading". "multistep": σ of whole timesteps, one part of the schedule left out.
    karras:  whether there is a NAME-karras.
    eta:     default.
    """

    table: Callable[[Steps], Table]
    options: tuple[str, ...]
    levels: str
    karras: bool = False
    eta: float = 0.0


_LISTS = ("spacing", "timesteps")
_DISTILLED = ("timesteps", "original_inference_steps")
_KINDS = {
    "ddim": _Kind(ddim, ("spacing", "eta"), "listed"),
    "euler": _Kind(euler, _LISTS, "sigmas", karras=True),
    "euler-a": _Kind(partial(euler, ancestral=True), _LISTS, "sigmas"),
    "heun": _Kind(heun, _LISTS, "sigmas", karras=True),
    "dpmpp-2m": _Kind(dpmpp_2m, _LISTS, "multistep", karras=True),
    "dpmpp-2m-sde": _Kind(partial(dpmpp_2m, sde=True), _LISTS, "multistep", karras=True),
    "dpmpp-sde": _Kind(dpmpp_sde, _LISTS, "sigmas", karras=True),
    "unipc": _Kind(unipc, _LISTS, "multistep", karras=True),
    "lcm": _Kind(lcm, _DISTILLED, "listed"),
    "tcd": _Kind(tcd, (*_DISTILLED, "eta"), "listed", eta=0.3),
}
_KARRAS = "-karras"
NAMES = (*_KINDS, *(name + _KARRAS for name, kind in _KINDS.items() if kind.karras))

_MANY_HISTORIES = "it keeps three or more past predictions, and a step here keeps two; dpmpp-2m does with one"
_WRONG_SIGN = "diffusers, which samplers here are compared with, has a coefficient of it with the wrong sign"
_ADAPTIVE = "the number of its steps depends on the picture, and steps here are planned before the first"
_NO_CLIPPING = "a step is linear in the prediction and cannot clip it"
_NO_CHURN = "noise is added to the latents after a step, and not to what the network reads"
_REFUSED_NAMES = {
    "dpmpp-3m-sde": _WRONG_SIGN, "dpm-adaptive": _ADAPTIVE, "pndm": _MANY_HISTORIES, "plms": _MANY_HISTORIES,
    "lms": _MANY_HISTORIES, "deis": _MANY_HISTORIES, "ipndm": _MANY_HISTORIES,
}  # fmt: skip
_REFUSED_OPTIONS = {"clip_sample": _NO_CLIPPING, "thresholding": _NO_CLIPPING, "s_churn": _NO_CHURN}


@dataclass(frozen=True)
class Sampler:
    """How pictures are sampled. A name is enough: what is None is the checkpoint's, or else diffusers' default.

    name:      ddim, euler, euler-a, heun, dpmpp-2m, dpmpp-2m-sde, dpmpp-sde, unipc, lcm or tcd; with Karras' noise
               levels euler-karras, heun-karras, dpmpp-2m-karras, dpmpp-2m-sde-karras, dpmpp-sde-karras, unipc-karras.
               S steps of heun and dpmpp-sde are 2·S - 1 evaluations of the networks, of the others S.
    spacing:   of the timesteps: "leading", "trailing" or "linspace"; None: the checkpoint's. Not of lcm and tcd; with
               Karras only of euler, heun and dpmpp-sde.
    eta:       of ddim: the share of fresh noise in [0, 1], default 0. Of tcd: γ in [0, 1], default 0.3.
    timesteps: the timesteps themselves, from noise to picture, one for each step: of distilled weights, or a published
               list. Whole numbers; of euler, euler-a, heun and dpmpp-sde also fractions. Not of ddim, not with Karras.
    original_inference_steps: of lcm and tcd: how many timesteps their distillation knew, default 50.

    Raises RequestError for an unknown name, an option that the sampler does not have, or an impossible value.
    """

    name: str
    spacing: str | None = None
    eta: float | None = None
    timesteps: Sequence[float] | None = None
    original_inference_steps: int | None = None

    @classmethod
    def of(cls, value: str | Mapping[str, Any] | Sampler) -> Sampler:
        """A Sampler of a name, of a dict of the fields (as in a config), or as it is. Raises RequestError."""
        if isinstance(value, Sampler):
            return value
        if isinstance(value, str):
            return cls(value)
        if not isinstance(value, Mapping) or "name" not in value:
            raise RequestError(
                f"sampler is {value!r}, expected a name, a Sampler, or a dict with a name. Names: {', '.join(NAMES)}."
            )
        known = [field.name for field in dataclasses.fields(cls)]
        for key in value:
            if key in _REFUSED_OPTIONS:
                raise RequestError(f"sampler: {key} is not offered: {_REFUSED_OPTIONS[key]}. Leave it out.")
            if key not in known:
                raise RequestError(f"sampler: unknown key {key!r}. Known keys: {', '.join(known)}.")
        return cls(**value)

    def to_json(self) -> str | dict[str, Any]:
        """As a config holds it: the name, or a dict of the fields that are given. `of` reads it."""
        given = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        if self.timesteps is not None:
            given["timesteps"] = list(self.timesteps)
        return given if len(given) > 1 else self.name

    def __post_init__(self) -> None:
        self._check_name()
        for option in ("spacing", "eta", "timesteps", "original_inference_steps"):
            if getattr(self, option) is not None and not self.has(option):
                having = [name for name in NAMES if option in _options_of(name)]
                known = f"; it has {', '.join(self._options)}" if self._options else ""
                raise RequestError(
                    f"{self.name} has no {option}{known}. Leave it out, or take a sampler that has it: "
                    f"{', '.join(having)}."
                )
        if self.spacing not in (None, *SPACINGS):
            raise RequestError(f"spacing is {self.spacing!r}, expected one of {', '.join(SPACINGS)}.")
        checked = {
            "eta": self._checked_eta(),
            "timesteps": self._checked_timesteps(),
            "original_inference_steps": self._checked_original(),
        }
        for option, value in checked.items():  # plain Python numbers
            object.__setattr__(self, option, value)
        for option in ("spacing", "original_inference_steps"):
            if self.timesteps is not None and getattr(self, option) is not None:
                raise RequestError(f"timesteps and {option} are both given, and each says which timesteps. Give one.")

    def has(self, option: str) -> bool:
        """Whether the sampler has this option: a field of this class."""
        return option in self._options

    @property
    def _kind(self) -> _Kind:
        return _KINDS[self.name.removesuffix(_KARRAS)]

    @property
    def _karras(self) -> bool:
        return self.name.endswith(_KARRAS)

    @property
    def _options(self) -> tuple[str, ...]:
        return _options_of(self.name)

    def _check_name(self) -> None:
        if self.name in NAMES:
            return
        said = f"sampler is {self.name!r}, expected one of {', '.join(NAMES)}."
        plain = self.name.removesuffix(_KARRAS) if isinstance(self.name, str) else ""
        if reason := _REFUSED_NAMES.get(plain):
            said = f"{plain} is not offered: {reason}. Take one of {', '.join(NAMES)}."
        elif plain in _KINDS:
            said = f"{plain} has no Karras noise levels. Write {plain!r}, or take one of {', '.join(NAMES)}."
        raise RequestError(said)

    def _checked_eta(self) -> float | None:
        eta = finite(self.eta)
        if self.eta is not None and (eta is None or not 0 <= eta <= 1):
            raise RequestError(f"eta is {self.eta!r}, expected a number from 0 to 1.")
        return None if eta is None else float(eta)

    def _checked_timesteps(self) -> tuple[float, ...] | None:
        if self.timesteps is None:
            return None
        given = np.asarray(self.timesteps, object)
        numbers = [finite(value) for value in given] if given.ndim == 1 and not isinstance(self.timesteps, str) else []
        timesteps = tuple(number for number in numbers if number is not None and number >= 0)
        if not timesteps or len(timesteps) < len(given):
            raise RequestError(
                f"timesteps is {self.timesteps!r}, expected numbers from 0 on, such as (999, 749, 499, 249)."
            )
        if any(later >= earlier for earlier, later in zip(timesteps, timesteps[1:], strict=False)):
            raise RequestError(
                f"timesteps is {_listed(timesteps)}, expected a falling list without duplicates, from noise to picture."
            )
        if self._kind.levels != "sigmas" and any(number != int(number) for number in timesteps):
            raise RequestError(f"timesteps is {_listed(timesteps)}, and {self.name} takes whole numbers only.")
        return timesteps

    def _checked_original(self) -> int | None:
        original = whole(self.original_inference_steps)
        if self.original_inference_steps is not None and (original is None or original < 1):
            raise RequestError(
                f"original_inference_steps is {self.original_inference_steps!r}, expected a whole number of at least 1."
            )
        return original


def table_of(
    sampler: str | Mapping[str, Any] | Sampler, schedule: NoiseSchedule, num_inference_steps: int, start: int = 0
) -> Table:
    """The table of a sampler on a checkpoint's noise schedule.

    start: the first step that is taken, 0 to S - 1, for a picture that does not start from noise. The steps before it
           are left out; everything that counts steps (spacing, the last step) counts those of the whole schedule.

    Raises RequestError for a number of steps that the sampler does not have, for timesteps beyond the schedule, and for
    what a schedule that begins in pure noise does not allow.
    """
    sampler = Sampler.of(sampler)
    return sampler._kind.table(_steps_of(sampler, schedule, num_inference_steps, start))


def _options_of(name: str) -> tuple[str, ...]:
    kind = _KINDS[name.removesuffix(_KARRAS)]
    if name.endswith(_KARRAS):
        return () if kind.levels == "multistep" else ("spacing",)
    return kind.options


def _steps_of(sampler: Sampler, schedule: NoiseSchedule, num_inference_steps: int, start: int) -> Steps:
    steps = _checked_steps(sampler, schedule, num_inference_steps)
    first = whole(start)
    if first is None or not 0 <= first < steps:
        raise RequestError(f"start is {start!r}, expected 0 to {steps - 1}: {steps} steps were asked for.")
    kind = sampler._kind
    spacing = sampler.spacing or schedule.timestep_spacing
    timesteps, sigmas = _levels(sampler, schedule, steps, spacing)
    if schedule.begins_in_noise:
        _check_pure_noise(sampler, schedule, timesteps)
    if kind.levels != "listed" and not (np.diff(sigmas) < 0).all():
        raise RequestError(
            f"num_inference_steps is {steps}: with {sampler.name} and {spacing} spacing two steps would begin at the "
            "same noise level. Use fewer steps, or another spacing."
        )
    at_sigma = kind.levels == "sigmas" and spacing != "leading"  # init_noise_sigma of diffusers
    init = float(sigmas[0] / np.sqrt(1 + sigmas[0] ** 2)) if at_sigma else 1.0
    eta = kind.eta if sampler.eta is None else sampler.eta
    return Steps(sampler.name, schedule, timesteps, sigmas, first, eta, init)


def _checked_steps(sampler: Sampler, schedule: NoiseSchedule, num_inference_steps: int) -> int:
    """The number of steps; timesteps of one's own fit it and the schedule."""
    train, steps = len(schedule.alphas_cumprod), whole(num_inference_steps)
    if steps is None or not 1 <= steps <= train:
        raise RequestError(
            f"num_inference_steps is {num_inference_steps!r}, expected 1 to {train}: the schedule has {train} "
            "timesteps."
        )
    if sampler.timesteps is not None:
        if len(sampler.timesteps) != steps:
            raise RequestError(
                f"num_inference_steps is {steps}, and the sampler has {len(sampler.timesteps)} timesteps: "
                f"{_listed(sampler.timesteps)}. Ask for {len(sampler.timesteps)} steps, or give {steps} timesteps."
            )
        if sampler.timesteps[0] > train - 1:
            raise RequestError(
                f"timesteps begins with {sampler.timesteps[0]}, expected at most {train - 1}: the schedule has {train} "
                "timesteps."
            )
    return steps


def _levels(sampler: Sampler, schedule: NoiseSchedule, steps: int, spacing: str) -> tuple[Array, Array]:
    """timesteps (S,) and σ (S + 1,). Raises RequestError."""
    kind = sampler._kind
    multistep = kind.levels == "multistep"
    if sampler._karras and multistep:  # from end to end of the schedule
        sigmas = karras_sigmas(float(schedule.sigmas[-1]), float(schedule.sigmas[0]), steps)
        return schedule.timesteps_at(sigmas[:-1]).round(), sigmas
    if sampler.timesteps is not None:
        timesteps = np.array(sampler.timesteps, np.float64)
    elif "original_inference_steps" in kind.options:
        timesteps = distilled_timesteps(schedule, steps, _original_steps(sampler, schedule, steps))
    else:
        timesteps = spaced_timesteps(schedule, steps, spacing, int(multistep), kind.levels == "sigmas")
    sigmas = sigmas_of(schedule, timesteps)
    if sampler._karras:  # from end to end of the list
        sigmas = karras_sigmas(float(sigmas[0]), float(sigmas[-2]), steps)
        timesteps = schedule.timesteps_at(sigmas[:-1])
    return timesteps, sigmas


def _original_steps(sampler: Sampler, schedule: NoiseSchedule, steps: int) -> int:
    train, original = len(schedule.alphas_cumprod), sampler.original_inference_steps or ORIGINAL_INFERENCE_STEPS
    if original > train:
        raise RequestError(
            f"original_inference_steps is {original}, expected at most {train}: the schedule has {train} timesteps."
        )
    if steps > original:
        raise RequestError(
            f"num_inference_steps is {steps}; {sampler.name} takes its steps from the {original} timesteps of its "
            f"distillation (original_inference_steps). Ask for at most {original} steps."
        )
    return original


def _check_pure_noise(sampler: Sampler, schedule: NoiseSchedule, timesteps: Array) -> None:
    """Raises RequestError for what does not go with ᾱ = 0 at the last timestep."""
    said = "This checkpoint's noise schedule begins in pure noise (zero terminal SNR)"
    if schedule.prediction_type == "epsilon":
        raise RequestError(
            f"{said}, where its epsilon prediction says nothing of the picture. Such a schedule needs a v_prediction "
            "model: correct scheduler/ of the checkpoint."
        )
    if sampler.name.startswith("heun"):
        raise RequestError(
            f"{said}, from where {sampler.name} would take a first step of unlimited length. Take another sampler, "
            "such as dpmpp-2m."
        )
    last = len(schedule.alphas_cumprod) - 1
    if round(timesteps[0]) < last and sampler.name != "ddim":  # a checkpoint without the key `sampler` may
        spaced = sampler.timesteps is None and sampler.has("spacing")
        advice = f'Take {sampler.name} with spacing "trailing"' if spaced else f"Give timesteps from {last} on"
        raise RequestError(f"{said}, at timestep {last}, and the first step would be at {timesteps[0]:g}. {advice}.")


def _listed(timesteps: Sequence[float]) -> str:
    return ", ".join(f"{number:g}" for number in timesteps)
