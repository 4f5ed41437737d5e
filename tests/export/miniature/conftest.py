"""Checkpoints that no test changes, opened."""

from __future__ import annotations

from typing import Any

import pytest

from export.checkpoint import Checkpoint
from export.miniature import make_checkpoint

VARIETIES: dict[str, dict[str, Any]] = {
    "default": {},
    "velocity": {"prediction": "v_prediction", "vae_factor": 8, "id_tokens": 77, "null_id": "file"},
    "sd15": {"family": "sd15"},
}


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    """Name of a variety → its checkpoint."""
    folder = tmp_path_factory.mktemp("checkpoints")
    return {name: Checkpoint.open(make_checkpoint(folder / name, **options)) for name, options in VARIETIES.items()}


@pytest.fixture(params=VARIETIES)
def checkpoint(request: pytest.FixtureRequest, checkpoints: dict[str, Checkpoint]) -> Checkpoint:
    """Each of them."""
    return checkpoints[request.param]
