"""Where an adopted checkpoint comes from and goes to: the base model's folder, and an --out that is free."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from realisid_trt.errors import CheckpointError, RequestError

from ..checkpoint.classes import Component, component_of
from ..checkpoint.files import read_json, readable
from ..checkpoint.folders import HUB_ID, tokenizer_of, unpack
from ..files import target_folder

MADE_BY = "export.adopt"  # written to model_index.json; only folders with this mark are replaced
INDEX = "model_index.json"


@dataclass(frozen=True)
class Base:
    """A base model on this machine.

    name:      as it was given: a folder or a hub id. is_hub: which of the two.
    folder:    of its parts. index: its model_index.json.
    parts:     its networks: "unet", "vae", "text_encoder" and, for SDXL, "text_encoder_2".
    """

    name: str
    is_hub: bool
    folder: Path
    index: Mapping[str, Any]
    parts: Mapping[str, Component]

    @classmethod
    def find(cls, name: str, variant: str | None) -> Base:
        """The folder `name`, or the hub model `name` in this machine's cache. Raises CheckpointError."""
        given = Path(os.path.expanduser(name))
        with readable(given):
            folder = Path(os.path.realpath(given)) if given.is_dir() else _cached(name, given)
        with readable(folder):
            return cls._open(name, not given.is_dir(), folder, variant)

    @classmethod
    def _open(cls, name: str, is_hub: bool, folder: Path, variant: str | None) -> Base:
        index = read_json(folder / INDEX, "it lists the base model's parts")
        texts = ["text_encoder", *(["text_encoder_2"] if (folder / "text_encoder_2").is_dir() else [])]
        wanted = ["unet", "vae", "scheduler", *texts, *map(tokenizer_of, texts)]
        if missing := [part for part in wanted if not (folder / part).is_dir()]:
            raise CheckpointError(
                f"the base model {name} ({folder}) lacks {', '.join(missing)}. Expected a whole model in diffusers' "
                "layout: download it again (hf download), or give another --base."
            )
        parts = {part: component_of(part, folder / part, variant) for part in ("unet", "vae", *texts)}
        if parts["unet"].config.get("addition_embed_type") is None:
            parts.pop("text_encoder_2", None)
        return cls(name, is_hub, folder, index, parts)

    @property
    def texts(self) -> tuple[str, ...]:
        """Names of its text encoders."""
        return tuple(name for name in self.parts if name.startswith("text_encoder"))

    def reference(self, out: Path) -> str:
        """`base_model` of the checkpoint `out`: a hub id, or the folder relative to it."""
        return self.name if self.is_hub else os.path.relpath(self.folder, out)


def _cached(name: str, given: Path) -> Path:
    if given.exists():
        raise CheckpointError(f"the base model {name} is a file, expected a folder. {unpack(given)}")
    if not HUB_ID.fullmatch(name):
        raise CheckpointError(
            f"the base model {name} is not a folder, and not the id of a hub model (owner/name). Correct --base."
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except Exception as error:  # the hub's client raises its own kinds
        raise CheckpointError(
            f"the base model {name} is neither a folder here nor in the hub's cache of this machine, and its noise "
            f"schedule and widths are needed. Download it where there is a network (hf download {name}), or give its "
            "folder as --base."
        ) from error


def free_target(path: str | Path, sources: Iterable[Path]) -> Path:
    """The folder that --out means. Raises RequestError if it is taken or overlaps with a source, DiskError."""
    out = target_folder(os.path.expanduser(path))
    for source in (Path(os.path.realpath(source)) for source in sources):
        if out == source or out in source.parents or source in out.parents:
            place = "is" if out == source else "holds" if out in source.parents else "lies in"
            raise RequestError(f"--out {path} {place} {source}, and sources are never written. Choose another --out.")
    if not os.path.lexists(out) or (out.is_dir() and not any(out.iterdir())):
        return out
    try:
        ours = json.loads((out / INDEX).read_text(encoding="utf-8")).get("_made_by") == MADE_BY
    except (OSError, ValueError, AttributeError):
        ours = False
    if not ours:
        raise RequestError(
            f"{out} exists and is not a checkpoint made by {MADE_BY}, so it is never overwritten. Choose another --out."
        )
    return out
