"""The classes of diffusers and transformers that a checkpoint may contain, and the checks of their weights."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from realisid_trt.errors import CheckpointError

from .checks import check_scheduler, with_defaults
from .files import BRANCH, find_weights, read_header, read_json, stem_of
from .id_projection import build_projection

DIFFUSERS_CLASSES = {
    "unet": "UNet2DConditionModel",
    "vae": "AutoencoderKL",
    "controlnet": "ControlNetModel",
}
# The first is taken when config.json names none.
TRANSFORMERS_CLASSES = {
    "text_encoder": ("CLIPTextModel", "CLIPTextModelWithProjection"),
    "text_encoder_2": ("CLIPTextModelWithProjection",),
    "image_encoder": ("CLIPVisionModelWithProjection", "CLIPVisionModel"),
}
PROJECTIONS = ("id_projection", "id_patch_projection")  # classes of our own
OLD_ATTENTION = r"attentions\.\d+\.(query|key|value|proj_attn)\."


@dataclass(frozen=True)
class Component:
    """One folder of the checkpoint that holds weights.

    name:       of the folder in the layout; the folder itself may be the base model's.
    class_name: of diffusers or transformers; "linear" or "resampler" for a projection.
    config:     config.json as it stands. files: its safetensors. variant: of these files, e.g. "fp16".
    """

    name: str
    folder: Path
    class_name: str
    config: Mapping[str, Any]
    files: tuple[Path, ...]
    variant: str | None


def component_of(name: str, folder: Path, variant: str | None) -> Component:
    """One part that holds weights: its class, config and files. Raises CheckpointError."""
    config = read_json(folder / "config.json", f"it describes {name}")
    files, variant = find_weights(folder, stem_of(name), variant)
    return Component(name, folder, class_name(name, config), config, files, variant)


def diffusers_kind(name: str) -> str | None:
    """The key of DIFFUSERS_CLASSES of a component: its name, or "controlnet" for a branch; None for other libraries."""
    kind = BRANCH.rstrip("_") if name.startswith(BRANCH) else name
    return kind if kind in DIFFUSERS_CLASSES else None


def class_name(name: str, config: Mapping[str, Any]) -> str:
    """The class that a config.json names, if this component may have it. Raises CheckpointError."""
    if name in PROJECTIONS:
        return str(config.get("class"))
    if (kind := diffusers_kind(name)) is not None:
        known: tuple[str, ...] = (DIFFUSERS_CLASSES[kind],)
        said = config.get("_class_name", known[0])
    else:
        known = TRANSFORMERS_CLASSES[name]
        said = (config.get("architectures") or known)[0]
    if said not in known:
        raise CheckpointError(
            f"{name}/config.json names the class {said}, expected {' or '.join(known)}. Save that part of the model "
            "alone, with its own save_pretrained."
        )
    return str(said)


def full_config(component: Component) -> dict[str, Any]:
    """config.json with the defaults of its class where a key is left out. Raises CheckpointError."""
    if diffusers_kind(component.name) is not None:
        return with_defaults(module_class(component.class_name), component.config)
    if component.name in TRANSFORMERS_CLASSES:
        with _understood(component):
            values: dict[str, Any] = module_class(component.class_name).config_class(**component.config).to_dict()
        return values
    return dict(component.config)


@contextmanager
def _understood(component: Component) -> Iterator[None]:
    """Turns a library's exceptions for impossible values into a CheckpointError, and silences the library."""
    try:
        with quiet():
            yield
    except Exception as error:
        raise CheckpointError(
            f"{component.folder / 'config.json'} is not a config of {component.class_name}: {error}. Compare it with "
            "that of the base model."
        ) from error


Shapes = Mapping[str, tuple[int, ...]]
Mismatch = tuple[str, tuple[int, ...], tuple[int, ...]]


def check_headers(component: Component) -> None:
    """Raises CheckpointError unless the files' headers list the tensors of the component's module. Reads no weights.

    transformers adds or omits the prefix of CLIP's towers and accepts surplus position_ids; diffusers renames the
    attention keys of VAEs of 2022. The loaders check such files.
    """
    found: dict[str, tuple[int, ...]] = {}
    for file in component.files:
        found.update({key: entry[1] for key, entry in read_header(file).items()})
    expected = {key: tuple(value.shape) for key, value in meta_module(component).state_dict().items()}
    if component.name in TRANSFORMERS_CLASSES:
        found, expected = _bare(found), _bare(expected)
    if component.name == "vae" and any(re.search(OLD_ATTENTION, key) for key in found):
        return
    check_keys(component, *compare(found, expected))


