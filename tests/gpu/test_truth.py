"""The engine on a GPU against the reference in float64: it may err as plain torch does in the same precision, times
the factors that the CPU's engine is held to."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

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
WORST_RATIO, ALL_RATIO = 4.0, 2.0  # of plain torch's error, for a single case and over all


def case_errors(
    case: dict[str, Any], built: Any, with_config: Callable[..., Path], precision: torch.dtype = torch.float32
) -> tuple[float, float]:
    """RMS errors of the engine and of plain torch in this precision."""
    config = {key: case[key] for key in ("overlap", "relocate_mode", "branch_pooled_text") if key in case}
    scheduler = {"prediction_type": case.get("prediction", "epsilon")}
    of = built["x4"]
    folder = with_config(of.engine, scheduler=scheduler, **config)
    engine = Engine.load(folder, "onnxruntime", "cuda", cuda_graph=REHEARSAL)
    side = engine.model.default_size
    scene = Scene.make(engine, case["place"], side, side)
    checkpoint = checkpoint_with(of.checkpoint, scheduler, **config)
    return errors(engine, checkpoint, scene, precision, num_inference_steps=STEPS, subject_conditioning_ratio=0.7)


@pytest.mark.slow
def test_float32(built: Any, with_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    float32_only(monkeypatch)
    found = [case_errors(case, built, with_config) for case in CASES]
    assert all(ours <= WORST_RATIO * plain for ours, plain in found), found
    ours, plain = (math.sqrt(sum(error**2 for error in column)) for column in zip(*found, strict=True))
    assert ours <= ALL_RATIO * plain, found


@pytest.mark.slow
@pytest.mark.parametrize("case", [CASES[0], CASES[2]], ids=["nobody", "overlapping"])
def test_float16(built: Any, with_config: Callable[..., Path], case: dict[str, Any]) -> None:
    ours, plain = case_errors(case, built, with_config, torch.float16)
    assert 1e-4 < ours <= WORST_RATIO * plain  # 2⁻¹¹ is one rounding: so half precision ran
