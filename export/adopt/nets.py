"""A published ControlNet: the request for it, and its folder, checked before its weights are read."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from realisid_trt.branches import BODY_STYLES, FACE_STYLES, RESERVED, is_branch_name
from realisid_trt.checks import is_finite
from realisid_trt.config import RealisIDConfig
from realisid_trt.errors import CheckpointError, RequestError

from ..checkpoint.checks import check_all, with_defaults
from ..checkpoint.classes import Component, check_headers, check_keys, compare, meta_module, module_class
from ..checkpoint.face_encoder import FaceEncoder
from ..checkpoint.files import BRANCH, find_weights, read_header, read_json, readable, stem_of
from ..checkpoint.folders import HUB_ID
from .pickles import DTYPES, find_pickle, read_pickle

CLASS = "ControlNetModel"
STEM = stem_of(BRANCH)
STYLES = (*BODY_STYLES, *FACE_STYLES)
NUMBERS = ("scale", "start", "end")
SETTINGS = ("style", *NUMBERS)
FORM = "NAME=FOLDER[,style=STYLE][,scale=NUMBER][,start=NUMBER][,end=NUMBER]"
FAMILIES = {768: "SD 1.5", 1024: "SD 2.1", 2048: "SDXL"}  # by cross_attention_dim
VARIANT = rf"{STEM}\.(?:safetensors\.index\.)?(\w+)(?:-\d+-of-\d+)?\.(?:safetensors|json)"
UNION = "num_control_type"  # a key that only union nets have


@dataclass(frozen=True)
class NetRequest:
    """A ControlNet that is asked for: the name of its row, its folder, and what the row says otherwise than usual."""

    name: str
    folder: Path
    settings: Mapping[str, str | float]

    @classmethod
    def parse(cls, text: str) -> NetRequest:
        """The value of --net. Raises RequestError."""
        name, equals, rest = text.partition("=")
        if not equals or not rest:
            raise RequestError(f"--net {text}: expected {FORM}.")
        if not is_branch_name(name):
            raise RequestError(
                f"--net {text}: {name!r} cannot be a branch's name. Use small letters, digits and _, and none of "
                f"{', '.join(RESERVED)}."
            )
        settings: dict[str, str | float] = {}
        while found := re.fullmatch(rf"(.+),({'|'.join(SETTINGS)})=([^,=]*)", rest):
            rest, key, value = found.groups()
            if key in settings:
                raise RequestError(f"--net {text}: {key} is given twice. Leave one out.")
            settings[key] = _style(text, value) if key == "style" else _number(text, key, value)
        folder = Path(os.path.expanduser(rest))
        if (unknown := re.fullmatch(r".+,(\w+)=[^,=]*", rest)) and not folder.exists():
            raise RequestError(f"--net {text}: unknown setting {unknown[1]}. Known: {', '.join(SETTINGS)}.")
        return cls(name, folder, settings)

    def row(self, channels: int, pooled: str) -> dict[str, Any]:
        """Its row of the table of branches. A face's style means that the pose of all persons is drawn for it."""
        condition = "pose" if self.settings.get("style") in FACE_STYLES else "image"
        return {
            "name": self.name, "view": "picture", "condition": condition, "channels": channels, "tokens": "text",
            "pooled": pooled, "per": "picture", **self.settings,
        }  # fmt: skip


def _style(text: str, value: str) -> str:
    if value not in STYLES:
        raise RequestError(f"--net {text}: style is {value!r}, expected one of {', '.join(STYLES)}.")
    return value


