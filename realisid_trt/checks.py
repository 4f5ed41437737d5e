"""What counts as a number, and an array without NaN."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import NumericsError, RequestError


def is_whole(value: object) -> bool:
    """A Python or NumPy integer; True and 1.0 are none."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def is_finite(value: object) -> bool:
    """A Python or NumPy number that a float can hold and that is neither NaN nor infinite; True is none."""
    try:
        return isinstance(value, (int, float, np.number)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def own_array(array: Any, shape: tuple[int, ...], what: str) -> NDArray[np.float32]:
    """A caller's array as float32, a copy in row-major order. Raises RequestError for another shape and for NaN."""
    try:
        values = np.array(array, np.float32, order="C")
    except (TypeError, ValueError):
        raise RequestError(f"{what} is not an array of numbers. Expected shape {shape}.") from None
    if values.shape != shape:
        raise RequestError(f"{what} has shape {values.shape}, expected {shape}.")
    if not np.isfinite(values).all():
        raise RequestError(f"{what} holds NaN or infinity. Give finite numbers.")
    return values


def check_finite(array: NDArray[np.float32], what: str) -> None:
    """Raises NumericsError if what a network computed holds a NaN or an infinity."""
    if not np.isfinite(array).all():
        bad = int((~np.isfinite(array)).sum())
        raise NumericsError(
            f"{what} holds {bad} NaN or infinite of {array.size} values. In half precision this is an overflow: build "
            "without --fp16, or with a VAE made for it. In float32 check the checkpoint's weights and the scales asked."
        )
