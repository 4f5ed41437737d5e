"""The torch operations that the fused kernels are compared with, on a GPU or elsewhere. Needs nothing but torch."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .cases import CANVAS, CHANNELS, LEVELS, SDXL, Case

ROUNDS, WARM = 20, 3
COPY_BYTES = 2**30
SLEEP_CYCLES = 3_000_000  # more than a millisecond
FLUSH_BYTES = 2**28  # more than any second-level cache holds
Work = Callable[[], list[Tensor]]


class Machine(Protocol):
    """The device of the operations: `TorchCuda`; the tests have one without a GPU."""

    name: str
    architecture: str

    @property
    def stream(self) -> Any:
        """cuda.core's stream, for the fused kernels. Raises ImportError without cuda-core."""

    def place(self, tensor: Tensor) -> Tensor:
        """The tensor on the device."""

    def normal(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Standard normal numbers on the device."""

    def wait(self) -> None: ...

    def microseconds(self, work: Callable[[], object], queued: bool = True) -> float:
        """Median over rounds, with cold caches.

        queued: the GPU is kept busy while Python launches, so that only the GPU's own time counts.
        """

    def captured(self, work: Work) -> Callable[[], object]:
        """The function that replays the work, captured as a CUDA graph."""


class TorchCuda:
    """Torch's current CUDA device, on a stream of its own."""

    def __init__(self) -> None:
        major, minor = torch.cuda.get_device_capability()
        self.architecture = f"sm_{major}{minor}"
        self.name = f"{torch.cuda.get_device_name()} ({self.architecture})"
        self._stream = torch.cuda.Stream()
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
        self._random = torch.Generator("cuda").manual_seed(0)

    @functools.cached_property
    def stream(self) -> Any:
        from cuda.core import Device, Stream

        Device(torch.cuda.current_device()).set_current()
        return Stream.from_handle(self._stream.cuda_stream)

    def place(self, tensor: Tensor) -> Tensor:
        placed = tensor.cuda()
        torch.cuda.synchronize()
        return placed

    def normal(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Drawn on the GPU: on a CPU, the residuals of eight faces alone take ten seconds."""
        drawn = torch.randn(shape, dtype=dtype, device="cuda", generator=self._random)
        torch.cuda.synchronize()
        return drawn

    def wait(self) -> None:
        torch.cuda.synchronize()

    def microseconds(self, work: Callable[[], object], queued: bool = True) -> float:
        taken = []
        with torch.cuda.stream(self._stream):
            for _ in range(WARM + ROUNDS):
                self._flush.zero_()
                if queued:
                    torch.cuda._sleep(SLEEP_CYCLES)
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                work()
                end.record()
                end.synchronize()
                taken.append(start.elapsed_time(end) * 1e3)
        return float(statistics.median(taken[WARM:]))

    def captured(self, work: Work) -> Callable[[], object]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._stream):
            work()
            with torch.cuda.graph(graph, stream=self._stream):
                work()
        replay: Callable[[], object] = graph.replay
        return replay


def copy_bandwidth(machine: Machine) -> float:
    """GB/s of a copy from device to device, read and write counted. Floors are computed with this bandwidth."""
    source, target = (machine.place(torch.zeros(COPY_BYTES, dtype=torch.uint8)) for _ in range(2))
    return 2 * COPY_BYTES / machine.microseconds(lambda: target.copy_(source)) / 1e3


@torch.inference_mode()
def time_torch(machine: Machine, work: Work) -> dict[str, float]:
    """torch_us, launched by Python one by one, and torch_graph_us; each the median."""
    return {
        "torch_us": machine.microseconds(work, queued=False),
        "torch_graph_us": machine.microseconds(machine.captured(work)),
    }


# Each class has the inputs of a kernel at one shape, the torch operations that do the same (`plain`), and these in
# float64 (`exact`), one result after another: all at once would not fit into smaller cards.


class CropUpsample:
    def __init__(self, machine: Machine, case: Case) -> None:
        self.boxes = [case.box(face, 0) for face in range(case.faces)]
        self.latents = machine.normal(1, CHANNELS, *case.cells(0), dtype=torch.float32)

    def plain(self) -> list[Tensor]:
        return [self._resized(self.latents).half()]

    def exact(self) -> Iterator[Tensor]:
        yield self._resized(self.latents.double())

    def _resized(self, latents: Tensor) -> Tensor:
        crops = [latents[..., y0:y1, x0:x1] for x0, y0, x1, y1 in self.boxes]
        return torch.cat([F.interpolate(crop, (CANVAS, CANVAS), mode="bilinear") for crop in crops])


class RelocateMerge:
    def __init__(self, machine: Machine, case: Case) -> None:
        sizes = [(channels, *case.cells(level)) for channels, level in SDXL]
        canvases = [(channels, CANVAS >> level, CANVAS >> level) for channels, level in SDXL]
        half = functools.partial(machine.normal, dtype=torch.float16)
        self.case = case
        self.skips = [half(len(set(case.encoder_of)), *size) for size in sizes]
        self.local = [half(case.branch_rows, *size) for size in canvases]
        self.whole = [half(case.branch_rows, *size) for size in sizes]
        self.boxes = [[case.box(row % case.faces, level) for level in range(LEVELS)] for row in range(case.branch_rows)]

    def plain(self) -> list[Tensor]:
        return [self._merged(level, *tensors) for level, *tensors in self._entries()]

    def exact(self) -> Iterator[Tensor]:
        return (self._merged(level, *(tensor.double() for tensor in tensors)) for level, *tensors in self._entries())

    def _entries(self) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
        return zip((level for _, level in SDXL), self.skips, self.local, self.whole, strict=True)

    def _merged(self, level: int, skip: Tensor, local: Tensor, whole: Tensor) -> Tensor:
        injected: dict[tuple[int, ...], Tensor] = {}
        for rows in dict.fromkeys(map(tuple, self.case.branches_of)):
            total = whole[rows[0] : rows[-1] + 1].mean(0, keepdim=True)
            for row in rows:
                x0, y0, x1, y1 = self.boxes[row][level]
                small = F.interpolate(local[row : row + 1], (y1 - y0, x1 - x0), mode="bilinear")
                total[..., y0:y1, x0:x1] += small
            injected[rows] = total
        pairs = zip(self.case.encoder_of, map(tuple, self.case.branches_of), strict=True)
        return torch.cat([skip[encoder : encoder + 1] + injected[rows] for encoder, rows in pairs])


class GuideStep:
    def __init__(self, machine: Machine, case: Case) -> None:
        shape = CHANNELS, *case.cells(0)
        normal = functools.partial(machine.normal, dtype=torch.float32)
        self.latents = normal(1, *shape)
        self.histories = normal(1, case.histories, *shape) if case.histories else None
        self.noise = normal(1, *shape) if case.noise else None
        self.before = [array.clone() for array in self.written()]  # the fused kernel writes where it reads
        self.noise_pred = machine.normal(case.rows, *shape, dtype=torch.float16)
        self.factors = [-6.5, 2.5, 5.0] if case.rows == 3 else [1.0, 0.0, 0.0]
        self.matrix = case.matrix

    def written(self) -> list[Tensor]:
        """Latents and histories, as they are now, (1, C, H, W) each."""
        return [self.latents, *([] if self.histories is None else self.histories.unbind(1))]

    def plain(self) -> list[Tensor]:
        return list(self._guided(torch.float32))

    def exact(self) -> Iterator[Tensor]:
        return self._guided(torch.float64)

    def _guided(self, dtype: torch.dtype) -> Iterator[Tensor]:
        latents, *histories = (array.to(dtype) for array in self.before)
        none, *others = self.noise_pred.to(dtype).split(1)
        predicted = self.factors[0] * none
        for factor, row in zip(self.factors[1:], others, strict=False):
            predicted = predicted + factor * row
        terms = dict(enumerate([latents, predicted, *histories]))
        if self.noise is not None:
            terms[4] = self.noise.to(dtype)
        for line, _ in zip(self.matrix, self.before, strict=False):
            first, *rest = [line[column] * term for column, term in terms.items() if line[column]]
            yield sum(rest, first)


Inputs = CropUpsample | RelocateMerge | GuideStep
OPERATIONS: dict[str, type[CropUpsample] | type[RelocateMerge] | type[GuideStep]] = {
    "crop_upsample": CropUpsample,
    "relocate_merge": RelocateMerge,
    "guide_step": GuideStep,
}
