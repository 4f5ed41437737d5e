"""The rows of every sampler: what a step makes of latents, prediction, histories and noise, as a few numbers.

α = √ᾱ, s = √(1 - ᾱ), σ = s/α are of a row's level; a prime (') is the level that the row goes to. Latents are
z = α·z0 + s·ε for every sampler, as the network was trained. Samplers that are published for x = z/α (Euler, Heun,
k-diffusion) are multiplied by α once. Of the guided prediction m two linear readings are used:

    prediction     d, the clean latents    e, the noise
    epsilon        (z - s·m)/α             m
    v_prediction   α·z - s·m               s·z + α·m
    sample         m                       (z - α·m)/s
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .noise_levels import Array, NoiseSchedule

Z, M, H1, H2, NOISE = np.eye(5)  # the columns of a table
NO_ROW = np.zeros(5)


@dataclass(frozen=True, eq=False)
class Table:
    """A sampler as numbers: R evaluations of the network, in S steps.

        [z'; h1'; h2'; d] = matrix[r] · [z; m; h1; h2; noise]      cell by cell, m the guided prediction

    timesteps: (R,) float64, what the time networks read; with fractions where the sampler has them.
    matrix:    (R, 4, 5) float64. Rows: the next latents, the next histories, and the prediction of the clean latents,
               for previews. Columns as above. Histories begin as zeros; unused rows and columns are zeros.
    histories: how many the table uses, 0 to 2.
    step_of:   (R,) int64, the step of S to which each row belongs; the first is `start`.
    row_of:    (R,) int64, the number of each row in the table of the whole schedule: of its noise, `step_noise`.
    init:      z_T = init·noise, for a picture that starts from noise.
    levels:    (R + 1,) float64, ᾱ before each row and after the last. A picture to start from is mixed at the first.
    blend:     (R, 2) float64: cells that keep a given picture are blend[r, 0]·z0 + blend[r, 1]·noise after row r.
    name:      of the sampler.

    Requests use neither a late start nor `blend` yet: they are for pictures to start from.
    """

    timesteps: Array
    matrix: Array
    histories: int
    step_of: NDArray[np.int64]
    row_of: NDArray[np.int64]
    init: float
    levels: Array
    blend: Array
    name: str

    @property
    def description(self) -> str:
        """Its name and its steps, such as "heun, 12 steps of 23 evaluations"."""
        taken = len(set(self.step_of.tolist()))
        evaluations = "" if taken == len(self.step_of) else f" of {len(self.step_of)} evaluations"
        return f"{self.name}, {taken} step{'s' * (taken != 1)}{evaluations}"

    @property
    def num_inference_steps(self) -> int:
        """S, of the whole schedule."""
        return int(self.step_of[-1]) + 1

    @property
    def sigmas(self) -> Array:
        """(R,) float64, σ = √((1 - ᾱ)/ᾱ) before each row; infinite for pure noise."""
        with np.errstate(divide="ignore"):
            return np.asarray(np.sqrt((1 - self.levels[:-1]) / self.levels[:-1]))

    @property
    def draws(self) -> NDArray[np.bool_]:
        """(R,) whether each row adds noise; noise of other rows is not drawn."""
        return np.asarray(self.matrix[:, 0, 4] != 0)


@dataclass(frozen=True, eq=False)
class Steps:
    """S steps, before a sampler makes rows of them.

    name:      of the sampler.
    schedule:  of the checkpoint. DDIM, LCM and TCD read its ᾱ at `timesteps`; the others go through `sigmas`.
    timesteps: (S,) float64, falling. sigmas: (S + 1,) float64, falling to 0.
    start:     the first step that is taken.
    eta:       η of DDIM, γ of TCD.
    init:      of the table.
    """

    name: str
    schedule: NoiseSchedule
    timesteps: Array
    sigmas: Array
    start: int
    eta: float
    init: float

    @property
    def taken(self) -> range:
        return range(self.start, len(self.timesteps))


def clean(prediction: str, alpha: Array, s: Array) -> Array:
    """(..., 5): d, the prediction of the clean latents, in columns. alpha, s: (...)."""
    if prediction == "epsilon":
        return np.asarray(columns_of(1 / alpha, Z) - columns_of(s / alpha, M))
    if prediction == "v_prediction":
        return np.asarray(columns_of(alpha, Z) - columns_of(s, M))
    return columns_of(np.ones_like(alpha), M)


def predicted_noise(prediction: str, alpha: Array, s: Array) -> Array:
    """(..., 5): e, the prediction of the noise, in columns. alpha, s: (...)."""
    if prediction == "epsilon":
        return columns_of(np.ones_like(alpha), M)
    if prediction == "v_prediction":
        return np.asarray(columns_of(s, Z) + columns_of(alpha, M))
    return np.asarray(columns_of(1 / s, Z) - columns_of(alpha / s, M))


def columns_of(numbers: Array, column: Array) -> Array:
    return np.asarray(np.multiply.outer(numbers, column))


def of_sigmas(sigmas: Array | float) -> tuple[Array, Array]:
    """α = 1/√(1 + σ²) and s = σ·α."""
    alpha = 1 / np.sqrt(1 + np.square(sigmas))
    return alpha, sigmas * alpha


def blend_of(next_levels: Array) -> Array:
    """(R, 2): of ᾱ after each row; after the last one cells have the given picture itself."""
    blend = np.stack([np.sqrt(next_levels), np.sqrt(1 - next_levels)], axis=1)
    blend[-1] = 1, 0
    return blend
