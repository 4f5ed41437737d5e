"""ID-Patch as it is published, small and of random numbers: ControlNetModel/, id-patch.bin and face encoders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from export.checkpoint.id_projection import Resampler
from tests.export.adopt.published import card, random_net, save
from tests.export.checkpoint.encoders import random_encoder

FOLDER, PICKLE = "ID-Patch", "ID-Patch/id-patch.bin"
SIZES: dict[str, dict[str, Any]] = {  # the UNet of published.py reads tokens of 64 numbers; patches of 16 px
    "prompt_proj": {"num_queries": 4, "output_dim": 64},
    "patch_proj": {"num_queries": 3, "output_dim": 256},
}


def random_resampler(name: str, seed: int, **changes: Any) -> Resampler:
    sizes = {"dim": 64, "depth": 2, "dim_head": 64, "heads": 2, "embedding_dim": 512, "ff_mult": 4}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = Resampler(**{**sizes, **SIZES[name], **changes})
        for parameter in module.parameters():
            parameter.data.normal_(std=0.1)
    return module


def make_idpatch(folder: Path) -> None:
    """ID-Patch/, and beside it arcface.onnx."""
    save(random_net("sdxl", 11), folder / FOLDER / "ControlNetModel")
    weights = {name: random_resampler(name, seed).state_dict() for seed, name in enumerate(SIZES)}
    torch.save({name: dict(values) for name, values in weights.items()}, folder / PICKLE)
    card(folder / FOLDER, "license: openrail++")
    (folder / "arcface.onnx").write_bytes(random_encoder().SerializeToString())
