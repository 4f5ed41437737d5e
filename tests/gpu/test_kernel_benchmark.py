"""The kernel benchmark times the same work for kernel and torch: on a GPU, or rehearsed in the stand-in's memory."""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.cases import Case
from benchmarks.gpu_bench import GpuBench
from benchmarks.torch_operations import GuideStep, TorchCuda
from realisid_trt.errors import ParityError
from tests.gpu.conftest import REHEARSAL

SMALL = Case(256, 256, faces=2, fraction=4, rows=3)


class StandInMachine:
    """A `Machine` whose device memory is the stand-in's, which torch on a CPU can read."""

    name = "stand-in"

    def __init__(self) -> None:
        from cuda.core import Device

        self._device = Device(0)
        self.architecture = "sm_{}{}".format(*self._device.compute_capability)
        self._device.set_current()
        self.stream = self._device.create_stream()
        self._kept: list[Any] = []
        self._random = torch.Generator().manual_seed(0)

    def normal(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        return self.place(torch.randn(shape, generator=self._random).to(dtype))

    def place(self, tensor: torch.Tensor) -> torch.Tensor:
        buffer = self._device.allocate(tensor.numel() * tensor.element_size(), stream=self.stream)
        self._kept.append(buffer)
        memory = (ctypes.c_char * buffer.size).from_address(int(buffer.handle))
        placed = torch.frombuffer(memory, dtype=tensor.dtype).view(tensor.shape)
        return placed.copy_(tensor)

    def wait(self) -> None:
        self.stream.sync()

    def microseconds(self, work: Callable[[], object], queued: bool = True) -> float:
        start = time.perf_counter()
        work()
        self.wait()
        return (time.perf_counter() - start) * 1e6

    def captured(self, work: Callable[[], Any]) -> Callable[[], object]:
        return work


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> GpuBench:
    machine = StandInMachine() if REHEARSAL else TorchCuda()
    return GpuBench(machine, tmp_path_factory.mktemp("kernels"))


STATES = (1, True), (2, False), (2, True), (0, True)  # histories and noise of a sampler


@pytest.mark.parametrize(
    "kernel, case",
    [
        *itertools.product(("crop_upsample", "relocate_merge", "guide_step"), (SMALL, Case(256, 192, 1, 2, rows=1))),
        *(("guide_step", Case(256, 192, 1, 2, 3, *state)) for state in STATES),
    ],
)
def test_kernel_and_torch_do_the_same(bench: GpuBench, kernel: str, case: Case) -> None:
    figures = bench.time(kernel, case)  # it compares results before it times
    assert set(figures) == {"us", "torch_us", "torch_graph_us"} and all(value > 0 for value in figures.values())


@pytest.mark.parametrize("place", range(3))
def test_another_result_is_no_time(bench: GpuBench, place: int) -> None:
    """Latents, or one of two histories, that should have started from other values."""
    case = dataclasses.replace(SMALL, histories=2)
    inputs = GuideStep(bench._machine, case)
    bench.compare("guide_step", bench.fused(inputs, case), inputs)
    inputs.before[place] *= 1 + 1e-4
    with pytest.raises(ParityError, match=r"guide_step has an error of \S+ against float64, torch's operations"):
        bench.compare("guide_step", inputs.written, inputs)
