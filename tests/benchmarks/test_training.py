"""The cost of a training, measured on a CPU with the miniature."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from accelerate.state import AcceleratorState

from benchmarks.training import main
from tests.conftest import ROOT

MINIATURE = str(ROOT / "checkpoints" / "miniature")


@pytest.fixture(autouse=True)
def _accelerate_forgets() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_steps_are_real_steps(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--checkpoint", MINIATURE, "--cpu", "--steps", "4", "--batch-size", "2", "--json"]
    assert main(arguments) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["step_s"]["count"] == 2 and found["examples_per_s"] == pytest.approx(2 / found["step_s"]["p50"])
    assert found["side_px"] == 128 and found["device"] == "cpu" and found["peak_bytes"] is None
    assert 3.5e6 < found["parameters"] < 4.5e6 and len(found["losses"]) == 4 and all(0 < v < 2 for v in found["losses"])

    assert main([*arguments, "--accumulate", "2", "--checkpointing", "--ema", "0"]) == 0
    other = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert other["losses"] == pytest.approx(found["losses"], rel=0.05)  # the same examples, in other sums


def test_what_cannot_be_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--checkpoint", MINIATURE, "--cpu", "--steps", "2"]) == 2
    assert "expected more than the 2 that are not counted" in capsys.readouterr().err
    assert main(["--checkpoint", MINIATURE, "--cpu", "--batch-size", "3", "--accumulate", "2"]) == 2
    assert "--batch-size 3 is not divisible by 1 processes × 2 parts" in capsys.readouterr().err
