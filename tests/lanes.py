"""The tests that a run takes: everything, or the fast ones and a sixth of the slow ones.

`@pytest.mark.slow` marks a test that `make test` does not take every time. Six lanes share these tests, and the hash of
the commit that is checked out chooses the lane; `make test-all` takes them all. `slow("NAME")`: tests of one name
share a lane, because they share what is slow. `@pytest.mark.long` marks a test that no lane takes, since it installs
an environment or takes more than a minute: `make test-all` alone runs it.
"""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

import pytest

LANES = 6
ROOT = Path(__file__).resolve().parent.parent


def lane_of(name: str) -> int:
    """The lane of a slow test, 0 to 5, from its name. Adding a test does not move another one."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % LANES


def commit_number(folder: Path = ROOT) -> int:
    """The commit that is checked out, as a number; 0 without git."""
    line = ["git", "rev-parse", "HEAD"]
    try:
        return int(subprocess.run(line, cwd=folder, capture_output=True, text=True, check=True).stdout[:8], 16)
    except (OSError, subprocess.CalledProcessError):
        return 0


def asked_lane(text: str, folder: Path = ROOT) -> int | None:
    """The lane that --lane names: "all" (None), "commit" or its number. Raises pytest.UsageError."""
    if text == "all":
        return None
    if text == "commit":
        return commit_number(folder) % LANES
    if text.isdigit() and int(text) < LANES:
        return int(text)
    raise pytest.UsageError(f"--lane {text}: expected 0 to {LANES - 1}, commit or all")


def in_lane(item: pytest.Item, lane: int | None) -> bool:
    """Whether a run of this lane takes the test."""
    if lane is None or item.get_closest_marker("gpu"):
        return True
    if item.get_closest_marker("long"):
        return False
    slow = item.get_closest_marker("slow")
    return slow is None or lane_of(slow.args[0] if slow.args else item.nodeid) == lane
