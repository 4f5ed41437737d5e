"""The timesteps and coefficients of DDIM with η = 0. Song et al. 2020, Eq. (12); diffusers' DDIMScheduler."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..checks import whole
from ..errors import RealisIDWarning, RequestError
from ..files import sha256
from ..manifest import Manifest

NOISE_SHA256 = "223696f5c8fcb092004df5f2ab0ceeb53c2d47ad4e5dd994f88e011a4ad6a90b"  # of 4096 numbers of seed 0


@dataclass(frozen=True, eq=False)
class DDIM:
    """The noise schedule of a checkpoint; constants come from the engine directory.

    alphas_cumprod:       (T,) float64, ᾱ of every training timestep.
    final_alpha_cumprod:  ᾱ before the first timestep.
    timestep_spacing:     "leading", "trailing" or "linspace".
    steps_offset:         added to the timesteps of "leading".
    prediction_type:      "epsilon" or "v_prediction".
    """

    alphas_cumprod: NDArray[np.float64]
    final_alpha_cumprod: float
    timestep_spacing: str
    steps_offset: int
    prediction_type: str

    @classmethod
    def of(cls, manifest: Manifest) -> DDIM:
        """The schedule of an engine."""
        return cls(alphas_cumprod=manifest.constants["alphas_cumprod"], **manifest.values["scheduler"])

    def timesteps(self, num_inference_steps: int) -> NDArray[np.int64]:
        """(S,) int64, from noise to picture: 958, 925, …, 34, 1 for SDXL's 30 steps. Raises RequestError."""
        train, steps = len(self.alphas_cumprod), whole(num_inference_steps)
        if steps is None or not 1 <= steps <= train:
            raise RequestError(
                f"num_inference_steps is {num_inference_steps!r}, expected 1 to {train}: the schedule has {train} "
                "timesteps."
            )
        timesteps: NDArray[Any]
        if self.timestep_spacing == "leading":
            timesteps = (np.arange(steps) * (train // steps))[::-1] + self.steps_offset
        elif self.timestep_spacing == "trailing":
            # for 61, 103, 121 and 59 other step counts arange gives one value more, −1; diffusers keeps it
            timesteps = np.round(np.arange(train, 0, -train / steps))[:steps] - 1
        else:
            timesteps = np.linspace(0, train - 1, steps).round()[::-1]
        if timesteps[0] >= train:
            raise RequestError(
                f"num_inference_steps is {steps}; with steps_offset {self.steps_offset} the first timestep would be "
                f"{timesteps[0]}, beyond the schedule's {train}. Use fewer steps."
            )
        return timesteps.astype(np.int64)

    def coefficients(self, num_inference_steps: int) -> NDArray[np.float64]:
        """(S, 2) float64, A and B of each step: z' = A·z + B·m, m the guided prediction.

        a = ᾱ_t, a' = ᾱ_prev
        ε-prediction: A = √(a'/a),  B = √(1-a') - A·√(1-a)
        v-prediction: A = √(a·a') + √((1-a)(1-a')),  B = √(a(1-a')) - √(a'(1-a))
        """
        timesteps = self.timesteps(num_inference_steps)
        previous = timesteps - len(self.alphas_cumprod) // len(timesteps)
        a = self.alphas_cumprod[timesteps]
        a_prev = np.where(previous >= 0, self.alphas_cumprod[previous.clip(0)], self.final_alpha_cumprod)
        if self.prediction_type == "v_prediction":
            scale = np.sqrt(a * a_prev) + np.sqrt((1 - a) * (1 - a_prev))
            shift = np.sqrt(a * (1 - a_prev)) - np.sqrt(a_prev * (1 - a))
        else:
            scale = np.sqrt(a_prev / a)
            shift = np.sqrt(1 - a_prev) - scale * np.sqrt(1 - a)
        return np.stack([scale, shift], axis=1)


def initial_noise(seed: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """(C, h, w) float32 standard normal in row-major order, from Philox(seed).

    The same on every machine and with every NumPy so far. NumPy guarantees Philox's words for ever, but not the normal
    numbers made of them (NEP 19). If it changes them, a RealisIDWarning reports it once.
    """
    _check_noise()
    return _normal(seed, shape)


def _normal(seed: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
    return np.random.Generator(np.random.Philox(seed)).standard_normal(shape, dtype=np.float32)


@cache
def _check_noise() -> None:
    if sha256(_normal(0, (4096,)).tobytes()) != NOISE_SHA256:
        warnings.warn(
            f"NumPy {np.__version__} draws other normal numbers than earlier ones: a seed now gives another picture. "
            "Install the NumPy that the earlier pictures were made with, or pass latents=.",
            RealisIDWarning,
            stacklevel=4,
        )
