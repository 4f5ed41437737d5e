"""Times the fused kernels beside the torch operations that do the same, on the same memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from realisid_trt.errors import ParityError
from realisid_trt.files import cache_folder
from realisid_trt.kernels import compile as nvrtc
from realisid_trt.kernels import launch

from .kernels import CANVAS, CHANNELS, LEVELS, SDXL

if TYPE_CHECKING:
    from .kernels import Case

ROUNDS, WARM = 20, 3
COPY_BYTES = 2**30
SLEEP_CYCLES = 3_000_000  # more than a millisecond
FLUSH_BYTES = 2**28  # more than any second-level cache holds
TYPES = {torch.float32: "float32", torch.float16: "float16", torch.int32: "int32", torch.float64: "float64"}
Work = Callable[[], list[Tensor]]


class Machine(Protocol):
    """Where it runs. `TorchCuda`; the tests have one without a GPU."""

    name: str
    architecture: str
    stream: Any  # cuda.core's

    def place(self, tensor: Tensor) -> Tensor:
        """The tensor on the device."""

    def wait(self) -> None: ...

    def microseconds(self, work: Callable[[], object], queued: bool = True) -> float:
        """Median over rounds, with cold caches. queued: the GPU is kept busy while Python launches, so that only the
        GPU's own time counts."""

    def captured(self, work: Work) -> Callable[[], object]:
        """The same as a CUDA graph."""


class TorchCuda:
    """Torch's current CUDA device, on a stream of its own."""

    def __init__(self) -> None:
        from cuda.core import Device, Stream

        device = Device(torch.cuda.current_device())
        device.set_current()
        major, minor = device.compute_capability
        self.name, self.architecture = f"{device.name} (sm_{major}{minor})", f"sm_{major}{minor}"
        self._stream = torch.cuda.Stream()
        self.stream = Stream.from_handle(self._stream.cuda_stream)
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")

    def place(self, tensor: Tensor) -> Tensor:
        placed = tensor.cuda()
        torch.cuda.synchronize()
        return placed

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
        return float(np.median(taken[WARM:]))

    def captured(self, work: Work) -> Callable[[], object]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._stream):
            work()
            with torch.cuda.graph(graph, stream=self._stream):
                work()
        replay: Callable[[], object] = graph.replay
        return replay


