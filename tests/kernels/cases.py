"""Random inputs of the kernels, what the references make of them, and how they are launched."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

import realisid_trt.kernels as reference
from realisid_trt.config import RealisIDConfig
from realisid_trt.kernels import launch
from realisid_trt.kernels.launch import Array
from realisid_trt.loop.rows import PictureRows, RowPlan, guidance_weights, plan_rows
from tests.kernels.bench import rounded

Floats = NDArray[np.float32]
TYPES = ("float32", "float16", "bfloat16")
RULES = (reference.RELOCATED, 0, 0), (reference.EVERYWHERE, 1, -1)  # RealisID's local branch and its global one

# Roundings of a bilinear sample. Per axis: two products and a sum, 2 u; in the kernel the share is a product with a
# rounded inverse, 2 u, its complement one more and the same again, 4 u in all; in the reference both weights are
# rounded, u.
KERNEL_BILINEAR, REFERENCE_BILINEAR = 2 * (2 + 4), 2 * (2 + 1)


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
    """A step of 1-4 pictures with 0-8 persons each, as the runtime plans it; and how many persons there are."""
    counts = rng.integers(0, most_persons + 1, rng.integers(1, 5))
    pictures, persons = [], 0
    for picture, count in enumerate(counts):
        guidance_scale, id_guidance_scale = rng.choice([1.0, 5.0, 7.5]), rng.choice([0.0, 1.0, 5.0])
        weights = guidance_weights(guidance_scale, id_guidance_scale, with_id=count > 0 and bool(rng.integers(3)))
        branches = bool(rng.integers(4)), bool(rng.integers(4))
        pictures.append(PictureRows((0, 1 + picture), tuple(range(persons, persons + count)), weights, branches))
        persons += count
    table = RealisIDConfig(branch_pooled_text="per_row" if rng.integers(2) else "zeros").table
    return plan_rows(pictures, table, share=bool(rng.integers(4))), persons


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
class Sizes:
    """The skips of a UNet: entries of (channels, level), and the cells of level 0. Half of those that are drawn have
    whole vectors of 8 cells, over lines and channels of odd sizes."""

    levels: int
    entries: list[tuple[int, int]]
    height: int
    width: int

    @classmethod
    def draw(cls, rng: np.random.Generator) -> Sizes:
        levels = int(rng.integers(1, 4))
        height, width = (int(n) * 2 ** (levels - 1) for n in rng.integers(1, 7, 2))
        entries = [(int(rng.integers(1, 6)), level) for level in range(levels) for _ in range(2)]
        if rng.integers(2):
            entries = [(8 * (1 + channels % 2), level) for channels, level in entries]
        return cls(levels, entries, height, width + int(rng.integers(0, 2)))

    def canvas(self, rng: np.random.Generator) -> int:
        return int(rng.integers(1, 7)) * 2 ** (self.levels - 1)

    def maps(self, rng: np.random.Generator, dtype: str, rows: int, canvas: int | None = None) -> list[Floats]:
        """For every entry, that many rows of the picture's size, or on a canvas."""
        height, width = (self.height, self.width) if canvas is None else (canvas, canvas)
        return [draw(rng, dtype, rows, channels, height >> k, width >> k) for channels, k in self.entries]

    def boxes(self, rng: np.random.Generator, rows: int) -> NDArray[np.int32]:
        """(rows, levels, 4): any rectangles, the levels independent of each other."""
        sizes = [(self.height >> k, self.width >> k) for k in range(self.levels)]
        boxes = [[rectangle(rng, *size) for size in sizes] for _ in range(rows)]
        return np.array(boxes, np.int32).reshape(rows, self.levels, 4)


