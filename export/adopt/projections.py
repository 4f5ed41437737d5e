"""`id-patch.bin` of ID-Patch: two resamplers, an embedding → ID tokens, and an embedding → a patch."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from realisid_trt.errors import CheckpointError

from ..checkpoint.classes import compare
from ..checkpoint.files import readable
from ..checkpoint.id_checks import PATCH_COLOURS
from ..checkpoint.id_projection import build_projection
from .pickles import load_pickle, tensors_of

PARTS = {"prompt_proj": "id_projection", "patch_proj": "id_patch_projection"}  # in the file → in a checkpoint
HEAD = 64  # width of a head; the weights do not say it
ADVICE = "Get the file again from where ID-Patch is published (ByteDance/ID-Patch)."
LATENTS, INPUT, OUTPUT = "latents", "proj_in.weight", "proj_out.weight"
QUERY, WIDENED = "layers.0.0.to_q.weight", "layers.0.1.1.weight"


@dataclass(frozen=True)
class Projection:
    """One resampler. part: its folder in a checkpoint. config: config.json. tensors: mapped, and not yet read."""

    part: str
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    @property
    def numbers(self) -> int:
        return sum(tensor.numel() for tensor in self.tensors.values())

    def of_zeros(self) -> Tensor:
        """(num_queries, output_dim) float32: what it makes of an embedding of zeros."""
        return self(torch.zeros(self.config["embedding_dim"]))

    @torch.no_grad()
    def __call__(self, embedding: Tensor) -> Tensor:
        """(num_queries, output_dim) float32 of an embedding (embedding_dim,)."""
        with torch.device("meta"):
            module = build_projection(self.config)
        module.load_state_dict({key: tensor.float() for key, tensor in self.tensors.items()}, assign=True)
        projected: Tensor = module.eval()(embedding.reshape(1, 1, -1).float())[0]
        return projected


def read_projections(file: Path, width: int, embedding_dim: int) -> tuple[Projection, Projection]:
    """ID projection and patch projection of `id-patch.bin`; no number is read.

    width: the UNet's cross_attention_dim. embedding_dim: the face encoder's. Sizes are read from the tensors, and names
    and shapes must be exactly those of resamplers of these sizes.

    Raises CheckpointError.
    """
    with readable(file.parent):
        values = load_pickle(file, ADVICE)
    if not isinstance(values, dict) or set(values) != set(PARTS):
        found = ", ".join(sorted(map(str, values))[:4]) if isinstance(values, dict) else f"a {type(values).__name__}"
        raise CheckpointError(f"{file} holds {found}, expected exactly {' and '.join(sorted(PARTS))}. {ADVICE}")
    ids, patches = (_read(values[name], f"{file}: {name}", part) for name, part in PARTS.items())
    for name, projection in zip(PARTS, (ids, patches), strict=True):
        if projection.config["embedding_dim"] != embedding_dim:
            raise CheckpointError(
                f"{file}: {name} reads embeddings of {projection.config['embedding_dim']} numbers, expected "
                f"{embedding_dim}, as every ArcFace gives. {ADVICE}"
            )
    if ids.config["output_dim"] != width:
        raise CheckpointError(
            f"{file}: prompt_proj gives tokens of {ids.config['output_dim']} numbers, and the base model's UNet reads "
            f"tokens of {width}. Give the base model family that ID-Patch was trained on: SDXL."
        )
    queries, pixels = patches.config["num_queries"], patches.config["output_dim"]
    if queries != PATCH_COLOURS or math.isqrt(pixels) ** 2 != pixels:
        raise CheckpointError(
            f"{file}: patch_proj gives {queries} × {pixels} numbers, expected {PATCH_COLOURS} × a square number: a "
            f"patch with three colours. {ADVICE}"
        )
    return ids, patches


def _read(values: Any, name: str, part: str) -> Projection:
    tensors = tensors_of(values, name, ADVICE)
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    config = _config(shapes)
    if config is None:
        raise CheckpointError(
            f"{name} is not a resampler of IP-Adapter-plus: {LATENTS}, {INPUT}, {OUTPUT}, {QUERY} and {WIDENED} do not "
            f"give its sizes, with heads of {HEAD}. {ADVICE}"
        )
    with torch.device("meta"):
        expected = {key: tuple(tensor.shape) for key, tensor in build_projection(config).state_dict().items()}
    missing, unexpected, others = compare(shapes, expected)
    said = [f"{len(keys)} {kind} ({', '.join(keys[:3])})" for kind, keys in
            (("missing", missing), ("unexpected", unexpected)) if keys]  # fmt: skip
    said += [f"{key} of shape {found} instead of {wanted}" for key, found, wanted in others[:3]]
    if said:
        raise CheckpointError(f"{name}: the weights are not those of one resampler: {'; '.join(said)}. {ADVICE}")
    return Projection(part, config, tensors)


def _config(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any] | None:
    """config.json of the resampler whose tensors have these shapes; None where they do not say its sizes."""
    ranks = {LATENTS: 3, INPUT: 2, OUTPUT: 2, QUERY: 2, WIDENED: 2}
    if any(len(shapes.get(key, ())) != rank or 0 in shapes[key] for key, rank in ranks.items()):
        return None
    dim, inner, widened = shapes[LATENTS][2], shapes[QUERY][0], shapes[WIDENED][0]
    depth = 1 + max(int(found[1]) for key in shapes if (found := re.match(r"layers\.(\d+)\.", key)))
    if inner % HEAD or widened % dim or depth > len(shapes):
        return None
    return {
        "class": "resampler", "dim": dim, "depth": depth, "dim_head": HEAD, "heads": inner // HEAD,
        "num_queries": shapes[LATENTS][1], "embedding_dim": shapes[INPUT][1], "output_dim": shapes[OUTPUT][0],
        "ff_mult": widened // dim,
    }  # fmt: skip
