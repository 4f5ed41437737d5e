"""Checks of numbers and arrays."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import NumericsError, RequestError


def whole(value: object) -> int | None:
    """The value as a Python int if it is a Python, NumPy or torch integer; None for anything else, such as True and
    1.0. Python's int does not overflow."""
    value = plain_number(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def finite(value: object) -> float | int | None:
    """The value as a Python number if it is a finite Python, NumPy or torch number; None for anything else: NaN,
    infinity, True, complex numbers and integers that no float can hold."""
    value = plain_number(value)
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return None
    try:
        return value if math.isfinite(value) else None
    except OverflowError:
        return None


def is_whole(value: object) -> bool:
    """True for Python, NumPy and torch integers; False for bool and float."""
    return whole(value) is not None


def is_finite(value: object) -> bool:
    """True for finite numbers of Python, NumPy and torch; False for bool."""
    return finite(value) is not None


def plain_number(value: Any) -> Any:
    """The value, unwrapped if it is a NumPy scalar, or an array or tensor without an axis."""
    return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value


def own_array(
    array: Any, shape: tuple[int, ...] | None, what: str, dtype: type[np.floating[Any]] = np.float32
) -> NDArray[Any]:
    """A row-major copy of a caller's array or tensor, in floats of `dtype`. shape: None accepts any.

    Raises RequestError for another shape, for NaN and for numbers that this type does not hold.
    """
    try:
        if hasattr(array, "detach"):  # a tensor of torch: on any device, with or without gradients, bfloat16 too
            array = array.detach().cpu()
            array = array.float() if array.element_size() < 4 else array
        if np.iscomplexobj(array):
            raise TypeError
        with np.errstate(over="ignore"):  # found below
            values = np.array(array, dtype, order="C")
    except (TypeError, ValueError, RuntimeError, OverflowError):
        expected = f" Expected shape {shape}." if shape is not None else ""
        raise RequestError(f"{what} is not an array of numbers.{expected}") from None
    if shape is None:
        shape = values.shape
    if values.shape != shape:
        raise RequestError(f"{what} has shape {values.shape}, expected {shape}.")
    if not np.isfinite(values).all():
        raise RequestError(f"{what} holds NaN or infinity. Give finite numbers.")
    return values


def check_finite(array: NDArray[np.float32], what: str) -> NDArray[np.float32]:
    """The array, a network's output. Raises NumericsError if it holds a NaN or an infinity."""
    if not np.isfinite(array).all():
        bad = int((~np.isfinite(array)).sum())
        raise NumericsError(
            f"{what} holds {bad} NaN or infinite of {array.size} values. In half precision this is an overflow: build "
            "without --fp16, or with a VAE made for it. In float32 check the checkpoint's weights and the scales."
        )
    return array


def device_name(device: object) -> str | None:
    """The name of a device that is given by name, as a torch.device, or not at all. Raises RequestError."""
    if hasattr(device, "type") and hasattr(device, "index"):  # a torch.device
        return str(device)
    if device is None or isinstance(device, str):
        return device
    raise RequestError(f"device is {device!r}, expected cpu, cpu:N, cuda, cuda:N or None.")
