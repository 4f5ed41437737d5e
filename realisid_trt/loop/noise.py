"""The noise of a seed, the same on every machine: where a picture starts, and what its steps add."""

from __future__ import annotations

import warnings
from functools import cache

import numpy as np
from numpy.typing import NDArray

from ..errors import RealisIDWarning
from ..files import sha256

NOISE_SHA256 = "223696f5c8fcb092004df5f2ab0ceeb53c2d47ad4e5dd994f88e011a4ad6a90b"  # of 4096 numbers of seed 0


def initial_noise(seed: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """(C, h, w) float32 standard normal in row-major order, from Philox(seed).

    The same on every machine and with every NumPy so far. NumPy guarantees Philox's words for ever, but not the normal
    numbers made of them (NEP 19). If it changes them, a RealisIDWarning reports it once.
    """
    _check_noise()
    return _normal(np.random.Philox(seed), shape)


def step_noise(seed: int, row: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """(C, h, w) float32 standard normal: the noise that one row of a sampler's table adds to one picture.

    seed: of the picture, as for `initial_noise`.
    row:  the row's number in the table of the whole schedule, from 0: of `Table.row_of`.

    Philox is a counter (Salmon et al. 2011). `jumped(k)` moves it on by k·2^128 draws, so streams of different rows and
    the initial noise have no draw in common. A row has its noise from its number alone: a picture that starts late, or
    shares its steps with other pictures, gets the same noise. A RealisIDWarning reports once that NumPy has changed.
    """
    _check_noise()
    return _normal(np.random.Philox(seed).jumped(1 + int(row)), shape)  # Python's int: NumPy's overflows in there


def _normal(stream: np.random.Philox, shape: tuple[int, ...]) -> NDArray[np.float32]:
    return np.random.Generator(stream).standard_normal(shape, dtype=np.float32)


@cache
def _check_noise() -> None:
    if sha256(_normal(np.random.Philox(0), (4096,)).tobytes()) != NOISE_SHA256:
        warnings.warn(
            f"NumPy {np.__version__} draws other normal numbers than earlier ones: a seed now gives another picture. "
            "Install the NumPy that the earlier pictures were made with, or pass latents=.",
            RealisIDWarning,
            stacklevel=4,
        )
