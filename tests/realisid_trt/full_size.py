"""The manifest of a full-size engine that nobody built: SDXL's shapes, weights that are holes in files."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.numpy import save

import export.miniature
from export.building.describe import describe
from export.building.staging import Artifact
from export.checkpoint import Checkpoint, tokenizer_of
from export.forms import Limits, targets_of
from export.networks import networks
from export.to_onnx import port_entry
from realisid_trt.manifest import CONSTANTS, Manifest


def checkpoint_without_weights(folder: Path) -> Checkpoint:
    """`python -m export.miniature --preset sdxl`, opened; its weights take no disk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export.miniature, "write_weights", _write_holes)
        patch.setattr(export.miniature, "check_space", lambda *arguments: None)
        export.miniature.make_checkpoint(folder, preset="sdxl", null_id="zero_tokens")
    return Checkpoint.open(folder)


def _write_holes(
    folder: Path, stem: str, shapes: Mapping[str, tuple[int, ...]], make: Any, dtype: torch.dtype, **options: Any
) -> None:
    header, end = {}, 0
    for key, shape in shapes.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[key] = {"dtype": {2: "F16", 4: "F32"}[dtype.itemsize], "shape": shape, "data_offsets": (begin, end)}
    text = json.dumps(header).encode()
    with (folder / f"{stem}.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def full_size_manifest(checkpoint: Checkpoint, folder: Path, batch: int = 4, persons: int = 8) -> Manifest:
    """As `--fp16 --backend onnxruntime --gpu-only` would write it; graphs are not in the sizes, only weights."""
    [target] = [target for target in targets_of("onnxruntime", "fp16") if target.device == "cuda"]
    known, px = networks(checkpoint), checkpoint.sample_size * checkpoint.vae_scale_factor
    limits = Limits.of_requests(batch, persons, 2 * checkpoint.sample_size >> (checkpoint.levels - 1))
    made: dict[str, Artifact] = {"faces": Artifact("", {}, {}), "kernels": Artifact("", {}, {})}
    for name, network in known.items():
        form = target.form_of(name)
        info = {
            "file": f"{name}.onnx",
            "flops_per_row": 0,
            "inputs": [port_entry(port, form, limits) for port in network.inputs],
            "outputs": [port_entry(port, form, limits) for port in network.outputs],
        }
        nbytes = network.elements(checkpoint) * form.itemsize
        made[target.artifact(name)] = Artifact("", {info["file"]: {"bytes": nbytes, "sha256": ""}}, info)
    for name in checkpoint.text_encoder_names:
        tokenizer, file = checkpoint.load_tokenizer(name), f"{tokenizer_of(name)}.json"
        (folder / file).write_text(tokenizer.backend_tokenizer.to_str(), encoding="utf-8")
        info = {"file": file, "max_length": checkpoint.max_length, "pad_id": tokenizer.pad_token_id}
        made[tokenizer_of(name)] = Artifact("", {}, info)
    alphas = checkpoint.load_scheduler().alphas_cumprod.double().numpy()
    (folder / CONSTANTS).write_bytes(save({"alphas_cumprod": alphas}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoint, "weights_key", lambda self, component: "")  # would hash gigabytes of holes
        built_for = {"batch": batch, "persons": persons, "resolution": 2 * px}
        values = describe(checkpoint, made, list(known), [target], (), built_for)
    return Manifest(folder, {**values, "verified": {}})


def with_one_branch(manifest: Manifest) -> Manifest:
    """The same engine without the local branch."""
    stay = {name: entry for name, entry in manifest.values["networks"].items() if not name.startswith("local_")}
    config = dict(manifest.values["realisid_config"])
    config["branches"] = [row for row in config["branches"] if row["name"] != "local"]
    return Manifest(manifest.path, {**manifest.values, "networks": stay, "realisid_config": config})
