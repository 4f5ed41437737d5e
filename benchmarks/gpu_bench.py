"""Times the fused kernels beside the torch operations that do the same. Needs a GPU, and torch for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from realisid_trt.kernels import compile as nvrtc
from realisid_trt.kernels import launch
from torch import Tensor

from realisid_trt.errors import ParityError
from realisid_trt.files import cache_folder

from .kernels import CANVAS, CHANNELS, LEVELS, SDXL

if TYPE_CHECKING:
    from .kernels import Case

ROUNDS = 20
COPY_BYTES = 2**30
FLUSH_BYTES = 2**28  # more than any second-level cache holds
TYPES = {torch.float32: "float32", torch.float16: "float16", torch.int32: "int32", torch.float64: "float64"}


class GpuBench:
    """The current device, its kernels compiled for it."""

    def __init__(self) -> None:
        from cuda.core import Device, Stream

        self._device = Device(torch.cuda.current_device())
        self._device.set_current()
        major, minor = self._device.compute_capability
        folder = cache_folder() / "kernels"
        folder.mkdir(parents=True, exist_ok=True)
        self._kernels = launch.Kernels.load(folder, nvrtc.compile_kernels(folder, [f"sm_{major}{minor}"]))
        self._torch_stream = torch.cuda.Stream()
        self._stream = Stream.from_handle(self._torch_stream.cuda_stream)
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
        self.device = f"{self._device.name} (sm_{major}{minor})"

    def copy_bandwidth(self) -> float:
        """GB/s of a copy from device to device, read and write counted: what "all of the bandwidth" means here."""
        source, target = (torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda") for _ in range(2))
        return 2 * COPY_BYTES / self._microseconds(lambda: target.copy_(source)) / 1e3

    def time(self, kernel: str, case: Case) -> dict[str, float]:
        """us, torch_us and torch_graph_us, each the median. Raises ParityError if the two do not agree."""
        with torch.cuda.stream(self._torch_stream), torch.inference_mode():
            fused, plain = getattr(self, f"_{kernel}")(case)
            self._compare(kernel, fused(), plain())
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=self._torch_stream):
                plain()
            return {
                "us": self._microseconds(fused),
                "torch_us": self._microseconds(plain),
                "torch_graph_us": self._microseconds(graph.replay),
            }

    def _microseconds(self, work: Callable[[], Any]) -> float:
        """Median over rounds; before each, the caches are filled with something else."""
        with torch.cuda.stream(self._torch_stream):
            for _ in range(3):
                work()
            taken = []
            for _ in range(ROUNDS):
                self._flush.zero_()
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                work()
                end.record()
                end.synchronize()
                taken.append(start.elapsed_time(end) * 1e3)
        return float(np.median(taken))

    def _compare(self, kernel: str, ours: list[Tensor], theirs: list[Tensor]) -> None:
        self._torch_stream.synchronize()
        for a, b in zip(ours, theirs, strict=True):
            if not torch.allclose(a.float(), b.float(), rtol=1e-2, atol=1e-2):
                worst = (a.float() - b.float()).abs().max().item()
                raise ParityError(f"{kernel} differs from torch by {worst:.3g}. Report this as a bug, with the GPU.")

    # Each: the fused kernel and the torch operations, as callables that return what they wrote.

    def _crop_upsample(self, case: Case) -> tuple[Callable[[], list[Tensor]], Callable[[], list[Tensor]]]:
        height, width = case.cells(0)
        boxes = [case.box(face, 0) for face in range(case.faces)]
        latents = torch.randn(1, CHANNELS, height, width, device="cuda")
        faces = torch.empty(case.faces, CHANNELS, CANVAS, CANVAS, dtype=torch.float16, device="cuda")
        given = [_array(x) for x in (latents, _ints([0] * case.faces), _ints(boxes), faces)]

        def fused() -> list[Tensor]:
            self._kernels.crop_upsample(self._stream, *(array for array, _ in given))
            return [faces]

        def plain() -> list[Tensor]:
            crops = [F.interpolate(latents[..., y0:y1, x0:x1], (CANVAS, CANVAS), mode="bilinear")
                     for x0, y0, x1, y1 in boxes]  # fmt: skip
            return [torch.cat(crops).half()]

        return fused, plain

    def _relocate_merge(self, case: Case) -> tuple[Callable[[], list[Tensor]], Callable[[], list[Tensor]]]:
        def maps(rows: int, channels: int, height: int, width: int) -> Tensor:
            return torch.randn(rows, channels, height, width, dtype=torch.float16, device="cuda")

        sizes = [(channels, *case.cells(level)) for channels, level in SDXL]
        skips = [maps(len(set(case.encoder_of)), *size) for size in sizes]
        whole = [maps(case.branch_rows, *size) for size in sizes]
        out = [maps(case.rows, *size) for size in sizes]
        local = [maps(case.branch_rows, channels, CANVAS >> level, CANVAS >> level) for channels, level in SDXL]
        boxes = [[case.box(row % case.faces, level) for level in range(LEVELS)] for row in range(case.branch_rows)]
        arrays = [[_array(x)[0] for x in group] for group in (skips, local, whole, out)]
        levels = launch.levels(*arrays, [level for _, level in SDXL])
        table = torch.from_numpy(levels.table.view(np.int32)).cuda()
        scales = torch.ones(case.rows, 2, device="cuda")
        given = [_array(x) for x in (table, _ints(case.encoder_of), _ints(case.branches_of), _ints(boxes), scales)]

        def fused() -> list[Tensor]:
            self._kernels.relocate_merge(self._stream, levels, *(array for array, _ in given), "bilinear", "sum")
            return out

        def plain() -> list[Tensor]:
            merged = []
            for skip, near, far, (_, level) in zip(skips, local, whole, SDXL, strict=True):
                injected: dict[tuple[int, ...], Tensor] = {}
                for rows in map(tuple, case.branches_of):
                    if rows not in injected:
                        total = far[rows[0] : rows[-1] + 1].mean(0, keepdim=True)
                        for row in rows:
                            x0, y0, x1, y1 = boxes[row][level]
                            total[..., y0:y1, x0:x1] += F.interpolate(
                                near[row : row + 1], (y1 - y0, x1 - x0), mode="bilinear"
                            )
                        injected[rows] = total
                parts = [skip[e : e + 1] + injected[tuple(rows)]
                         for e, rows in zip(case.encoder_of, case.branches_of, strict=True)]  # fmt: skip
                merged.append(torch.cat(parts))
            return merged

        return fused, plain

    def _guide_step(self, case: Case) -> tuple[Callable[[], list[Tensor]], Callable[[], list[Tensor]]]:
        shape = CHANNELS, *case.cells(0)
        latents, noise_pred = (
            torch.randn(1, *shape, device="cuda"),
            torch.randn(case.rows, *shape, device="cuda").half(),
        )
        kept = latents.clone()
        factors = [-6.5, 2.5, 5.0] if case.rows == 3 else [1.0, 0.0, 0.0]
        rows = list(range(case.rows)) + [-1] * (3 - case.rows)
        step, tickets = _ints([0]), _ints([0])
        weights = torch.tensor([factors], dtype=torch.float64, device="cuda")
        coefficients = torch.tensor([[1.0, 0.0]] * (ROUNDS + 10), dtype=torch.float64, device="cuda")
        coefficients[0] = torch.tensor([0.9, 0.1])
        given = [_array(x) for x in (latents, step, tickets, noise_pred, _ints([rows]), weights, coefficients)]

        def fused() -> list[Tensor]:
            self._kernels.guide_step(self._stream, *(array for array, _ in given))
            return [latents]

        def plain() -> list[Tensor]:
            predicted = sum(factor * row.float() for factor, row in zip(factors, noise_pred, strict=False))
            return [0.9 * kept + 0.1 * predicted]

        return fused, plain


def _ints(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device="cuda")


def _array(tensor: Tensor) -> tuple[launch.Array, Tensor]:
    """The tensor as the launcher takes it, and the tensor, which must live as long."""
    tensor = tensor.contiguous()
    return launch.Array(tensor.data_ptr(), tuple(tensor.shape), TYPES[tensor.dtype]), tensor
