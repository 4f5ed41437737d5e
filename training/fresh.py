"""Parts of a checkpoint with new weights: the libraries' own initialisation."""

from __future__ import annotations

import zlib

import torch
from torch import nn

from export.checkpoint import Checkpoint
from export.checkpoint.classes import diffusers_kind, module_class, quiet
from export.checkpoint.id_projection import build_projection


def fresh(checkpoint: Checkpoint, component: str, seed: int) -> nn.Module:
    """The component's class and config with weights that a training starts from; the same seed, the same weights."""
    found = checkpoint.components[component]
    with quiet():  # it keeps the state of torch's random numbers
        torch.manual_seed((seed << 32) + zlib.crc32(component.encode()))
        if component == "id_projection":
            return build_projection(found.config)
        kind = module_class(found.class_name)
        if diffusers_kind(component) is not None:
            made: nn.Module = kind.from_config(dict(found.config))
        else:
            made = kind(kind.config_class(**found.config))
    return made
