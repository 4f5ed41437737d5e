"""Where the steps of a sampler begin and end: timesteps and noise levels. diffusers' `set_timesteps`, in float64."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..errors import RequestError

if TYPE_CHECKING:  # a manifest holds a config, and a config a Sampler
    from ..manifest import Manifest

SPACINGS = ("leading", "trailing", "linspace")
PREDICTIONS = ("epsilon", "v_prediction", "sample")
LEAST_ALPHA = 2.0**-24  # ᾱ of pure noise for samplers that step in σ = √((1 - ᾱ)/ᾱ); diffusers' value
RHO = 7.0  # Karras et al. 2022, Eq. (5)

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """The noise schedule of a checkpoint; constants come from the engine directory.

    alphas_cumprod:       (T,) float64, ᾱ of every training timestep, falling.
    final_alpha_cumprod:  ᾱ before the first timestep, where DDIM ends.
    timestep_spacing:     "leading", "trailing" or "linspace": of a sampler that does not say.
    steps_offset:         added to the timesteps of "leading".
    prediction_type:      what the UNet says: "epsilon", "v_prediction" or "sample", the clean latents.
    """

    alphas_cumprod: Array
    final_alpha_cumprod: float
    timestep_spacing: str
    steps_offset: int
    prediction_type: str

    def __post_init__(self) -> None:
        assert self.timestep_spacing in SPACINGS, self.timestep_spacing
        assert self.prediction_type in PREDICTIONS, self.prediction_type

    @classmethod
    def of(cls, manifest: Manifest) -> NoiseSchedule:
        """The schedule of an engine."""
        return cls(alphas_cumprod=manifest.constants["alphas_cumprod"], **manifest.values["scheduler"])

    @property
    def begins_in_noise(self) -> bool:
        """Whether the last timestep is noise alone, ᾱ = 0: "zero terminal SNR", Lin et al. 2023 (arXiv 2305.08891)."""
        return bool(self.alphas_cumprod[-1] == 0)

    @cached_property
    def sigmas(self) -> Array:
        """(T,) float64, σ = √((1 - ᾱ)/ᾱ) of every timestep, rising; finite for pure noise too."""
        alphas = self.alphas_cumprod
        if self.begins_in_noise:
            alphas = np.append(alphas[:-1], LEAST_ALPHA)
        return np.asarray(np.sqrt((1 - alphas) / alphas))

    def timesteps_at(self, sigmas: Array) -> Array:
        """The timesteps of noise levels σ, any shape: linear in ln σ between whole timesteps."""
        return np.asarray(np.interp(np.log(sigmas), np.log(self.sigmas), np.arange(len(self.sigmas))))


def spaced_timesteps(
    schedule: NoiseSchedule, steps: int, spacing: str, extra: int = 0, fractions: bool = False
) -> Array:
    """(S,) float64, from noise to picture. Raises RequestError for a first timestep beyond the schedule.

    extra:     1 divides the schedule into S + 1 parts and leaves the last one out, as DPM++ and UniPC do.
    fractions: leaves the timesteps of "linspace" as they are, as Euler and Heun do.
    """
    train = len(schedule.alphas_cumprod)
    timesteps: NDArray[Any]
    if spacing == "leading":
        timesteps = (np.arange(steps + extra) * (train // (steps + extra)))[::-1][:steps] + schedule.steps_offset
    elif spacing == "trailing":
        # for 61, 103, 121 and 59 other step counts arange gives one value more, −1; diffusers keeps it
        timesteps = np.round(np.arange(train, 0, -train / steps))[:steps] - 1
    else:
        timesteps = np.linspace(0, train - 1, steps + extra)[::-1][:steps]
        timesteps = timesteps if fractions else timesteps.round()
    if timesteps[0] >= train:
        raise RequestError(
            f"num_inference_steps is {steps}; with steps_offset {schedule.steps_offset} the first timestep would be "
            f"{timesteps[0]}, beyond the schedule's {train}. Use fewer steps."
        )
    return timesteps.astype(np.float64)


def distilled_timesteps(schedule: NoiseSchedule, steps: int, original_inference_steps: int) -> Array:
    """(S,) float64, of LCM and TCD: S of the timesteps of their distillation, evenly from the noisiest on.

    Luo et al. 2023 (arXiv 2310.04378), section 4.3: every k-th timestep, k = T // original_inference_steps.
    """
    interval = len(schedule.alphas_cumprod) // original_inference_steps
    known = (np.arange(1, original_inference_steps + 1) * interval - 1)[::-1]
    chosen = np.floor(np.linspace(0, original_inference_steps, steps, endpoint=False)).astype(int)
    return np.asarray(known[chosen], np.float64)


def sigmas_of(schedule: NoiseSchedule, timesteps: Array) -> Array:
    """(S + 1,) float64, σ at these timesteps (S,), and 0 at the end; linear in σ between whole timesteps."""
    found = np.interp(timesteps, np.arange(len(schedule.sigmas)), schedule.sigmas)
    return np.append(found, 0.0)


def karras_sigmas(highest: float, lowest: float, steps: int) -> Array:
    """(S + 1,) float64 between two noise levels, and 0 at the end. Karras et al. 2022 (arXiv 2206.00364), Eq. (5).

    σ_i = (σ_max^(1/ρ) + i/(S - 1)·(σ_min^(1/ρ) - σ_max^(1/ρ)))^ρ, ρ = 7
    """
    first, last = highest ** (1 / RHO), lowest ** (1 / RHO)
    return np.append((first + np.linspace(0, 1, steps) * (last - first)) ** RHO, 0.0)
