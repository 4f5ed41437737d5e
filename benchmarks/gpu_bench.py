"""Times the fused kernels beside the torch operations that do the same, on the same memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from realisid_trt.errors import ParityError
from realisid_trt.files import cache_folder
from realisid_trt.kernels import EVERYWHERE, RELOCATED, launch
from realisid_trt.kernels import compile as nvrtc

from .cases import CANVAS, CHANNELS, SDXL, Case
from .torch_operations import (
    OPERATIONS,
    ROUNDS,
    WARM,
    CropUpsample,
    GuideStep,
    Inputs,
    Machine,
    RelocateMerge,
    Work,
    copy_bandwidth,
    time_torch,
)

TYPES = {torch.float32: "float32", torch.float16: "float16", torch.int32: "int32", torch.float64: "float64"}


class GpuBench:
    """The kernels, compiled for a machine, and the torch operations that they are compared with.

    problem: the reason why the fused kernels do not run here, though torch does; or None.
    """

    def __init__(self, machine: Machine, folder: Path | None = None) -> None:
        """folder: for compiled kernels; None: the cache."""
        self._machine = machine
        self._kernels: launch.Kernels | None = None
        self.problem: str | None = None
        folder = folder or cache_folder() / "kernels"
        folder.mkdir(parents=True, exist_ok=True)
        try:
            self._stream = machine.stream
            self._kernels = launch.Kernels.load(folder, nvrtc.compile_kernels(folder, [machine.architecture]))
        except Exception as error:  # cuda.core's exceptions have no common base
            self.problem = str(error) or type(error).__name__

    @property
    def device(self) -> str:
        return self._machine.name

    def copy_bandwidth(self) -> float:
        return copy_bandwidth(self._machine)

    @torch.inference_mode()
    def time(self, kernel: str, case: Case) -> dict[str, float]:
        """torch_us and torch_graph_us, and where the fused kernels run, us; each the median.

        Raises ParityError if the two do not agree.
        """
        inputs = OPERATIONS[kernel](self._machine, case)
        if self._kernels is None:
            return time_torch(self._machine, inputs.plain)
        fused = self.fused(inputs, case)
        self.compare(kernel, fused, inputs)
        return {"us": self._machine.microseconds(fused), **time_torch(self._machine, inputs.plain)}

    def compare(self, kernel: str, fused: Work, inputs: Inputs) -> None:
        """Raises ParityError if the kernel's error is too large.

        It may be twice the error of torch's operations plus one rounding of the largest value, all against float64.
        """
        ours, theirs = fused(), inputs.plain()
        self._machine.wait()
        for a, b, true in zip(ours, theirs, inputs.exact(), strict=True):
            error, plain_error = ((result.double() - true).abs().max().item() for result in (a, b))
            bound = 2 * plain_error + torch.finfo(a.dtype).eps * true.abs().max().item()
            if not error <= bound:
                raise ParityError(
                    f"{kernel} has an error of {error:.3g} against float64, torch's operations {plain_error:.3g}; at "
                    f"most {bound:.3g} is accepted. Report this as a bug, with the GPU."
                )

    def fused(self, inputs: Inputs, case: Case) -> Work:
        """The kernel on these inputs, as a callable that returns what it wrote."""
        if isinstance(inputs, CropUpsample):
            return self._crop_upsample(inputs, case)
        return self._relocate_merge(inputs, case) if isinstance(inputs, RelocateMerge) else self._guide_step(inputs)

    def _crop_upsample(self, inputs: CropUpsample, case: Case) -> Work:
        faces = self._empty(case.faces, CHANNELS, CANVAS, CANVAS)
        given = inputs.latents, self._ints([0] * case.faces), self._ints(inputs.boxes), faces

        def work() -> list[Tensor]:
            self._launcher.crop_upsample(self._stream, *map(_array, given))
            return [faces]

        return work

    def _relocate_merge(self, inputs: RelocateMerge, case: Case) -> Work:
        """Two sources: the local branch's rows, relocated and summed, and the global branch's, averaged."""
        out = [self._empty(case.rows, *skip.shape[1:]) for skip in inputs.skips]
        groups = inputs.skips, inputs.local, inputs.whole, out
        skips, local, whole, merged = ([_array(tensor) for tensor in group] for group in groups)
        levels = launch.levels(skips, [local, whole], merged, [level for _, level in SDXL])
        tables = [
            self._machine.place(torch.from_numpy(table.view(np.int32).copy()))
            for table in (levels.table, levels.sources)
        ]
        encoder_of = self._ints(case.encoder_of)
        rows_of = self._ints([[rows, rows] for rows in case.branches_of])
        scales = self._machine.place(torch.ones(case.rows, 2))
        rules = self._ints([(RELOCATED, 0, 0), (EVERYWHERE, 1, -1)])
        given = *tables, encoder_of, rows_of, scales, rules, self._ints(inputs.boxes)

        def work() -> list[Tensor]:
            self._launcher.relocate_merge(self._stream, levels, *map(_array, given), "bilinear", "sum")
            return out

        return work

    def _guide_step(self, inputs: GuideStep) -> Work:
        place, count = self._machine.place, len(inputs.noise_pred)
        rows = [*range(count), *[-1] * (3 - count)]
        matrix = place(torch.tensor([inputs.matrix] * (WARM + ROUNDS + 2), dtype=torch.float64))  # for every call
        weights = place(torch.tensor([inputs.factors], dtype=torch.float64))
        tensors = (
            inputs.latents,
            inputs.histories,
            self._ints([0]),  # step
            self._ints([0]),  # tickets
            inputs.noise_pred,
            self._ints([rows]),
            weights,
            matrix,
            inputs.noise,
        )
        given = [None if tensor is None else _array(tensor) for tensor in tensors]

        def work() -> list[Tensor]:
            self._launcher.guide_step(self._stream, *given, preview=None)
            return inputs.written()

        return work

    @property
    def _launcher(self) -> launch.Kernels:
        assert self._kernels is not None, self.problem
        return self._kernels

    def _empty(self, *shape: int) -> Tensor:
        return self._machine.normal(*shape, dtype=torch.float16)

    def _ints(self, values: Any) -> Tensor:
        return self._machine.place(torch.tensor(values, dtype=torch.int32))


def _array(tensor: Tensor) -> launch.Array:
    """A contiguous tensor as the launcher takes it."""
    assert tensor.is_contiguous()
    return launch.Array(tensor.data_ptr(), tuple(tensor.shape), TYPES[tensor.dtype])
