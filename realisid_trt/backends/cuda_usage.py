"""The milliseconds of networks and kernels on a GPU, by its own clock."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from . import Usage
from .cuda_memory import Gpu, gpu_errors


class GpuUsage(Usage):
    """Usage in the GPU's own milliseconds, measured between two events. Reading `ms` waits for the events."""

    def __init__(self, gpu: Gpu) -> None:
        super().__init__()
        self._gpu = gpu
        self._pending: list[tuple[str, Any, Any]] = []
        self.replayed: set[str] = set()  # also ran inside graphs: their milliseconds would be incomplete

    @contextmanager
    def measure(self, name: str, rows: int) -> Iterator[None]:
        if self._gpu.capturing:  # work inside a graph has no events of its own
            self.add(name, rows, 0.0)
            yield
            return
        start = self._gpu.stamp()
        yield
        self._pending.append((name, start, self._gpu.stamp()))
        self.add(name, rows, 0.0)

    @property
    def ms(self) -> dict[str, float]:
        """Milliseconds by name; waits for the last measured call."""
        for name, start, end in self._pending:
            with gpu_errors():
                end.sync()
            self.add(name, 0, end - start)
        self._pending.clear()
        return {name: ms for name, ms in self._ms.items() if name not in self.replayed}
