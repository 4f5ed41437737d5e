"""What networks and kernels took on a GPU, by its own clock."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from . import Usage
from .cuda_memory import Gpu, gpu_errors


class GpuUsage(Usage):
    """Usage whose milliseconds are the GPU's own, between two events; they are read when somebody asks."""

    def __init__(self, gpu: Gpu) -> None:
        super().__init__()
        self._gpu = gpu
        self._pending: list[tuple[str, Any, Any]] = []
        self.replayed: set[str] = set()  # ran inside graphs too, so their milliseconds would be a part only

    @contextmanager
    def measure(self, name: str, rows: int) -> Iterator[None]:
        if self._gpu.capturing:  # what a graph replays has no times of its own
            self.add(name, rows, 0.0)
            yield
            return
        start = self._gpu.stamp()
        yield
        self._pending.append((name, start, self._gpu.stamp()))
        self.add(name, rows, 0.0)

    @property
    def ms(self) -> dict[str, float]:
        """Milliseconds by name; waits for what was asked for last."""
        for name, start, end in self._pending:
            with gpu_errors():
                end.sync()
            self.add(name, 0, end - start)
        self._pending.clear()
        return {name: ms for name, ms in self._ms.items() if name not in self.replayed}
