"""The scene that every contender draws, and its warm-up."""

from __future__ import annotations

import pytest

from benchmarks.scene import WARM_STEPS, warm_steps
from realisid_trt.loop.rows import steps_without_id


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
