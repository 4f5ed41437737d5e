"""Torch on the machine that is measured: the baselines' device, settings and clock."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from realisid_trt.backends import Usage
from realisid_trt.errors import RequestError


def beside(device: str) -> torch.device:
    """Torch's name of the device that an engine names "cpu", "cpu:N", "cuda" or "cuda:N".

    Makes a GPU torch's current one. Raises RequestError if this torch cannot use it.
    """
    kind, _, number = device.partition(":")
    if kind != "cuda":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise RequestError(
            f"torch {torch.__version__} cannot use a GPU, and a baseline computes beside the engine, which is on "
            f"{device}. Install a CUDA build of torch, or measure the engine alone with --baseline none."
        )
    torch.cuda.set_device(int(number or 0))
    return torch.device("cuda", int(number or 0))


@contextmanager
def settings(threads: int, precision: str) -> Iterator[None]:
    """A context in which torch computes as the engine does. Restores the settings afterwards.

    It uses this many threads, and TF32 unless the precision is float32. On a GPU it tries every convolution algorithm
    of cuDNN, which happens in the warm-up.
    """
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = torch.get_num_threads(), matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark
    torch.set_num_threads(threads)
    matmul.allow_tf32 = cudnn.allow_tf32 = precision != "float32"
    cudnn.benchmark = True
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark = before[1:]


class Clock:
    """Markers of torch's work: the time on a CPU; on a GPU events on its stream, without waiting in the loop."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"

    def stamp(self) -> Any:
        """A marker after all work that was enqueued so far."""
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def wait_for(self, stamp: Any) -> None:
        """Returns when all work before this marker is done."""
        if self._on_gpu:
            stamp.synchronize()

    def elapsed_ms(self, stamps: Sequence[Any]) -> list[float]:
        """Milliseconds between consecutive markers; waits for the last one."""
        self.wait_for(stamps[-1])
        return [self._between(earlier, later) for earlier, later in zip(stamps, stamps[1:], strict=False)]

    def _between(self, earlier: Any, later: Any) -> float:
        return float(earlier.elapsed_time(later)) if self._on_gpu else (later - earlier) * 1e3


class ClockedUsage(Usage):
    """Usage, timed by a Clock. Reading `ms` waits for the last measured call."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self._clock = clock
        self._pending: list[tuple[str, Any, Any]] = []

    @contextmanager
    def measure(self, name: str, rows: int = 0) -> Iterator[None]:
        start = self._clock.stamp()
        yield
        self.add_between(name, rows, start, self._clock.stamp())

    def add_between(self, name: str, rows: int, start: Any, end: Any) -> None:
        """Adds rows, and the time between two markers."""
        self._pending.append((name, start, end))
        self.add(name, rows, 0.0)

    @property
    def ms(self) -> dict[str, float]:
        """Milliseconds by name."""
        for name, *ends in self._pending:
            self.add(name, 0, *self._clock.elapsed_ms(ends))
        self._pending.clear()
        return self._ms
