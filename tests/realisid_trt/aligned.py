"""A small engine with a face encoder and ID patches: its people, and what one request makes of them.

The face models are the real ones and the face encoder is a real graph of random numbers, run by OpenCV. The ID encoder
is two matrices, so that nothing is built.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from realisid_trt.config import RealisIDConfig
from realisid_trt.loop.controls import branches_of, drawings, settings, with_images
from realisid_trt.persons.boxes import Grid
from realisid_trt.persons.faces import FaceFinder
from realisid_trt.persons.faces.face_encoder import FaceEncoder
from realisid_trt.persons.people import People
from realisid_trt.persons.person import Person
from realisid_trt.request import Control, Request
from tests.export.checkpoint.encoders import write_encoder

CONFIG = RealisIDConfig.from_dict({"method": "idpatch", "patch_px": 8})
MODEL = SimpleNamespace(
    num_id_tokens=4, cross_attention_dim=12, image_size=0, image_mean=(), image_std=(), id_encoder_key="e" * 64,
    default_size=128,
)  # fmt: skip
GRID = Grid(256, 192, 4, 3, 4)
BODY = np.column_stack([np.linspace(40, 150, 17), np.linspace(30, 240, 17)])
EMBEDDING = np.random.default_rng(5).standard_normal(512)
PICTURE = np.full((3, 256, 192), 0.25, np.float32)


class Projections:
    """embedding (1, 1, 512) → id_tokens (1, 4, 12) and id_patch (1, 3, 8, 8), by two matrices. Counts its runs."""

    def __init__(self) -> None:
        self.runs, self.factor = 0, np.float32(1)
        rng = np.random.default_rng(2)
        self.tokens, self.patch = (rng.standard_normal((512, n)).astype(np.float32) for n in (48, 192))

    def put(self, array: Any, for_networks: bool = False) -> Any:
        assert for_networks and array.dtype == np.float32
        return array

    def get(self, tensor: Any) -> Any:
        return tensor.copy()

    def run(self, network: str, inputs: dict[str, Any]) -> dict[str, Any]:
        assert network == "id_encoder" and inputs["embedding"].shape == (1, 1, 512)
        self.runs += 1
        [values] = inputs["embedding"][0]
        return {
            "id_tokens": (values @ self.tokens).reshape(1, 4, 12) * self.factor,
            "id_patch": (values @ self.patch).reshape(1, 3, 8, 8),
        }


def encoder_in(folder: Path, **changes: Any) -> FaceEncoder:
    write_encoder(folder, **changes)
    return FaceEncoder(folder, json.loads((folder / "config.json").read_text()))


def people_of(projections: Any, finder: FaceFinder, encoder: FaceEncoder | None, config: Any = CONFIG) -> People:
    return People(projections, finder, MODEL, config, encoder)  # type: ignore[arg-type]


def seen(people: People, *persons: Person, image: Any = None, scale: float | None = None) -> tuple[Any, Any]:
    """The persons of a request as an engine sees them, and what its branch is shown without patches."""
    request = Request("", persons, controls={"id_patch": Control(image, scale)}).check()
    table, given = CONFIG.table, settings(request, CONFIG.table, GRID)
    found = people.see_all(persons, GRID, branches_of(table, given), with_images(table, given))
    return found, drawings(table, given, found, GRID)


def prepared(people: People, person: Person, image: Any = PICTURE) -> Any:
    [found] = seen(people, person, image=image)[0]
    return people.prepare(found)
