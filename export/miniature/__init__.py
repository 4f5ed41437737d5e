"""Checkpoints of the real classes with random weights: a small one for tests and demos, a full-size one for timing.

    python -m export.miniature --out CKPT --seed 0

Pictures made with them are coloured noise, but everything else is as with trained weights: files, shapes, configs and
tokens; and the prompt, the ID, the pose and the box change the prediction.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from tqdm import tqdm

from realisid_trt.config import RealisIDConfig
from realisid_trt.errors import CheckpointError, DiskError, RequestError

from ..checkpoint import tokenizer_of
from ..checkpoint.classes import PROJECTIONS, Component, class_name, diffusers_kind, meta_module, quiet
from ..checkpoint.files import stem_of
from ..files import check_space, disk_errors, sync, target_folder, whole_folder
from .face_encoder import write_face_encoder
from .presets import METHODS, Recipe, component_configs, method_config, preprocessor_config, scheduler_config
from .tokenizer import END, vocabulary_and_merges, write_tokenizer
from .weights import CARRY_KEYS, Weights, draw, write_weights

__all__ = ["make_checkpoint", "recipe_of", "weights_of"]

MADE_BY = "export.miniature"  # written to model_index.json; only folders with this mark are replaced
RESERVE_BYTES = 64 * 2**20


def make_checkpoint(out: str | Path, *, force: bool = False, progress: bool = False, **options: Any) -> Path:
    """A complete checkpoint in DESIGN.md's layout at `out`, published atomically. Returns its path.

    force:    replace a checkpoint that an earlier call made; nothing else is ever overwritten.
    progress: show a progress bar on stderr.
    options:  fields of Recipe (seed, preset, family, vae_factor, prediction, projection, id_tokens) and keys of
              realisid_config.json (branch_pooled_text, null_id, …).
    Raises RequestError for impossible options or a path that is taken, DiskError if the disk refuses a write or has no
    room.
    """
    recipe = recipe_of(**options)
    out = target_folder(out)
    try:
        with disk_errors(out.parent):
            _check_target(out, force)
            needed_bytes = _weights_bytes(recipe, modules_of(recipe, out)) + RESERVE_BYTES
            check_space(out.parent, needed_bytes, f"preset {recipe.preset}")
        with whole_folder(out) as partial, disk_errors(out.parent):
            modules = modules_of(recipe, partial)
            _write_small_files(partial, recipe, modules)
            _write_components(recipe, modules, progress)
            for path in (*partial.rglob("*"), partial):
                sync(path)
    except (OSError, SafetensorError) as error:  # errors that disk_errors does not convert; safetensors' have no errno
        raise DiskError(f"{out} could not be written: {error}. Free some space, or choose another --out.") from error
    return out


def recipe_of(**options: Any) -> Recipe:
    """The checked Recipe of `make_checkpoint`'s options. Raises RequestError."""
    options = {key: value.item() if isinstance(value, np.generic) else value for key, value in options.items()}
    keys = {field.name for field in dataclasses.fields(RealisIDConfig)}
    fields = {field.name for field in dataclasses.fields(Recipe)} - {"realisid"}
    if unknown := sorted(set(options) - keys - fields):
        raise RequestError(f"unknown option {', '.join(unknown)}. Known: {', '.join(sorted(keys | fields))}.")
    if (method := options.get("method", Recipe.method)) not in METHODS:
        raise RequestError(f"method is {method!r}, expected one of {', '.join(METHODS)}.")
    values = {key: value for key, value in options.items() if key in keys - fields}
    values = method_config(method, values.pop("branch_pooled_text", None)) | values
    try:
        realisid = RealisIDConfig.from_dict(values, "options", "Give another value.")
    except CheckpointError as error:
        raise RequestError(str(error)) from error
    recipe = Recipe(realisid=realisid, **{key: value for key, value in options.items() if key in fields})
    recipe.check()
    return dataclasses.replace(
        recipe, realisid=dataclasses.replace(realisid, box_snap=realisid.box_snap or recipe.factor)
    )


Modules = Mapping[str, tuple[Component, torch.nn.Module]]


def modules_of(recipe: Recipe, folder: Path) -> Modules:
    """Folder of the checkpoint → its component and its module without memory for the weights, in writing order."""
    configs = component_configs(recipe, vocabulary=len(vocabulary_and_merges()[0]))
    components = [
        Component(name, folder / name, class_name(name, config), config, files=(), variant=None)
        for name, config in configs.items()
    ]
    return {component.name: (component, meta_module(component)) for component in components}


def _shapes(module: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}


def _weights_bytes(recipe: Recipe, modules: Modules) -> int:
    numbers = sum(math.prod(shape) for _, module in modules.values() for shape in _shapes(module).values())
    return numbers * recipe.dtype.itemsize