@dataclass(frozen=True)
class Merge:
    """Arguments of relocate_merge, by its names."""

    skips: list[Floats]
    residuals: list[list[Floats]]
    encoder_of: NDArray[np.int32]
    rows_of: NDArray[np.int32]
    scales: Floats
    rules: NDArray[np.int32]
    boxes: NDArray[np.int32]
    levels: list[int]

    @classmethod
    def draw(cls, rng: np.random.Generator, dtype: str, most_rows: int = 8, rows: int | None = None) -> Merge:
        """1-5 sources of any rules, each with rows and a canvas of its own; each in some of the decoder rows. rows: of
        the decoder; None: any number."""
        sizes, sources, most = Sizes.draw(rng), int(rng.integers(1, 6)), int(rng.integers(0, most_rows + 1))
        encoder_rows, rows = int(rng.integers(1, 4)), int(rng.integers(1, 7)) if rows is None else rows
        placements, means = rng.integers(0, 3, sources), rng.integers(0, 2, sources)
        counts = rng.integers(1, most_rows + 1, sources)
        residuals, boxes, rules = [], [np.empty((0, sizes.levels, 4), np.int32)], []
        for placement, is_mean, count in zip(placements.tolist(), means.tolist(), counts.tolist(), strict=True):
            canvas = sizes.canvas(rng) if placement == reference.RELOCATED else None
            residuals.append(sizes.maps(rng, dtype, count, canvas))
            rules.append((placement, is_mean, -1 if placement == reference.EVERYWHERE else sum(map(len, boxes))))
            if placement != reference.EVERYWHERE:
                boxes.append(sizes.boxes(rng, count))
        rows_of = np.full((rows, sources, most), -1, np.int32)
        scales = rng.uniform(-1, 2, (rows, sources)).astype(np.float32)
        scales[:, rng.random(sources) < 0.5] = rng.uniform(0, 2)  # each of them the same for all rows, or not
        for r in range(rows):
            if r and rng.integers(2):  # receives what the row before receives
                rows_of[r], scales[r] = rows_of[r - 1], scales[r - 1]
                continue
            for s in range(sources):
                received = rng.integers(0, counts[s], rng.integers(0, most + 1))
                rows_of[r, s, : len(received)] = received
        return cls(
            sizes.maps(rng, dtype, encoder_rows), residuals, rng.integers(0, encoder_rows, rows).astype(np.int32),
            rows_of, scales, np.array(rules, np.int32), np.concatenate(boxes), [k for _, k in sizes.entries],
        )  # fmt: skip

    @classmethod
    def draw_step(cls, rng: np.random.Generator, dtype: str, most_persons: int = 8) -> Merge:
        """A step of RealisID as the runtime plans it: the local branch and the global one, each if it has rows."""
        plan, persons = row_plan(rng, most_persons)
        sizes = Sizes.draw(rng)
        of_person = sizes.boxes(rng, persons)
        branches = plan.branches
        present = [index for index, branch in enumerate(branches) if branch.rows]
        canvases = sizes.canvas(rng), None
        scales = rng.uniform(-1, 2, (len(plan.decoder), 2)).astype(np.float32)
        scales[:, rng.random(2) < 0.5] = rng.uniform(0, 2)
        rows_of = np.stack([branch.of for branch in branches], axis=1)
        return cls(
            sizes.maps(rng, dtype, len(plan.encoder)),
            [sizes.maps(rng, dtype, len(branches[index].rows), canvases[index]) for index in present],
            plan.encoder_of,
            np.ascontiguousarray(rows_of[:, present]),
            np.ascontiguousarray(scales[:, present]),
            np.array(RULES, np.int32)[present],
            of_person[[row.subject for row in plan.branches[0].rows]],
            [k for _, k in sizes.entries],
        )

    def two_sources(self) -> dict[str, Any]:
        """The arguments of the oracle for a case of `draw_step`: by its names, with both branches."""
        count, _, most = self.rows_of.shape
        found = {placement: s for s, (placement, _, _) in enumerate(self.rules.tolist())}
        given: dict[str, Any] = {"skips": self.skips, "encoder_of": self.encoder_of, "boxes": self.boxes}
        scales = np.zeros((count, 2), np.float32)
        for index, (name, (placement, _, _)) in enumerate(zip(("local", "global"), RULES, strict=True)):
            s = found.get(placement)
            given[f"{name}_residuals"] = [] if s is None else self.residuals[s]
            given[f"{name}_of"] = np.full((count, most), -1, np.int32) if s is None else self.rows_of[:, s].copy()
            if s is not None:
                scales[:, index] = self.scales[:, s]
        return given | {"levels": self.levels, "scales": scales}

    def reference(self, mode: str, overlap: str) -> list[Floats]:
        return reference.relocate_merge(**vars(self), mode=mode, overlap=overlap)

    def magnitude(self, mode: str, overlap: str) -> list[Floats]:
        """What the terms of each sum amount to without their signs, every sample as large as the largest."""
        residuals = [
            [np.full_like(a, np.abs(a).max()) if placement == reference.RELOCATED else np.abs(a) for a in maps]
            for maps, placement in zip(self.residuals, self.rules[:, 0], strict=True)
        ]
        without = {"skips": [np.abs(a) for a in self.skips], "residuals": residuals, "scales": np.abs(self.scales)}
        return replace(self, **without).reference(mode, overlap)

    def roundings(self, mode: str, overlap: str) -> int:
        """The most that the kernel and the reference can make in a term of the sum. In a source: those of a sample, a
        sum of N terms, the division by the boxes, that by N (the kernel: of the scale) and the scale; then S sums."""
        most = self.rows_of.shape[2]
        of_source = [0]
        for maps, (placement, is_mean, first_box) in zip(self.residuals, self.rules.tolist(), strict=True):
            divisions = is_mean + (overlap == "average" and placement != reference.EVERYWHERE)
            sample = self._sample(maps, first_box, mode) if placement == reference.RELOCATED else 0
            of_source.append(sample + 2 * (max(0, most - 1) + divisions + 1))
        return max(of_source) + 2 * len(self.residuals)

    def _sample(self, maps: list[Floats], first_box: int, mode: str) -> int:
        """The roundings of one sample, both in the kernel and in the reference."""
        if mode == "bilinear":
            return KERNEL_BILINEAR + REFERENCE_BILINEAR
        window = 0  # the most lines and columns, added up, that one sample reads
        for level, array in zip(self.levels, maps, strict=True):
            height, width = array.shape[2:]
            for x0, y0, x1, y1 in self.boxes[first_box : first_box + len(array), level]:
                window = max(window, -(-height // (y1 - y0)) - (-width // (x1 - x0)) + 2)
        return 2 * (window + 1)

    def launch(self, bench: Any, dtype: str, mode: str, overlap: str) -> list[Array]:
        out = [bench.empty((len(self.encoder_of), *skip.shape[1:]), dtype) for skip in self.skips]
        skips, *residuals = ([bench.put(array, dtype) for array in group] for group in (self.skips, *self.residuals))
        plan = launch.levels(skips, residuals, out, self.levels)
        tables = [bench.put(table.view(np.int32)) for table in (plan.table, plan.sources)]
        rest = [bench.put(array) for array in (self.encoder_of, self.rows_of, self.scales, self.rules, self.boxes)]
        bench.kernels.relocate_merge(bench.stream, plan, *tables, *rest, mode, overlap)
        return out


@dataclass(frozen=True)
class Guide:
    """Arguments of guide_step, by its names."""

    latents: Floats
    histories: Floats | None
    step: NDArray[np.int32]
    noise_pred: Floats
    decoder_of: NDArray[np.int32]
    weights: NDArray[np.float64]
    matrix: NDArray[np.float64]
    noise: Floats | None
    preview: Floats | None

    @classmethod
    def draw(
        cls, rng: np.random.Generator, dtype: str, histories: int = 0, noise: bool = False, preview: bool = False
    ) -> Guide:
        """One picture in four has no row. Many coefficients of histories and noise are zero; where a step takes nothing
        of one, its picture holds NaN there. The preview is NaN before it is written."""
        plan, _ = row_plan(rng)
        shape = tuple(int(n) for n in rng.integers(1, (6, 24, 24)))
        pictures, steps = len(plan.decoder_of), int(rng.integers(1, 6))
        matrix = rng.uniform(-1, 1, (steps, 4, 5))
        matrix[..., 2:] *= rng.integers(0, 3, (steps, 4, 3)) > 0
        matrix[..., 2:] *= rng.integers(0, 4, (steps, 1, 3)) > 0
        matrix[:, [False, histories < 1, histories < 2, not preview]] = 0
        matrix[..., [False, False, histories < 1, histories < 2, not noise]] = 0
        step = rng.integers(0, steps, pictures).astype(np.int32)
        kept, drawn = draw(rng, "float32", pictures, histories, *shape), draw(rng, "float32", pictures, *shape)
        silent = ~matrix[step].any(axis=1)
        kept[silent[:, 2 : 2 + histories]] = np.nan
        drawn[silent[:, 4]] = np.nan
        return cls(
            draw(rng, "float32", pictures, *shape),
            kept if histories else None,
            step,
            draw(rng, dtype, len(plan.decoder), *shape),
            np.where(rng.integers(0, 4, (pictures, 1)) == 0, np.int32(-1), plan.decoder_of),
            plan.weights,
            matrix,
            drawn if noise else None,
            np.full((pictures, *shape), np.nan, np.float32) if preview else None,
        )

    @property
    def without_rows(self) -> NDArray[np.bool_]:
        """(B,) the pictures that stay as they are."""
        found: NDArray[np.bool_] = (self.decoder_of < 0).all(axis=1)
        return found

    def reference(self) -> list[NDArray[Any]]:
        """The latents, the step, and the histories and the preview that there are."""
        given = {name: None if array is None else array.copy() for name, array in vars(self).items()}
        reference.guide_step(**given)
        return [given[name] for name in ("latents", "step", "histories", "preview") if given[name] is not None]

    def magnitude(self) -> list[NDArray[Any]]:
        """What the terms of each sum amount to without their signs."""
        arrays = {name: None if array is None else np.abs(array) for name, array in vars(self).items()}
        return Guide(**arrays | {"decoder_of": self.decoder_of}).reference()

    def launch(self, bench: Any, dtype: str) -> list[Array]:
        """The latents, the step, the histories and the preview that there are, and the tickets."""
        given = {name: None if array is None else bench.put(array) for name, array in vars(self).items()}
        tickets = bench.put(np.zeros_like(self.step))
        bench.kernels.guide_step(
            bench.stream, **given | {"tickets": tickets, "noise_pred": bench.put(self.noise_pred, dtype)}
        )
        written = [given[name] for name in ("latents", "step", "histories", "preview")]
        return [*(array for array in written if array is not None), tickets]


STATES = list(itertools.product((0, 1, 2), (False, True), (False, True)))  # histories, noise, preview of guide_step


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
