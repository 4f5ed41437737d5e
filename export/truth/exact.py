"""A module's output in float64, without a second copy of its weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@torch.no_grad()
def in_float64(module: nn.Module, inputs: Sequence[Tensor]) -> list[Tensor]:
    """The module's outputs in float64, computed from weights of any precision.

    Every layer that owns parameters is widened before it runs and narrowed back after it: one layer at a time, so a
    full-size network needs no more memory than its activations.
    """
    with _widened_layer_by_layer(module):
        outputs = module(*map(_widen, inputs))
    return list(outputs) if isinstance(outputs, tuple) else [outputs]


@contextmanager
def _widened_layer_by_layer(module: nn.Module) -> Iterator[None]:
    kept: dict[nn.Module, dict[str, Tensor]] = {}

    def before(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        kept[layer] = {name: tensor.data for name, tensor in _own(layer)}
        for _, tensor in _own(layer):
            tensor.data = _widen(tensor.data)
        return tuple(map(_widen, args)), {key: _widen(value) for key, value in kwargs.items()}

    def after(layer: nn.Module, args: Any, output: Any) -> None:
        narrow = kept.pop(layer)
        for name, tensor in _own(layer):
            tensor.data = narrow[name]

    handles = []
    for layer in module.modules():
        if any(True for _ in _own(layer)):
            handles.append(layer.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(layer.register_forward_hook(after))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _own(layer: nn.Module) -> list[tuple[str, Tensor]]:
    """The layer's own parameters and buffers, not its children's."""
    return [*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)]


def _widen(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
