"""Face encoders with random weights whose batch norms do something, and small ones for tests."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from export.faces.arcface import Architecture, IResNet, IrSe

# Small, with every kind of block: the first one of a stage with and without a change of width, and a second one.
SMALL_SE = Architecture("small_se", True, (2, 1, 1, 1), (16, 16, 32, 32, 48))
SMALL = Architecture("small", False, (2, 1, 1, 1), (8, 8, 16, 16, 32))


def random_arcface(architecture: Architecture, seed: int = 0) -> IrSe | IResNet:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        module = architecture.module()
        for part in module.modules():
            if isinstance(part, (nn.BatchNorm2d, nn.BatchNorm1d)):
                assert part.running_mean is not None and part.running_var is not None
                part.running_mean.normal_(0, 0.3)
                part.running_var.uniform_(0.5, 2)
                part.weight.uniform_(0.5, 1.5)
                part.bias.normal_(0, 0.3)
            elif isinstance(part, nn.PReLU):
                part.weight.normal_(0.25, 0.1)
    return module.requires_grad_(False)


def save_as_published(module: nn.Module, file: Path, *, old: bool = False) -> None:
    """old: in torch's format before 1.6, as ir_se50's file is."""
    torch.save(module.state_dict(), file, _use_new_zipfile_serialization=not old)
