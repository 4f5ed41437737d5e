"""The kernel benchmark without a GPU: the bytes that must move, and the number of launches."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.cases import SDXL, Case, cases
from benchmarks.gpu_bench import GpuBench
from benchmarks.kernels import crop_bytes, guide_bytes, guide_launches, main, merge_bytes
from benchmarks.torch_operations import GuideStep, Work
from realisid_trt.persons.boxes import Grid, snap_box

ROOT = Path(__file__).resolve().parents[2]
LOADED = """{}
import sys
print(*{{name.partition(".")[0] for name in sys.modules}} - set(sys.stdlib_module_names))"""
HALF = 2
ALL_LEVELS = sum(channels * (128 >> level) ** 2 for channels, level in SDXL)  # values of one row at 1024²


def test_the_levels_are_sdxl_s() -> None:
    assert ALL_LEVELS == 26_869_760


def test_bytes_by_hand() -> None:
    one = Case(1024, 1024, faces=1, fraction=2, rows=1)
    # Half the canvas: a bilinear sample of every second cell reads both, so all of the local residual. Skip, local,
    # global, result.
    assert merge_bytes(one) == 4 * ALL_LEVELS * HALF
    three = Case(1024, 1024, faces=2, fraction=2, rows=3)
    # Two encoder rows, four branch rows of each branch, three decoder rows.
    assert merge_bytes(three) == (2 + 4 + 4 + 3) * ALL_LEVELS * HALF
    assert crop_bytes(one) == 4 * (4 * 64 * 64 + HALF * 128 * 128)
    assert guide_bytes(three) == 4 * 128 * 128 * (8 + 3 * HALF)
    # One history and noise; two histories.
    assert guide_bytes(replace(three, histories=1, noise=True)) == 4 * 128 * 128 * (16 + 4 + 3 * HALF)
    assert guide_bytes(replace(three, histories=2)) == 4 * 128 * 128 * (24 + 3 * HALF)


@pytest.mark.parametrize("histories, noise, launches", [(0, False, 8), (1, True, 15), (2, False, 22)])
def test_torch_launches_of_a_step(histories: int, noise: bool, launches: int) -> None:
    """As torch counts them, without the widening of the predictions."""
    counted: list[str] = []

    class Counted(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            counted.append(func.__name__.split(".")[0])
            return func(*args, **(kwargs or {}))

    case = Case(64, 64, 1, 2, 3, histories, noise)
    inputs = GuideStep(OnCpu(), case)
    with Counted():
        inputs.plain()
    assert guide_launches(case) == launches == sum(name in ("mul", "add") for name in counted)


def test_small_faces_read_less() -> None:
    sizes = [merge_bytes(Case(1024, 1024, 4, fraction, 1)) for fraction in (2, 4, 7)]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 3


def test_boxes_lie_in_the_picture_at_every_level() -> None:
    for case in cases():
        for face in range(case.faces):
            for level in range(3):
                height, width = case.cells(level)
                x0, y0, x1, y1 = case.box(face, level)
                assert 0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height
    grid = Grid(1024, 1024, 8, 3, 8)
    box = Case(1024, 1024, 1, 4, 1).box(0, 0)
    assert snap_box([8 * v for v in box], grid).cells(0) == box


def test_a_dry_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--bandwidth", "1000", "--json", "--out", str(tmp_path / "kernels.json")]) == 0
    shown, said = capsys.readouterr()
    result = json.loads(shown)
    assert result == json.loads((tmp_path / "kernels.json").read_text())
    assert result["device"] is None and "dry run, no GPU: nothing was timed" in said
    merges = [row for row in result["cases"] if row["kernel"] == "relocate_merge"]
    assert len(merges) == 2 * 4 * 3 * 2 and all(row["launches"] == 1 for row in result["cases"])
    steps = [(row["histories"], row["noise"]) for row in result["cases"] if row["kernel"] == "guide_step"]
    assert steps == [(0, False)] * 2 * 4 + [(1, True), (2, False)] * 2
    for row in result["cases"]:
        assert row["floor_us"] == pytest.approx(row["bytes"] / 1e12 * 1e6) and "us" not in row
        assert row["torch_launches"] > row["launches"]


def test_no_bandwidth(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--bandwidth", "0"]) == 2
    assert "--bandwidth is 0, expected GB/s above 0." in capsys.readouterr().err


class OnCpu:
    """A `Machine` that has torch and nothing else."""

    name, architecture = "a CPU", "sm_90"

    @property
    def stream(self) -> Any:
        raise ImportError("No module named 'cuda'")

    def place(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def normal(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.randn(shape).to(dtype)

    def wait(self) -> None: ...

    def microseconds(self, work: Callable[[], object], queued: bool = True) -> float:
        start = time.perf_counter()
        work()
        return (time.perf_counter() - start) * 1e6

    def captured(self, work: Work) -> Callable[[], object]:
        return work


SMALL = Case(256, 256, faces=2, fraction=4, rows=3)


def test_torch_is_timed_where_the_fused_kernels_do_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = GpuBench(OnCpu(), tmp_path)
    assert bench.problem == "No module named 'cuda'"
    monkeypatch.setattr("benchmarks.kernels._gpu_bench", lambda: bench)
    monkeypatch.setattr("benchmarks.kernels.cases", lambda: [SMALL, Case(256, 256, 2, 2, 3)])
    for name, small in (("COPY_BYTES", 2**20), ("CANVAS", 32)):
        monkeypatch.setattr(f"benchmarks.torch_operations.{name}", small)
    assert main(["--json"]) == 0
    shown, said = capsys.readouterr()
    result = json.loads(shown)
    assert result["device"] == "a CPU" and result["fused_left_out"] == bench.problem
    assert [row["kernel"] for row in result["cases"]].count("relocate_merge") == 2
    for row in result["cases"]:
        assert row["torch_us"] > 0 and row["torch_graph_us"] > 0 and "us" not in row
    assert "the fused kernels were not timed: No module named 'cuda'" in said


def test_the_torch_operations_need_nothing_but_torch() -> None:
    """In a process that can import only the packages that torch brings with it."""
    with_torch, ours = (
        subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
        for program in (LOADED.format("import torch"), LOADED.format("import benchmarks.torch_operations"))
    )
    assert ours.returncode == 0, ours.stderr
    assert set(ours.stdout.split()) - set(with_torch.stdout.split()) == {"benchmarks"}
