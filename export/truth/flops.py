"""Floating-point operations, counted on tensors that have shapes but no numbers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from ..networks import Network
from ..to_onnx import example


def flops_per_row(network: Network, module: nn.Module, units: Mapping[str, int]) -> int:
    """Operations of one row (a multiply-add is 2) at these unit sizes."""
    weights = {
        name: tensor.to("meta").float() if tensor.is_floating_point() else tensor.to("meta")
        for name, tensor in (*module.named_parameters(), *module.named_buffers())
    }
    inputs = [
        tensor.to("meta") for tensor in example(network.inputs, {**units, "rows": 1, "timesteps": 1}, torch.float32)
    ]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        functional_call(module, weights, tuple(tensor.to("meta") for tensor in inputs))
    return int(counter.get_total_flops())
