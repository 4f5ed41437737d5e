"""Engines of other tables than RealisID's, built upon RealisID's engine: the build compares each with the reference."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export.build import build
from export.options import Options
from realisid_trt import Engine, Person
from training.residuals import DESIGNS

CONFIG = "realisid_config.json"


def rewrite(checkpoint: Path, rows: list[dict[str, Any]]) -> None:
    """Gives a checkpoint this table."""
    config = json.loads((checkpoint / CONFIG).read_text())
    del config["branch_pooled_text"]
    (checkpoint / CONFIG).write_text(json.dumps({**config, "branches": rows}))


def built(options: Options) -> list[str]:
    """The names of the networks that this build had to make. It is verified."""
    result = build(options)
    assert result["complete"]
    [figures] = result["verified"].values()
    assert 0 < figures["ratio"] <= 4 and 0 < figures["ratio_noise_pred"] <= 4
    return sorted(name.split(":")[0] for name in result["built"] if ":opset" in name)


def picture(engine: Engine, **given: Any) -> np.ndarray:
    tokens = np.random.default_rng(0).standard_normal((engine.model.num_id_tokens, engine.model.cross_attention_dim))
    face = np.random.default_rng(1).random((478, 2))
    person = Person(id_tokens=tokens, box=(8, 8, 72, 72), landmarks=face, **given)
    return np.asarray(engine.generate("a beach", [person], seed=1, num_inference_steps=2).images[0])


@pytest.mark.slow("tables")
@pytest.mark.parametrize("design", ["local-only", "global-only", "uncropped", "boxed"])
def test_every_design_of_a_training_becomes_an_engine(design: str, own: Options) -> None:
    """A local branch that sees the whole picture has two networks of another size; everything else is reused."""
    assert own.checkpoint is not None and own.out is not None
    with Engine.load(own.out, "onnxruntime", "cpu") as engine:
        before = picture(engine)
    rewrite(own.checkpoint, DESIGNS[design].rows("zeros"))
    assert built(own) == (["local_branch", "local_condition"] if design in ("uncropped", "boxed") else [])
    with Engine.load(own.out, "onnxruntime", "cpu") as engine:
        assert {row.name for row in engine.config.table} == set(DESIGNS[design].parts)
        after = picture(engine)
    assert after.shape == before.shape and not np.array_equal(after, before)


@pytest.mark.long
def test_masks_in_colour_grey_faces_and_bodies(own: Options) -> None:
    """Conditions of other channels than RealisID's, in an engine for one picture of one person."""
    assert own.checkpoint is not None and own.out is not None
    shared = {"tokens": "id", "pooled": "per_row"}
    rows: list[dict[str, Any]] = [
        {"name": "grey", "view": "face", "condition": "pose", "channels": 1, **shared},
        {"name": "place", "condition": "location", "channels": 3, "writes": "box", "start": 0.9, **shared},
        {"name": "body", "condition": "pose", "style": "openpose-xinsir", "per": "person", **shared},
    ]
    for name, source in (("grey", "global"), ("place", "local"), ("body", "local")):
        shutil.copytree(own.checkpoint / f"controlnet_{source}", own.checkpoint / f"controlnet_{name}")
    rewrite(own.checkpoint, rows)
    made = built(replace(own, batch=1, persons=1))
    assert {f"{row['name']}_{part}" for row in rows for part in ("branch", "condition", "time")} <= set(made)
    joints = np.random.default_rng(2).uniform(0, 128, (17, 2))
    with Engine.load(own.out, "onnxruntime", "cpu") as engine:
        first, second = (picture(engine, body=body) for body in (joints, joints[::-1]))
    assert not np.array_equal(first, second)
