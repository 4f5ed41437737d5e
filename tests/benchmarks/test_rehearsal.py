"""The comparison on a GPU, rehearsed: half precision beside half precision, the driver's memory, TFLOP/s."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.same import SAME
from tests.benchmarks.support import arguments
from tests.kernels.stand_in import build

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_on_the_stand_in(engine_dir: Path, checkpoint_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    folders = arguments(engine_dir, checkpoint_dir)[:4]
    line = [*folders, "--device", "cuda", "--backend", "all", "--baseline", "naive", "--persons", "1", "--steps", "2"]
    line += ["--runs", "1", "--warmup", "0", "--memory-format", "contiguous", "--memory", "--out", str(out)]
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.rehearsal", *line],
        cwd=ROOT,
        env={**os.environ, **build(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert result["engines"]["engine:onnxruntime"] == {"backend": "onnxruntime on cuda:0", "precision": "float16"}
    assert result["hardware"]["gpu"].startswith("stand-in (sm_90), ")
    assert done.stdout.startswith(result["hardware"]["gpu"]) and "TFLOP/s" in done.stdout
    [case] = result["cases"]
    assert 1e-5 < case["ratios"]["naive / engine:onnxruntime"]["latents_relative_rms"] < SAME["float16"]
    # ONNX Runtime and torch are on the CPU here, so what is on the device is the engine's arena and the kernels.
    ours, theirs = (case["contenders"][name] for name in ("engine:onnxruntime", "naive"))
    assert ours["peak_memory_bytes"] > 0 and 0 <= ours["resting_memory_bytes"] <= ours["peak_memory_bytes"]
    assert theirs["peak_memory_bytes"] == 0
