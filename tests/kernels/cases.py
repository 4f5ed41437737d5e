"""Random inputs of the kernels, their results by the references, and their launches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

import realisid_trt.kernels as reference
from realisid_trt.kernels import launch
from realisid_trt.kernels.launch import Array
from realisid_trt.loop.rows import PictureRows, RowPlan, guidance_weights, plan_rows
from tests.kernels.bench import rounded

Floats = NDArray[np.float32]
TYPES = ("float32", "float16", "bfloat16")


def rectangle(rng: np.random.Generator, height: int, width: int) -> tuple[int, int, int, int]:
    """Any box in it; one in eight is all of it."""
    if rng.integers(8) == 0:
        return 0, 0, width, height
    x0, y0 = int(rng.integers(0, width)), int(rng.integers(0, height))
    return x0, y0, int(rng.integers(x0 + 1, width + 1)), int(rng.integers(y0 + 1, height + 1))


def draw(rng: np.random.Generator, dtype: str, *shape: int) -> Floats:
    """Normal numbers that exist in that type."""
    return rounded(rng.standard_normal(shape, dtype=np.float32), dtype)


def row_plan(rng: np.random.Generator, most_persons: int = 8) -> tuple[RowPlan, int]:
    """A step of 1-4 pictures with 0-8 persons each, as the runtime plans it; and the number of persons."""
    counts = rng.integers(0, most_persons + 1, rng.integers(1, 5))
    pictures, persons = [], 0
    for picture, count in enumerate(counts):
        guidance_scale, id_guidance_scale = rng.choice([1.0, 5.0, 7.5]), rng.choice([0.0, 1.0, 5.0])
        weights = guidance_weights(guidance_scale, id_guidance_scale, with_id=count > 0 and bool(rng.integers(3)))
        branches = bool(rng.integers(4)), bool(rng.integers(4))
        pictures.append(PictureRows((0, 1 + picture), tuple(range(persons, persons + count)), weights, branches))
        persons += count
    return plan_rows(pictures, per_row_pooled=bool(rng.integers(2)), share=bool(rng.integers(4))), persons


@dataclass(frozen=True)
class Crop:
    """Arguments of crop_upsample."""

    latents: Floats
    pictures: NDArray[np.int32]
    boxes: NDArray[np.int32]
    canvas: int

    @classmethod
    def draw(cls, rng: np.random.Generator) -> Crop:
        pictures, channels, height, width = (int(n) for n in rng.integers(1, (5, 5, 24, 24)))
        faces = int(rng.integers(0, 9))
        boxes = [rectangle(rng, height, width) for _ in range(faces)]
        return cls(
            draw(rng, "float32", pictures, channels, height, width),
            rng.integers(0, pictures, faces).astype(np.int32),
            np.array(boxes, np.int32).reshape(faces, 4),
            int(rng.integers(1, 33)),
        )

    def launch(self, bench: Any, dtype: str) -> list[Array]:
        faces = bench.empty((len(self.boxes), self.latents.shape[1], self.canvas, self.canvas), dtype)
        inputs = (bench.put(array) for array in (self.latents, self.pictures, self.boxes))
        bench.kernels.crop_upsample(bench.stream, *inputs, faces)
        return [faces]


@dataclass(frozen=True)
class Merge:
    """Arguments of relocate_merge. plan: where encoder_of, local_of and global_of come from."""

    plan: RowPlan
    skips: list[Floats]
    local: list[Floats]
    whole: list[Floats]
    boxes: NDArray[np.int32]
    levels: list[int]
    scales: Floats

    @classmethod
    def draw(cls, rng: np.random.Generator, dtype: str, most_persons: int = 8) -> Merge:
        """Half of the cases have whole vectors of 8 cells, over lines and channels of odd sizes."""
        plan, persons = row_plan(rng, most_persons)
        levels = int(rng.integers(1, 4))
        height, width, canvas = (int(n) * 2 ** (levels - 1) for n in rng.integers(1, 7, 3))
        width += int(rng.integers(0, 2))
        entries = [(int(rng.integers(1, 6)), level) for level in range(levels) for _ in range(2)]
        if rng.integers(2):
            entries = [(8 * (1 + channels % 2), level) for channels, level in entries]
        of_person = [[rectangle(rng, height >> k, width >> k) for k in range(levels)] for _ in range(persons)]
        local_rows, global_rows = len(plan.local_branch.rows), len(plan.global_branch.rows)
        boxes = [of_person[row.person] for row in plan.local_branch.rows]
        scales = rng.uniform(-1, 2, (len(plan.decoder), 2)).astype(np.float32)
        scales[:, rng.random(2) < 0.5] = rng.uniform(0, 2)  # each of these may be the same for all rows
        return cls(
            plan,
            [draw(rng, dtype, len(plan.encoder), c, height >> k, width >> k) for c, k in entries],
            [draw(rng, dtype, local_rows, c, canvas >> k, canvas >> k) for c, k in entries if local_rows],
            [draw(rng, dtype, global_rows, c, height >> k, width >> k) for c, k in entries if global_rows],
            np.array(boxes, np.int32).reshape(-1, levels, 4),
            [k for _, k in entries],
            scales,
        )

    @property
    def of(self) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]:
        """encoder_of, local_of and global_of."""
        return self.plan.encoder_of, self.plan.local_branch.of, self.plan.global_branch.of

    def reference(self, mode: str, overlap: str) -> list[Floats]:
        return reference.relocate_merge(
            self.skips, self.local, self.whole, *self.of, self.boxes, self.levels, self.scales, mode, overlap
        )

    def magnitude(self, mode: str, overlap: str) -> list[Floats]:
        """The sum of the terms without their signs, with every sample as large as the largest."""
        largest = [np.full_like(a, np.abs(a).max(initial=0)) for a in self.local]
        return reference.relocate_merge(
            [np.abs(a) for a in self.skips], largest, [np.abs(a) for a in self.whole], *self.of, self.boxes,
            self.levels, np.abs(self.scales), mode, overlap,
        )  # fmt: skip

    def window(self) -> int:
        """The largest sum of lines and columns that one sample of mode "area" reads."""
        most = 0
        for level, local in zip(self.levels, self.local, strict=bool(self.local)):
            height, width = local.shape[2:]
            for x0, y0, x1, y1 in self.boxes[:, level]:
                most = max(most, -(-height // (y1 - y0)) - (-width // (x1 - x0)) + 2)
        return most

    def launch(self, bench: Any, dtype: str, mode: str, overlap: str) -> list[Array]:
        rows = len(self.plan.decoder)
        out = [bench.empty((rows, *skip.shape[1:]), dtype) for skip in self.skips]
        groups = ([bench.put(array, dtype) for array in group] for group in (self.skips, self.local, self.whole))
        plan = launch.levels(*groups, out, self.levels)
        table = bench.put(plan.table.view(np.int32))
        rest = (*self.of, self.boxes, self.scales)
        bench.kernels.relocate_merge(bench.stream, plan, table, *(bench.put(array) for array in rest), mode, overlap)
        return out


@dataclass(frozen=True)
class Guide:
    """Arguments of guide_step."""

    plan: RowPlan
    latents: Floats
    step: NDArray[np.int32]
    noise_pred: Floats
    coefficients: NDArray[np.float64]

    @classmethod
    def draw(cls, rng: np.random.Generator, dtype: str) -> Guide:
        plan, _ = row_plan(rng)
        shape = tuple(int(n) for n in rng.integers(1, (6, 24, 24)))
        pictures, steps = len(plan.decoder_of), int(rng.integers(1, 6))
        return cls(
            plan,
            draw(rng, "float32", pictures, *shape),
            rng.integers(0, steps, pictures).astype(np.int32),
            draw(rng, dtype, len(plan.decoder), *shape),
            rng.uniform(-1, 1, (steps, 2)),
        )

    def reference(self) -> tuple[Floats, NDArray[np.int32]]:
        latents, step = self.latents.copy(), self.step.copy()
        rows = self.plan.decoder_of, self.plan.weights
        reference.guide_step(latents, step, self.noise_pred, *rows, self.coefficients)
        return latents, step

    def magnitude(self) -> Floats:
        latents = np.abs(self.latents)
        rows = self.plan.decoder_of, np.abs(self.plan.weights)
        reference.guide_step(latents, self.step.copy(), np.abs(self.noise_pred), *rows, np.abs(self.coefficients))
        return latents

    def launch(self, bench: Any, dtype: str) -> list[Array]:
        """The latents, the step and the tickets."""
        latents, step = bench.put(self.latents), bench.put(self.step)
        tickets = bench.put(np.zeros_like(self.step))
        rest = [bench.put(self.noise_pred, dtype)]
        rest += [bench.put(array) for array in (self.plan.decoder_of, self.plan.weights, self.coefficients)]
        bench.kernels.guide_step(bench.stream, latents, step, tickets, *rest)
        return [latents, step, tickets]


@dataclass(frozen=True)
class Take:
    """Arguments of take and take_step."""

    source: Floats
    rows: NDArray[np.int32]
    table: Floats
    step: NDArray[np.int32]
    pictures: NDArray[np.int32]
    columns: NDArray[np.int32]

    @classmethod
    def draw(cls, rng: np.random.Generator, dtype: str) -> Take:
        shape = [int(n) for n in rng.integers(1, 9, rng.integers(1, 5))]
        count, (steps, columns, size, pictures) = int(rng.integers(0, 9)), rng.integers(1, (6, 5, 700, 5))
        return cls(
            draw(rng, dtype, *shape),
            rng.integers(0, shape[0], count).astype(np.int32),
            draw(rng, dtype, steps, columns, size),
            rng.integers(0, steps, pictures).astype(np.int32),
            rng.integers(0, pictures, count).astype(np.int32),
            rng.integers(0, columns, count).astype(np.int32),
        )

    def reference(self) -> list[Floats]:
        return [self.source[self.rows], self.table[self.step[self.pictures], self.columns]]

    def launch(self, bench: Any, source: str, dtype: str) -> list[Array]:
        taken = bench.empty((len(self.rows), *self.source.shape[1:]), dtype)
        bench.kernels.take(bench.stream, bench.put(self.source, source), bench.put(self.rows), taken)
        stepped = bench.empty((len(self.rows), self.table.shape[-1]), dtype)
        inputs = [bench.put(self.table, dtype)]
        inputs += [bench.put(array) for array in (self.step, self.pictures, self.columns)]
        bench.kernels.take_step(bench.stream, *inputs, stepped)
        return [taken, stepped]