class GpuBench:
    """The kernels, compiled for a machine, and what they are compared with."""

    def __init__(self, machine: Machine, folder: Path | None = None) -> None:
        """folder: for what is compiled; None: the cache."""
        folder = folder or cache_folder() / "kernels"
        folder.mkdir(parents=True, exist_ok=True)
        self._machine = machine
        self._kernels = launch.Kernels.load(folder, nvrtc.compile_kernels(folder, [machine.architecture]))
        self._random = torch.Generator().manual_seed(0)

    @property
    def device(self) -> str:
        return self._machine.name

    def copy_bandwidth(self) -> float:
        """GB/s of a copy from device to device, read and write counted: what "all of the bandwidth" means here."""
        source, target = (self._machine.place(torch.zeros(COPY_BYTES, dtype=torch.uint8)) for _ in range(2))
        return 2 * COPY_BYTES / self._machine.microseconds(lambda: target.copy_(source)) / 1e3

    @torch.inference_mode()
    def time(self, kernel: str, case: Case) -> dict[str, float]:
        """us, torch_us and torch_graph_us, each the median. Raises ParityError if the two do not agree."""
        fused, plain = getattr(self, f"_{kernel}")(case)
        self.compare(kernel, fused, plain)
        return {
            "us": self._machine.microseconds(fused),
            "torch_us": self._machine.microseconds(plain, queued=False),  # eagerly, as Python launches it
            "torch_graph_us": self._machine.microseconds(self._machine.captured(plain)),
        }

    def compare(self, kernel: str, fused: Work, plain: Work) -> None:
        """Raises ParityError unless both write the same, to half precision."""
        ours, theirs = fused(), plain()
        self._machine.wait()
        for a, b in zip(ours, theirs, strict=True):
            if not torch.allclose(a.float(), b.float(), rtol=1e-2, atol=1e-2):
                worst = (a.float() - b.float()).abs().max().item()
                raise ParityError(f"{kernel} differs from torch by {worst:.3g}. Report this as a bug, with the GPU.")

    # Each: the fused kernel and the torch operations, as callables that return what they wrote.

    def _crop_upsample(self, case: Case) -> tuple[Work, Work]:
        boxes = [case.box(face, 0) for face in range(case.faces)]
        latents = self._normal(1, CHANNELS, *case.cells(0))
        faces = self._half(case.faces, CHANNELS, CANVAS, CANVAS)
        given = latents, self._ints([0] * case.faces), self._ints(boxes), faces

        def fused() -> list[Tensor]:
            self._kernels.crop_upsample(self._machine.stream, *map(_array, given))
            return [faces]

        def plain() -> list[Tensor]:
            crops = [latents[..., y0:y1, x0:x1] for x0, y0, x1, y1 in boxes]
            return [torch.cat([F.interpolate(crop, (CANVAS, CANVAS), mode="bilinear") for crop in crops]).half()]

        return fused, plain

    def _relocate_merge(self, case: Case) -> tuple[Work, Work]:
        sizes = [(channels, *case.cells(level)) for channels, level in SDXL]
        canvases = [(channels, CANVAS >> level, CANVAS >> level) for channels, level in SDXL]
        skips = [self._half(len(set(case.encoder_of)), *size) for size in sizes]
        local = [self._half(case.branch_rows, *size) for size in canvases]
        whole = [self._half(case.branch_rows, *size) for size in sizes]
        out = [self._half(case.rows, *size) for size in sizes]
        boxes = [[case.box(row % case.faces, level) for level in range(LEVELS)] for row in range(case.branch_rows)]
        groups = [[_array(tensor) for tensor in group] for group in (skips, local, whole, out)]
        levels = launch.levels(*groups, [level for _, level in SDXL])
        table = self._machine.place(torch.from_numpy(levels.table.view(np.int32).copy()))
        scales = self._machine.place(torch.ones(case.rows, 2))
        given = table, *map(self._ints, (case.encoder_of, case.branches_of, boxes)), scales

        def fused() -> list[Tensor]:
            stream = self._machine.stream
            self._kernels.relocate_merge(stream, levels, *map(_array, given), "bilinear", "sum")
            return out

        def plain() -> list[Tensor]:
            merged = []
            for skip, near, far, (_, level) in zip(skips, local, whole, SDXL, strict=True):
                injected: dict[tuple[int, ...], Tensor] = {}
                for rows in dict.fromkeys(map(tuple, case.branches_of)):
                    total = far[rows[0] : rows[-1] + 1].mean(0, keepdim=True)
                    for row in rows:
                        x0, y0, x1, y1 = boxes[row][level]
                        small = F.interpolate(near[row : row + 1], (y1 - y0, x1 - x0), mode="bilinear")
                        total[..., y0:y1, x0:x1] += small
                    injected[rows] = total
                pairs = zip(case.encoder_of, map(tuple, case.branches_of), strict=True)
                merged.append(torch.cat([skip[encoder : encoder + 1] + injected[rows] for encoder, rows in pairs]))
            return merged

        return fused, plain

    def _guide_step(self, case: Case) -> tuple[Work, Work]:
        shape = CHANNELS, *case.cells(0)
        latents, noise_pred = self._normal(1, *shape), self._half(case.rows, *shape)
        before = latents.clone()
        factors = [-6.5, 2.5, 5.0] if case.rows == 3 else [1.0, 0.0, 0.0]
        rows = [*range(case.rows), *[-1] * (3 - case.rows)]
        place = self._machine.place
        # The first step is compared; those behind it only take their time.
        coefficients = place(torch.tensor([[0.9, 0.1], *[[1.0, 0.0]] * (WARM + ROUNDS + 1)], dtype=torch.float64))
        weights = place(torch.tensor([factors], dtype=torch.float64))
        given = latents, self._ints([0]), self._ints([0]), noise_pred, self._ints([rows]), weights, coefficients

        def fused() -> list[Tensor]:
            self._kernels.guide_step(self._machine.stream, *map(_array, given))
            return [latents]

        def plain() -> list[Tensor]:
            none, *others = noise_pred.float().split(1)
            predicted = factors[0] * none
            for factor, row in zip(factors[1:], others, strict=False):
                predicted = predicted + factor * row
            return [0.9 * before + 0.1 * predicted]

        return fused, plain

    def _normal(self, *shape: int) -> Tensor:
        return self._machine.place(torch.randn(shape, generator=self._random))

    def _half(self, *shape: int) -> Tensor:
        return self._machine.place(torch.randn(shape, generator=self._random).half())

    def _ints(self, values: Any) -> Tensor:
        return self._machine.place(torch.tensor(values, dtype=torch.int32))


def _array(tensor: Tensor) -> launch.Array:
    """A contiguous tensor as the launcher takes it."""
    assert tensor.is_contiguous()
    return launch.Array(tensor.data_ptr(), tuple(tensor.shape), TYPES[tensor.dtype])
