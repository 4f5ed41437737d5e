"""The paths of engines' checkpoints. They are kept on this machine and not in the engine, which may be given away."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from realisid_trt.errors import DiskError
from realisid_trt.files import cache_folder, whole_or_not

from .staging import content_key


def remember(manifest: Mapping[str, Any], *, checkpoint: Path, base_model: str | None, variant: str | None) -> None:
    """Stores the arguments that open the checkpoint again, from any working folder.

    A cache that cannot be written is ignored.
    """
    if base_model and Path(base_model).is_dir():  # else an id on the hub
        base_model = str(Path(base_model).absolute())
    origin = {"path": str(Path(checkpoint).absolute()), "base_model": base_model, "variant": variant}
    with contextlib.suppress(DiskError), whole_or_not(_record(manifest)) as partial:
        partial.write_text(json.dumps(origin), encoding="utf-8")


def recall(manifest: Mapping[str, Any]) -> dict[str, str | None]:
    """Arguments of `Checkpoint.open` for the checkpoint with an engine's weights.

    Empty if none are stored, or if the checkpoint's folder does not exist any more.
    """
    try:
        record = json.loads(_record(manifest).read_text(encoding="utf-8"))
        origin = {key: record[key] for key in ("path", "base_model", "variant") if isinstance(record[key], str | None)}
        return origin if Path(origin["path"]).is_dir() else {}
    except (OSError, ValueError, TypeError, KeyError):
        return {}


def _record(manifest: Mapping[str, Any]) -> Path:
    """The file for one set of weights and configuration; it does not depend on the engine's path."""
    key = content_key(manifest["checkpoint"], manifest["realisid_config"])
    return cache_folder() / "origins" / f"{key[:16]}.json"
