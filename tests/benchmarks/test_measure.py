"""Clocks, spreads and ratios."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks import measure
from benchmarks.measure import differences, speed_ratio, spread, timed, turns

ROOT = Path(__file__).resolve().parents[2]


def test_contenders_take_turns() -> None:
    """Each is first, second and third equally often."""
    orders = [turns(("a", "b", "c"), number) for number in range(3)]
    assert orders == [["a", "b", "c"], ["b", "c", "a"], ["c", "a", "b"]]
    assert turns(("alone",), 7) == ["alone"]


def test_cores_that_were_lacking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one second, another process took half a core and the host a quarter. Outside of Linux this is unknown."""
    stat, tick = tmp_path / "stat", measure.os.sysconf("SC_CLK_TCK")
    monkeypatch.setattr(measure, "STAT", stat)
    monkeypatch.setattr(measure.os, "times", lambda: measure.os.times_result((0, 0, 0, 0, 0)))
    clock = iter([10.0, 11.0])
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(clock))

    def write(user: float, steal: float) -> None:
        stat.write_text(f"cpu  {user * tick:.0f} 0 0 900 9 0 0 {steal * tick:.0f} 0 0\ncpu0 1 2 3\n")

    write(1, 2)
    assert timed(lambda: write(1.5, 2.25)) == (None, 1000.0, {"cores_busy_elsewhere": 0.5, "cores_stolen": 0.25})
    stat.unlink()
    clock = iter([0.0, 1.0])
    assert timed(lambda: "made") == ("made", 1000.0, {})


def test_the_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if (ROOT / ".git").exists():
        assert re.fullmatch(r"[\w.-]+", measure.commit() or "")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert measure.commit(tmp_path) is None


def test_a_ratio_is_taken_within_each_round() -> None:
    ratio = speed_ratio([200.0, 900.0, 260.0], [100.0, 300.0, 200.0])
    assert ratio == {"median": 2.0, "min": 1.3, "max": 3.0, "pairs": [2.0, 3.0, 1.3]}


def test_spread_and_differences() -> None:
    assert spread([float(n) for n in range(101)]) == {
        "p50": 50.0, "p95": 95.0, "min": 0.0, "max": 100.0, "count": 101,
    }  # fmt: skip
    counts = [{"a": 2, "text": 1}, {"a": 4, "b": 3, "text": 1}]
    assert differences(counts, ("a", "b")) == [{"a": 2}, {"a": 2, "b": 3}]
