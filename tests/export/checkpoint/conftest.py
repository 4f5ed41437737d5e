"""Checkpoints that no test changes, and copies that a test may spoil."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from export.miniature import make_checkpoint

# SDXL's shape, SD 1.5's, one with a resampler and a null ID of its own, and ID-Patch's.
VARIETIES: dict[str, dict[str, Any]] = {
    "sdxl": {},
    "sd15": {"family": "sd15", "vae_factor": 8},
    "file": {"null_id": "file", "id_tokens": 7},
    "idpatch": {"method": "idpatch"},
}


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Name of a variety → its checkpoint."""
    folder = tmp_path_factory.mktemp("made")
    return {name: make_checkpoint(folder / name, **options) for name, options in VARIETIES.items()}


@pytest.fixture
def copy(made: dict[str, Path], tmp_path: Path) -> Callable[..., Path]:
    """A copy of a made checkpoint, of hard links: change files with `edit`, `put` and `unlink`, never in place."""

    def copy(name: str = "sdxl", to: Path = tmp_path / "checkpoint") -> Path:
        return Path(shutil.copytree(made[name], to, copy_function=os.link))

    return copy
