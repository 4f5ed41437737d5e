"""One measurement that many tests share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.latency import main
from benchmarks.options import BASELINES
from tests.benchmarks.support import arguments


@pytest.fixture(scope="session")
def measured(engine_dir: Path, checkpoint_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What --out stores: two cases against every baseline, two rounds; compiled by no more than torch's tracer."""
    out = tmp_path_factory.mktemp("latency") / "results.json"
    line = arguments(engine_dir, checkpoint_dir, "--baseline", *BASELINES, "--runs", "2", "--out", str(out))
    line += ["--warmup", "1", "--compiler", "eager", "--memory-format", "contiguous"]
    assert main(line) == 0
    result: dict[str, Any] = json.loads(out.read_text())
    assert result["command"].startswith("python -m benchmarks.latency --engine ")
    return result
