"""Memory of a process that does nothing else."""

from __future__ import annotations

import json
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest

from benchmarks.latency import main
from benchmarks.memory import Job, Watch, bytes_used, measure_alone
from benchmarks.options import Options
from realisid_trt.errors import RequestError
from tests.benchmarks.support import arguments

MIB = 2**20


def take_and_give_back() -> int:
    """The bytes by which the peak rose."""
    with Watch(bytes_used("cpu:1")) as watch:
        before = watch.peak
        taken = np.ones(64 * MIB, np.uint8)
        time.sleep(1)
        del taken
    return watch.peak - before


def test_a_peak_between_two_looks() -> None:
    """In a fresh process, as in `measure_alone`: an older one may reuse gigabytes that it has freed."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as alone:
        assert 60 * MIB < alone.submit(take_and_give_back).result() < 80 * MIB


@pytest.mark.parametrize("baseline", [None, "naive"])
def test_alone(engine_dir: Path, checkpoint_dir: Path, baseline: str | None) -> None:
    """The weights are in memory at rest, and a picture takes more."""
    job = Job(
        options=Options(engine=engine_dir, checkpoint=checkpoint_dir, memory_format="contiguous"),
        backend="onnxruntime",
        baseline=baseline,
        device="cpu:1",
        precision="float32",
        threads=1,
        persons=1,
    )
    found = measure_alone(job)
    assert 10 * MIB < found["resting_memory_bytes"] < found["peak_memory_bytes"]


def test_the_command_adds_it(engine_dir: Path, checkpoint_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    line = ["--baseline", "none", "--persons", "0", "--backend", "all", "--memory", "--out", str(out)]
    assert main(arguments(engine_dir, checkpoint_dir, *line)) == 0
    contender = json.loads(out.read_text())["cases"][0]["contenders"]["engine:onnxruntime"]
    assert 10 * MIB < contender["resting_memory_bytes"] < contender["peak_memory_bytes"]


def test_a_system_that_does_not_say(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("benchmarks.memory.STATM", tmp_path / "statm")
    with pytest.raises(RequestError, match="--memory on a CPU reads /proc"):
        bytes_used("cpu")
