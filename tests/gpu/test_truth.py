"""The engine on a GPU against the reference in float64: the bound of the CPU in float32, a stated one in float16."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from realisid_trt import Engine
from tests.gpu.conftest import REHEARSAL
from tests.gpu.support import float32_only
from tests.realisid_trt.truth import Scene, checkpoint_with, errors

STEPS = 4
CASES: list[dict[str, Any]] = [
    {"place": "nobody"},
    {"place": "small", "relocate_mode": "area", "branch_pooled_text": "per_row"},
    {"place": "overlapping", "overlap": "sum"},
    {"place": "crowd", "overlap": "average", "relocate_mode": "area"},
    {"place": "crowd", "overlap": "priority", "prediction": "v_prediction"},
]
# Four times plain float32 torch for a single case, twice over all, as on the CPU. Float16 rounds 2^13 times as
# coarsely: what is stated is how far final latents may be off, relative to their RMS.
WORST_RATIO, ALL_RATIO, HALF = 4.0, 2.0, 1e-2


def case_errors(case: dict[str, Any], built: Any, with_config: Callable[..., Path]) -> tuple[float, float]:
    """RMS errors of the engine and of float32 torch."""
    config = {key: case[key] for key in ("overlap", "relocate_mode", "branch_pooled_text") if key in case}
    scheduler = {"prediction_type": case.get("prediction", "epsilon")}
    of = built["x4"]
    folder = with_config(of.engine, scheduler=scheduler, **config)
    engine = Engine.load(folder, "onnxruntime", "cuda", cuda_graph=REHEARSAL)
    side = engine.model.default_size
    scene = Scene.make(engine, case["place"], side, side)
    checkpoint = checkpoint_with(of.checkpoint, scheduler, **config)
    return errors(engine, checkpoint, scene, num_inference_steps=STEPS, subject_conditioning_ratio=0.7)


def test_float32(built: Any, with_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    float32_only(monkeypatch)
    found = [case_errors(case, built, with_config) for case in CASES]
    assert all(ours <= WORST_RATIO * torch for ours, torch in found), found
    total = (math.sqrt(sum(error**2 for error in column)) for column in zip(*found, strict=True))
    ours, torch = total
    assert ours <= ALL_RATIO * torch, found


@pytest.mark.parametrize("case", [CASES[0], CASES[2]], ids=["nobody", "overlapping"])
def test_float16(built: Any, with_config: Callable[..., Path], case: dict[str, Any]) -> None:
    ours, torch = case_errors(case, built, with_config)
    assert torch < ours < HALF
