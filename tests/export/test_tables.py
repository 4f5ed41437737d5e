"""Engines of other tables than RealisID's, built upon RealisID's engine: the build compares each with the reference."""

from __future__ import annotations

import json
import shutil
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


def somebody(engine: Engine) -> Person:
    rng, model = np.random.default_rng(0), engine.model
    tokens = rng.standard_normal((model.num_id_tokens, model.cross_attention_dim))
    return Person(id_tokens=tokens, box=(8, 8, 72, 72), landmarks=rng.random((478, 2)))


def picture(engine: Engine) -> np.ndarray:
    return np.asarray(engine.generate("a beach", [somebody(engine)], seed=1, num_inference_steps=2).images[0])


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
def test_masks_in_colour_and_grey_faces(own: Options) -> None:
    """Conditions of other channels than RealisID's."""
    assert own.checkpoint is not None and own.out is not None
    shared = {"tokens": "id", "pooled": "per_row"}
    rows: list[dict[str, Any]] = [
        {"name": "grey", "view": "face", "condition": "pose", "channels": 1, **shared},
        {"name": "place", "condition": "location", "channels": 3, "writes": "box", "start": 0.9, **shared},
    ]
    for name, source in (("grey", "global"), ("place", "local")):
        shutil.copytree(own.checkpoint / f"controlnet_{source}", own.checkpoint / f"controlnet_{name}")
    rewrite(own.checkpoint, rows)
    assert built(own) == [f"{row['name']}_{part}" for row in rows for part in ("branch", "condition", "time")]
    with Engine.load(own.out, "onnxruntime", "cpu") as engine:
        shown = engine.conditions("x", [somebody(engine)])
        assert {name: each[0].shape[0] for name, each in shown.items()} == {"grey": 1, "place": 3}
        assert picture(engine).shape == (128, 128, 3)
