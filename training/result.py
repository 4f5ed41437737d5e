"""The results of a training: a checkpoint in the layout that it began with, and the origin of its weights."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from export.checkpoint import Checkpoint
from export.checkpoint.classes import Component, quiet
from export.checkpoint.files import read_header, stem_of
from export.files import disk_errors, whole_folder, write_json
from realisid_trt.files import file_sha256, whole_or_not

ORIGIN = "origin.json"
# of realisid_config.json: defaults of a request, which no training reads
REQUEST_KEYS = {
    "guidance_scale", "id_guidance_scale", "num_inference_steps", "subject_conditioning_ratio", "sampler", "steps",
}  # fmt: skip


def trained_for(checkpoint: Checkpoint) -> dict[str, Any]:
    """The keys of realisid_config.json that weights are trained for."""
    return {key: value for key, value in checkpoint.config.to_dict().items() if key not in REQUEST_KEYS}


def write_checkpoint(
    start: Checkpoint, trained: Mapping[str, nn.Module], out: Path, dtype: torch.dtype = torch.float32
) -> dict[str, Path]:
    """The checkpoint `start` with these parts in the place of its own, published atomically.

    Parts that `start` takes from a base model stay there, unless they were trained. Returns the files of the trained
    weights by part. Raises DiskError.
    """
    with whole_folder(out) as partial, disk_errors(out.parent):
        shutil.copytree(
            start.path,
            partial,
            ignore=lambda folder, names: _skipped(Path(folder), names, start, trained),
            dirs_exist_ok=True,
        )
        _write_index(start.path, partial, out)
        for name, module in trained.items():
            _write_component(partial / name, module, start.components[name], dtype)
    return {name: out / name / f"{stem_of(start.components[name].name)}.safetensors" for name in trained}


def _skipped(folder: Path, names: list[str], start: Checkpoint, trained: Mapping[str, nn.Module]) -> list[str]:
    """Names that are not copied: hidden files, trained parts, and a model card, which describes the earlier weights."""
    here = {*trained, "README.md"} if folder == start.path else ()
    return [name for name in names if name.startswith(".") or name in here]


def _write_index(start: Path, partial: Path, out: Path) -> None:
    """Adapts model_index.json: mends the relative path of a base model, and removes the marks of random weights."""
    path = partial / "model_index.json"
    index = json.loads(path.read_text(encoding="utf-8"))
    for ours in ("_made_by", "_recipe"):  # marks of random weights, which their maker may overwrite
        index.pop(ours, None)
    base = index.get("base_model")
    if isinstance(base, str) and (start / base).is_dir():
        index["base_model"] = os.path.relpath(start / base, out)
    path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_component(folder: Path, module: Any, before: Component, dtype: torch.dtype) -> None:
    """config.json in its library's form, and one file of weights under the names that `before` has them."""
    folder.mkdir()
    with quiet():  # diffusers warns of a cast that is meant
        module = module.to(dtype)
        if hasattr(module, "save_config"):
            module.save_config(folder)
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            config.pop("_name_or_path", None)  # a path on the machine that trained it
            (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        elif hasattr(module, "config"):
            module.config.architectures = [before.class_name]
            module.config.save_pretrained(folder)
        else:
            text = json.dumps(dict(before.config), indent=2) + "\n"
            (folder / "config.json").write_text(text, encoding="utf-8")
    names = {name for file in before.files for name in read_header(file)}
    # transformers 5 names CLIPTextModel's weights without this prefix; published files have it
    prefix = "text_model." if any(name.startswith("text_model.") for name in names) else ""
    tensors = {
        key if key in names or not prefix else prefix + key: value.contiguous()
        for key, value in module.state_dict().items()
    }
    file = folder / f"{stem_of(before.name)}.safetensors"
    save_file(tensors, file, metadata={"format": "pt"})
    file.chmod(folder.stat().st_mode & 0o666)  # safetensors writes files that only their owner may read


def write_apart(trained: Mapping[str, nn.Module], folder: Path) -> dict[str, Path]:
    """Writes weights that are not part of a checkpoint (judges, other designs), in half precision: NAME.safetensors
    each.

    Returns the files by name. Raises DiskError.
    """
    files = {name: folder / f"{name}.safetensors" for name in trained}
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name, module in trained.items():
            tensors = {key: value.half().contiguous() for key, value in module.state_dict().items()}
            with whole_or_not(files[name]) as partial:
                save_file(tensors, partial, metadata={"format": "pt"})
    return files


def write_origin(run: Path, step: int, written: Mapping[str, Path]) -> None:
    """origin.json of a run: its run.json, the step that its weights stand at, and the sha256 of their files by part."""
    with disk_errors(run):
        asked = json.loads((run / "run.json").read_text(encoding="utf-8"))
        keys = {name: file_sha256(file) for name, file in written.items()}
        write_json(run / ORIGIN, {**asked, "steps": step, "written": keys})


def origin_of(run: Path, weights: Mapping[str, Path]) -> dict[str, Any] | None:
    """The settings of the run that made these weights (files by part), and its steps. None if it did not make them."""
    path = run / ORIGIN
    if not path.is_file() or not all(file.is_file() for file in weights.values()):
        return None
    said: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return said if said["written"] == {name: file_sha256(file) for name, file in weights.items()} else None
