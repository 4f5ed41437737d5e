"""The scene that every contender draws, and its warm-up."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks.options import Options
from benchmarks.scene import WARM_STEPS, Scene, warm_steps
from realisid_trt.config import RealisIDConfig
from realisid_trt.errors import RequestError
from realisid_trt.loop.rows import steps_without_id
from realisid_trt.manifest import Manifest


@pytest.mark.parametrize("alpha", [None, 1.0, 0.9, 0.7, 0.5, 0.25, 0.2, 0.04, 0.0])
@pytest.mark.parametrize("steps", [1, 2, 5, 30])
def test_a_warm_up_has_the_phases_of_a_picture(alpha: float | None, steps: int) -> None:
    warm = warm_steps(steps, alpha)
    assert min(steps, WARM_STEPS) <= warm <= steps
    found = [(steps_without_id(count, alpha) > 0, steps_without_id(count, alpha) < count) for count in (warm, steps)]
    assert found[0] == found[1]


def test_a_warm_up_has_the_steps_in_and_outside_of_a_window() -> None:
    assert warm_steps(30, 0.7, [(0.0, 1.0)]) == WARM_STEPS
    assert warm_steps(30, 0.7, [(0.0, 0.6)]) == 5  # of four steps, none would have both the ID and the branch
    assert warm_steps(30, None, [(0.9, 1.0)]) == 10


def test_a_warm_up_is_short() -> None:
    assert warm_steps(30, 0.7) == WARM_STEPS
    assert warm_steps(30, 0.2) == 6  # of five steps none would have the ID


@pytest.mark.parametrize(
    ("row", "given"),
    [
        ({"view": "face", "condition": "pose"}, ["pose_image"]),
        ({"condition": "location"}, ["pose_image"]),
        ({"condition": "pose", "per": "person"}, ["landmarks"]),
        ({"condition": "pose", "per": "person", "style": "openpose-xinsir"}, ["pose_image", "body"]),
    ],
)
def test_persons_have_what_the_branches_are_shown(engine_dir: Path, row: dict[str, Any], given: list[str]) -> None:
    """Their landmarks, where a face is drawn into the whole picture: an engine takes no drawing of it."""
    config = RealisIDConfig.from_dict({"branches": [{"name": "x", "tokens": "id", "pooled": "zeros", **row}]})
    manifest = Manifest.read(engine_dir)
    manifest = Manifest(engine_dir, {**manifest.values, "realisid_config": config.to_dict()})
    for person in Scene.of(Options(engine=engine_dir), manifest).persons(2):
        assert [name for name in ("pose_image", "landmarks", "body") if getattr(person, name) is not None] == given


def test_the_switch_counts_evaluations(engine_dir: Path) -> None:
    """Of heun's steps each but the last has two."""
    manifest = Manifest.read(engine_dir)
    plain, heun = (
        Scene.of(Options(engine=engine_dir, steps=10, baseline=("none",), sampler=name), manifest)
        for name in ("ddim", "heun")
    )
    assert plain.switch == 4 and heun.switch == 8  # α = 0.7: steps 0 to 3


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sampler": "heun"}, "--sampler heun: baselines sample with DDIM. Add --baseline none."),
        ({"sampler": "magic", "baseline": ("none",)}, "sampler is 'magic', expected one of ddim"),
    ],
)
def test_samplers_that_cannot_be_measured(given: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=re.escape(message)):
        Options(engine=Path("e"), **given).check()