def weights_of(recipe: Recipe, unet: Mapping[str, Any]) -> Weights:
    """The weights of a recipe's checkpoint. unet: the config of its UNet."""
    carried = {key: unet[key] for key in CARRY_KEYS} if recipe.prediction == "epsilon" else None
    return Weights(recipe.seed, 0.25 if recipe.preset == "sdxl" else 0.5, recipe.dtype, carried)


def _write_components(recipe: Recipe, modules: Modules, progress: bool) -> None:
    """config.json and weights of everything that holds weights."""
    weights = weights_of(recipe, modules["unet"][0].config)
    total = _weights_bytes(recipe, modules)
    with tqdm(total=total, unit="B", unit_scale=True, disable=not progress, file=sys.stderr) as bar:
        for component, module in modules.values():
            bar.set_description(component.name)
            _write_config(component, module)
            # transformers 5 keeps CLIPTextModel's keys without this prefix; published files have it, so ours do.
            prefix = "text_model." if component.name == "text_encoder" else ""
            keys = {key if key.startswith(prefix) else prefix + key: shape for key, shape in _shapes(module).items()}
            make = partial(weights.draw, component.name)
            write_weights(component.folder, stem_of(component.name), keys, make, recipe.dtype, wrote=bar.update)


def _write_config(component: Component, module: Any) -> None:
    """The component's config.json, in its library's own form."""
    component.folder.mkdir()
    with quiet():
        if hasattr(module, "save_config"):
            module.save_config(component.folder)
        elif hasattr(module, "config"):
            module.config.architectures = [component.class_name]
            module.config.save_pretrained(component.folder)
        else:
            _write_config_file(component.folder / "config.json", component.config)


def _write_small_files(folder: Path, recipe: Recipe, modules: Modules) -> None:
    """Tokenizers, scheduler, feature extractor, face encoder, null ID, realisid_config.json and model_index.json."""
    import diffusers

    configs = {name: component.config for name, (component, _) in modules.items()}
    write_tokenizer(folder / "tokenizer", pad_token=END)
    if "text_encoder_2" in configs:
        write_tokenizer(folder / "tokenizer_2", pad_token="!")
    with quiet():
        scheduler: Any = diffusers.DDIMScheduler(**scheduler_config(recipe.prediction, recipe.method))  # type: ignore[no-untyped-call]
        scheduler.save_config(folder / "scheduler")
    projection = configs.get("id_projection")
    if "image_encoder" in configs:
        (folder / "feature_extractor").mkdir()
        preprocessor = preprocessor_config(configs["image_encoder"]["image_size"])
        _write_config_file(folder / "feature_extractor" / "preprocessor_config.json", preprocessor)
    if recipe.realisid.id_input == "aligned_face":
        write_face_encoder(folder / "face_encoder", recipe.seed)
    if recipe.realisid.null_id == "file" and projection is not None:
        shapes = {
            "null_id_tokens": (projection.get("num_tokens") or projection["num_queries"], projection["output_dim"])
        }
        write_weights(
            folder, "null_id", shapes, lambda key, shape: draw(recipe.seed, "null_id", key, shape), torch.float32
        )
    _write_config_file(folder / "realisid_config.json", recipe.realisid.to_dict())
    index: dict[str, Any] = {
        "_class_name": "RealisIDPipeline",
        "_diffusers_version": diffusers.__version__,
        "_made_by": MADE_BY,
        "_recipe": {key: value for key, value in dataclasses.asdict(recipe).items() if key != "realisid"},
    }
    for name, (component, _) in modules.items():
        if name not in PROJECTIONS:
            index[name] = ["diffusers" if diffusers_kind(name) is not None else "transformers", component.class_name]
    index |= {tokenizer_of(name): ["transformers", "CLIPTokenizer"] for name in modules if "text" in name}
    if "image_encoder" in configs:
        index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
    index |= {name: ["realisid", configs[name]["class"]] for name in PROJECTIONS if name in configs}
    if recipe.realisid.id_input == "aligned_face":
        index["face_encoder"] = ["realisid", "onnx"]
    index["scheduler"] = ["diffusers", "DDIMScheduler"]
    _write_config_file(folder / "model_index.json", index)


def _write_config_file(path: Path, values: Mapping[str, Any]) -> None:
    """A JSON file as diffusers indents them."""
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _check_target(out: Path, force: bool) -> None:
    """Raises RequestError unless `out` is free, or holds a checkpoint of ours and `force` was given."""
    if not os.path.lexists(out) or (out.is_dir() and not any(out.iterdir())):
        return
    try:
        ours = json.loads((out / "model_index.json").read_text(encoding="utf-8")).get("_made_by") == MADE_BY
    except (OSError, ValueError, AttributeError):
        ours = False
    if not ours:
        raise RequestError(
            f"{out} exists and is not a checkpoint made by {MADE_BY}, so it is never overwritten. Choose another --out."
        )
    if not force:
        raise RequestError(f"{out} exists. Replace it with --force, or choose another --out.")
