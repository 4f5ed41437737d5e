"""Six lanes take every slow test once, and the commit says which one it is."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.lanes import LANES, asked_lane, commit_number, in_lane, lane_of


def item(name: str, *marks: pytest.MarkDecorator) -> Any:
    return SimpleNamespace(nodeid=name, get_closest_marker={mark.name: mark.mark for mark in marks}.get)


def lanes(of: Any) -> list[int]:
    return [lane for lane in range(LANES) if in_lane(of, lane)]


def test_every_slow_test_is_in_one_lane_and_every_lane_has_some() -> None:
    slow = [item(f"tests/test_x.py::test_y[{number}]", pytest.mark.slow) for number in range(100)]
    found = [lanes(test) for test in slow]
    assert all(len(lane) == 1 for lane in found) and {lane for [lane] in found} == set(range(LANES))
    assert all(in_lane(test, None) for test in slow)


def test_what_shares_what_is_slow_shares_a_lane() -> None:
    one, other = (item(f"tests/{name}.py::test", pytest.mark.slow("an engine")) for name in ("test_a", "test_b"))
    assert lanes(one) == lanes(other) == [lane_of("an engine")]


def test_other_tests() -> None:
    every = list(range(LANES))
    assert lanes(item("fast")) == every
    assert lanes(item("gpu", pytest.mark.gpu, pytest.mark.slow)) == every  # a run on a GPU takes them all
    long = item("long", pytest.mark.long, pytest.mark.slow)
    assert lanes(long) == [] and in_lane(long, None)


def test_the_commit_chooses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("GIT_")]:  # a git hook sets it, for its own repository
        monkeypatch.delenv(name)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    assert commit_number(tmp_path) == 0 and asked_lane("commit", tmp_path) == 0  # no git here
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@example.org"]
    for words in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "x"]):
        subprocess.run([*git, *words], cwd=tmp_path, check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    assert commit_number(tmp_path) == int(head[:8], 16)
    assert asked_lane("commit", tmp_path) == int(head[:8], 16) % LANES


def test_what_may_be_asked() -> None:
    assert asked_lane("all") is None and asked_lane("5") == 5
    for text in ("6", "-1", "slow", ""):
        with pytest.raises(pytest.UsageError, match="expected 0 to 5, commit or all"):
            asked_lane(text)