def _number(text: str, key: str, value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = float("nan")
    if not is_finite(number) or (key != "scale" and not 0 <= number <= 1):
        expected = "a number" if key == "scale" else "a number from 0 to 1"
        raise RequestError(f"--net {text}: {key} is {value!r}, expected {expected}.")
    return number


@dataclass(frozen=True)
class Net:
    """A ControlNet's folder whose config and weights agree, as far as names, types and shapes go.

    component: config.json, and its safetensors or its one pickle. dtypes: of its tensors, by safetensors' names.
    """

    request: NetRequest
    component: Component
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: frozenset[str]
    pickled: Mapping[str, Tensor] | None  # mapped, not read

    @classmethod
    def open(cls, request: NetRequest, variant: str | None) -> Net:
        """Reads JSON and headers. variant: of the weight files, where there is one. Raises CheckpointError."""
        folder = request.folder
        with readable(folder):
            _check_folder(folder)
            config = _config(folder)
            _check_index(folder, variant)
            part = f"{BRANCH}{request.name}"
            if pickle := find_pickle(folder, STEM, variant):
                component = Component(part, folder, CLASS, config, (pickle,), None)
                tensors = read_pickle(pickle)
                shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
                expected = {key: tuple(value.shape) for key, value in meta_module(component).state_dict().items()}
                check_keys(component, *compare(shapes, expected))
                dtypes = {DTYPES[tensor.dtype] for tensor in tensors.values()}
                return cls(request, component, shapes, frozenset(dtypes), tensors)
            _check_links(folder)
            _check_variants(folder, variant)
            files, found = find_weights(folder, STEM, variant)
            component = Component(part, folder, CLASS, config, files, found)
            check_headers(component)
            entries = {}
            for file in files:
                for key, (dtype, shape) in read_header(file).items():
                    if dtype not in DTYPES.values():
                        raise CheckpointError(
                            f"{file}: {key} holds numbers of the kind {dtype}, expected one of "
                            f"{', '.join(DTYPES.values())}. Take the weights that were published in half or single "
                            "precision."
                        )
                    entries[key] = (dtype, shape)
            shapes = {key: shape for key, (_, shape) in entries.items()}
            return cls(request, component, shapes, frozenset(dtype for dtype, _ in entries.values()), None)

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json with the defaults of its class where a key is left out."""
        return with_defaults(module_class(CLASS), self.component.config)

    @property
    def bytes(self) -> int:
        """Size of its weight files."""
        return sum(file.stat().st_size for file in self.component.files)

    def check_family(self, unet: Mapping[str, Any], base: str) -> None:
        """Raises CheckpointError unless the base model's UNet is of the same family. base: name of the base model."""
        ours, theirs = (_width(config) for config in (self.config, unet))
        if ours != theirs:
            raise CheckpointError(
                f"{self.request.folder} is a ControlNet of {_family(ours)}, and the base model {base} is a "
                f"model of {_family(theirs)}. Take a ControlNet and a base model of one family."
            )


def check_fit(
    nets: Sequence[Net],
    parts: Mapping[str, Any],
    config: RealisIDConfig,
    texts: tuple[str, ...],
    base: str,
    face_encoder: FaceEncoder | None = None,
) -> None:
    """Raises CheckpointError unless the nets belong to the base model, as their configs say it."""
    for net in nets:
        net.check_family(parts["unet"], base)
    configs = {**parts, **{net.component.name: net.config for net in nets}}
    try:
        check_all(configs, config, texts, face_encoder)
    except (TypeError, KeyError, IndexError, ValueError, AttributeError, ArithmeticError) as error:
        raise CheckpointError(
            f"a config.json of {', '.join(str(net.request.folder) for net in nets)} or of {base} has a value of an "
            f"impossible kind ({type(error).__name__}: {error}). Compare them with what was published."
        ) from error


def _check_folder(folder: Path) -> None:
    if folder.is_dir():
        return
    if folder.exists():
        given, out = shlex.quote(str(folder)), shlex.quote(str(folder.with_suffix("")))
        code = f"import sys; from diffusers import {CLASS} as C; C.from_single_file(sys.argv[1])"
        raise CheckpointError(
            f"{folder} is a file, expected a ControlNet's folder with config.json and its weights. A ControlNet in one "
            f"file becomes a folder by: python -c '{code}.save_pretrained(sys.argv[2])' {given} {out}"
        )
    hint = f" Download it first: hf download {folder} --local-dir FOLDER." if HUB_ID.fullmatch(str(folder)) else ""
    raise CheckpointError(
        f"{folder} does not exist, expected a ControlNet's folder with config.json and its weights. Only --base may be "
        f"the id of a hub model.{hint}"
    )


def _config(folder: Path) -> dict[str, Any]:
    """config.json of a ControlNetModel."""
    file = folder / "config.json"
    if not file.is_file():
        inside = [path.parent.name for path in sorted(folder.glob("*/config.json")) if "ontrol" in path.read_text()]
        hint = f" Name one of its folders: {', '.join(inside[:3])}." if inside else " Copy it from the same place."
        raise CheckpointError(f"{file} is missing: it describes the ControlNet.{hint}")
    config = read_json(file, "it describes the ControlNet")
    said = str(config.get("_class_name", CLASS))
    if (channels := config.get("conditioning_channels", 3)) not in (1, 3):
        raise CheckpointError(
            f"{file}: conditioning_channels is {channels!r}, expected 1 or 3: a grey or a coloured picture. Nets of "
            "other conditions are not supported."
        )
    if "union" in said.lower() or UNION in config:
        raise CheckpointError(
            f"{file}: {said} is a union net, which takes several kinds of condition (as xinsir's union and promax do). "
            "Union nets are not supported yet. Take a ControlNet of one condition for each that you need, such as "
            "openpose, canny or depth."
        )
    if said != CLASS:
        raise CheckpointError(
            f"{file} names the class {said}, expected {CLASS}. Take a ControlNet of SDXL or SD 1.5 in diffusers' "
            "layout."
        )
    return config


def _check_index(folder: Path, variant: str | None) -> None:
    """Raises CheckpointError for an index of shards that names a path, not the name of a file beside it."""
    for dotted in dict.fromkeys((f".{variant}" if variant else "", "")):
        index = folder / f"{STEM}.safetensors.index{dotted}.json"
        shards = read_json(index, "it lists the shards").get("weight_map") if index.is_file() else None
        for name in map(str, shards.values()) if isinstance(shards, Mapping) else ():
            if Path(name).name != name:
                raise CheckpointError(
                    f"{index} names the shard {name!r}, expected the name of a file in the same folder. An index that "
                    "points elsewhere is not one that diffusers wrote: get the folder from where it was published."
                )


def _check_links(folder: Path) -> None:
    """Raises CheckpointError for weights that are a link to nothing, as a broken download leaves them."""
    for file in sorted(folder.iterdir()):
        if file.is_symlink() and not file.exists() and file.name.endswith((".safetensors", ".json")):
            raise CheckpointError(
                f"{file} is a link to {os.readlink(file)}, which is not there. Download the model again, or copy the "
                "folder with its links followed (cp -rL)."
            )


def _check_variants(folder: Path, variant: str | None) -> None:
    """Raises CheckpointError if the only safetensors are those of another variant."""
    names = [file.name for file in folder.glob(f"{STEM}*.safetensors*")]
    variants = sorted({found[1] for name in names if (found := re.fullmatch(VARIANT, name))} - {variant})
    if variants and all(f".{each}" in name for name in names for each in variants):
        raise CheckpointError(
            f"{folder} holds {', '.join(sorted(names)[:3])}, expected {STEM}.safetensors"
            f"{f' or its variant {variant}' if variant else ''}. Take the weights that are there: "
            f"--variant {variants[0]}."
        )


def _width(config: Mapping[str, Any]) -> Any:
    width = config["cross_attention_dim"]
    return width[0] if isinstance(width, (list, tuple)) and len(set(map(str, width))) == 1 else width


def _family(width: Any) -> str:
    """ "SDXL (cross_attention_dim 2048)"."""
    name = FAMILIES.get(width) if isinstance(width, int) else None
    return f"{name} (cross_attention_dim {width})" if name else f"cross_attention_dim {width}"
