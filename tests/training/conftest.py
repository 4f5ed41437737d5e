"""Every test trains in this process, where accelerate keeps one state; and the data that most trainings begin with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState

from export.miniature import make_checkpoint
from training.examples import WorldFaces, WorldScenes
from training.recipe import START
from training.store import store_of


@pytest.fixture(autouse=True)
def _accelerate_forgets() -> Iterator[None]:
    """Resets accelerate, so that each test chooses its own precision."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("start") / "start", **START)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    store_of(WorldScenes(pictures=48), folder / "scenes")
    store_of(WorldScenes(pictures=48, persons=(1,), crop_px=64), folder / "portraits")
    store_of(WorldScenes(pictures=48, crop_px=64), folder / "groups")  # of one to three people
    store_of(WorldFaces(pairs=32, views=2, scene_px=48), folder / "faces")
    return folder
