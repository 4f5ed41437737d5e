"""Milliseconds by stage, and the table that people read."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager


class Stopwatch:
    """`with watch("text"): …` adds to `watch.ms["text"]`."""

    def __init__(self) -> None:
        self.ms: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.ms[stage] = self.ms.get(stage, 0.0) + (time.perf_counter() - start) * 1e3


def timing_table(timings: Mapping[str, float], rows: Mapping[str, int]) -> list[str]:
    """A line per stage of a Result: milliseconds, and rows where a network ran. Parts of a stage are indented."""
    lines = [f"{'stage':<24}{'ms':>10}{'rows':>8}"]
    for stage, ms in timings.items():
        _, _, part = stage.partition(".")
        lines.append(f"{'  ' + part if part else stage:<24}{ms:>10.1f}{rows.get(part, ''):>8}")
    return lines