def _bare(shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """Shapes under CLIP keys without the tower's prefix, and without position_ids."""
    kept = {re.sub(r"^(text|vision)_model\.", "", key): shape for key, shape in shapes.items()}
    return {key: shape for key, shape in kept.items() if not key.endswith("position_ids")}


def compare(found: Shapes, expected: Shapes) -> tuple[list[str], list[str], list[Mismatch]]:
    """(missing, unexpected, of another shape) keys of a file against those of a module."""
    both = sorted(found.keys() & expected.keys())
    shapes = [(key, found[key], expected[key]) for key in both if found[key] != expected[key]]
    return sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys()), shapes


def check_keys(
    component: Component, missing: Iterable[str], unexpected: Iterable[str], mismatched: Iterable[Mismatch]
) -> None:
    """Raises CheckpointError unless the weights have exactly the keys and shapes of the module."""
    said = []
    for kind, keys in (("missing", sorted(missing)), ("unexpected", sorted(unexpected))):
        if keys:
            said.append(f"{len(keys)} {kind} ({', '.join(keys[:3])}{', …' if len(keys) > 3 else ''})")
    shapes = [f"{key}: {tuple(has)} in the file, {tuple(wants)} expected" for key, has, wants in sorted(mismatched)]
    if shapes:
        said.append(f"{len(shapes)} of another shape ({'; '.join(shapes[:3])}{'; …' if len(shapes) > 3 else ''})")
    if said:
        raise CheckpointError(
            f"{component.folder}: the weights are not those of the {component.class_name} that config.json describes: "
            f"keys {', '.join(said)}. Copy config.json and weights from the same place, complete and without additions."
        )


def check_numbers(component: Component, module: nn.Module) -> None:
    """Raises CheckpointError for a loaded weight that holds NaN or infinity, before anything is computed with it."""
    for key, weight in module.state_dict().items():
        if weight.is_floating_point() and not torch.isfinite(weight).all():
            bad = int((~torch.isfinite(weight)).sum())
            file = next((file for file in component.files if key in read_header(file)), component.files[0])
            raise CheckpointError(
                f"{file}: {key} holds {bad} NaN or infinite of {weight.numel()} numbers. Copy "
                "the file again; if the original has them too, its training has failed."
            )


def meta_module(component: Component) -> nn.Module:
    """The component's module without memory for its weights. Raises CheckpointError."""
    with _understood(component), torch.device("meta"):
        if component.name in PROJECTIONS:
            return build_projection(component.config)
        cls = module_class(component.class_name)
        if diffusers_kind(component.name) is not None:
            module: nn.Module = cls.from_config(component.config)
        else:
            module = cls(cls.config_class(**component.config))
        return module


@cache
def module_class(name: str) -> Any:
    """The class of diffusers or transformers with this name."""
    import diffusers
    import transformers

    return getattr(diffusers if name in DIFFUSERS_CLASSES.values() else transformers, name)


@contextmanager
def quiet() -> Iterator[None]:
    """A context without the libraries' log lines, warnings and progress bars.

    Restores their verbosity, and torch's default dtype and random state.
    """
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    libraries = (diffusers_logging, transformers_logging)
    before = [(library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries]
    dtype = torch.get_default_dtype()
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        try:
            for library in libraries:
                library.set_verbosity_error()
                library.disable_progress_bar()
            yield
        finally:
            torch.set_default_dtype(dtype)  # diffusers does not restore it when a model cannot be made
            for library, (verbosity, bar) in zip(libraries, before, strict=True):
                library.set_verbosity(verbosity)
                if bar:
                    library.enable_progress_bar()


def ddim_config(folder: Path) -> dict[str, Any]:
    """Every key of the DDIMScheduler of scheduler/. Raises CheckpointError for one whose step is not linear."""
    from diffusers import DDIMScheduler

    source = read_json(folder / "scheduler_config.json", "it describes the noise schedule")
    try:
        with quiet():
            scheduler: Any = DDIMScheduler.from_config(source)  # type: ignore[no-untyped-call]
        config, alphas = dict(scheduler.config), scheduler.alphas_cumprod
        if not ((alphas >= 0) & (alphas <= 1)).all():  # NaN is neither
            raise ValueError("its alphas_cumprod are not in 0..1")
    except Exception as error:  # ValueError, NotImplementedError, or others for a wrong value
        raise CheckpointError(
            f"{folder / 'scheduler_config.json'} is not a config of a DDIM scheduler: {error}. Correct the file."
        ) from error
    check_scheduler(config, source)
    return {key: value for key, value in config.items() if not key.startswith("_")}
