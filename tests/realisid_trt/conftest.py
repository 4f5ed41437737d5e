"""The two photographs, loaded, and the face models over them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from realisid_trt.persons.faces import FaceFinder
from realisid_trt.persons.photo import LoadedPhoto, load_photo
from tests.realisid_trt.faces.photographs import NAMES


@pytest.fixture(scope="session")
def finder(face_models: Path) -> FaceFinder:
    return FaceFinder.load(face_models)


@pytest.fixture(scope="session")
def pictures(photos: Any) -> dict[str, LoadedPhoto]:
    return {name: load_photo(path) for name, path in zip(NAMES, photos, strict=True)}


@pytest.fixture(scope="session")
def astronaut(pictures: dict[str, LoadedPhoto]) -> LoadedPhoto:
    return pictures["astronaut.png"]


@pytest.fixture(scope="session")
def hopper(pictures: dict[str, LoadedPhoto]) -> LoadedPhoto:
    return pictures["hopper.jpg"]
