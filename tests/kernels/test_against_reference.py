"""The kernels' own source against the NumPy reference: 772 random cases, a quarter as many that every commit has anew,
and what must be exact. Compiled by g++ on a CPU, and by NVRTC on a GPU.

Bounds are counted roundings. u = 2⁻²⁴ is the most that one float32 operation errs, relative to its result; a sum of
products errs by at most (its roundings)·u·(the sum of the magnitudes). For a result v of float32 arithmetic that is B
away from the reference, stored in a half type: |stored - reference| ≤ |nearest half - reference| + 2·B. Plain
half arithmetic yields half numbers too, so it is not nearer to the truth than the nearest one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import realisid_trt.kernels as reference
from realisid_trt.kernels.launch import OVERLAPS, levels
from tests.kernels.bench import rounded
from tests.kernels.cases import TYPES, Crop, Guide, Merge, Take, rectangle
from tests.kernels.test_kernels import merge_in_float64

NewBench = Callable[[], Any]
Draws = Callable[[int], list[list[int]]]
U = 2.0**-24

# Bilinear, per axis: two products and a sum, 2 u; in the kernel the share is a product with a rounded inverse, 2 u, its
# complement one more and the same again, 4 u in all; in the reference both weights are rounded, u.
KERNEL_BILINEAR, REFERENCE_BILINEAR = 2 * (2 + 4), 2 * (2 + 1)


def check(ours: NDArray[Any], expected: NDArray[np.float32], bound: NDArray[Any], dtype: str, case: str) -> None:
    """Every element was written, and is within its bound of float32 arithmetic, stored in that type."""
    assert np.isfinite(ours).all(), f"{case}: not written, or read from beyond an array"
    if dtype != "float32":
        bound = np.abs(rounded(expected, dtype).astype(np.float64) - expected) + 2 * bound
    error = np.abs(ours.astype(np.float64) - expected)
    assert (error <= bound).all(), f"{case}: off by {(error - bound).max():.3g} more than the bound"


@pytest.mark.parametrize("dtype", TYPES)
def test_crop_upsample(dtype: str, new_bench: NewBench, draws: Draws) -> None:
    roundings = KERNEL_BILINEAR + REFERENCE_BILINEAR
    for seed in draws(60):
        case, bench = Crop.draw(np.random.default_rng(seed)), new_bench()
        [faces] = case.launch(bench, dtype)
        expected = reference.crop_upsample(case.latents, case.pictures, case.boxes, case.canvas)
        bound = np.full(expected.shape, roundings * U * np.abs(case.latents).max())
        check(bench.get(faces), expected, bound, dtype, f"seed {seed}")


@pytest.mark.parametrize("mode", ["bilinear", "area"])
@pytest.mark.parametrize("overlap", OVERLAPS)
@pytest.mark.parametrize("dtype", TYPES)
def test_relocate_merge(dtype: str, overlap: str, mode: str, new_bench: NewBench, draws: Draws) -> None:
    """Both add N - 1 placed residuals and divide by the boxes, and N - 1 global ones and divide by N (the kernel: the
    scale); then two scales and two sums."""
    vectors, seeds = set(), draws(24)
    for seed in seeds:
        case, bench = Merge.draw(np.random.default_rng([*seed, len(mode), len(overlap)]), dtype), new_bench()
        out = case.launch(bench, dtype, mode, overlap)
        vectors.add(levels(out, out, out, out, case.levels).vector)
        sample = KERNEL_BILINEAR + REFERENCE_BILINEAR if mode == "bilinear" else 2 * (case.window() + 1)
        persons = max(1, case.plan.local_branch.of.shape[1])
        roundings = sample + 2 * (persons - 1 + 1 + 1 + 2)
        expected = case.reference(mode, overlap)
        for array, truth, magnitude in zip(out, expected, case.magnitude(mode, overlap), strict=True):
            check(bench.get(array), truth, roundings * U * magnitude, dtype, f"seed {seed}")
    both = {1, 16 // (4 if dtype == "float32" else 2)}
    assert vectors == both or (len(seeds) < 24 and vectors < both)


@pytest.mark.parametrize("dtype", TYPES)
def test_guide_step(dtype: str, new_bench: NewBench, draws: Draws) -> None:
    """Both multiply by the same rounded coefficients: per term a product and at most three sums."""
    for seed in draws(40):
        case, bench = Guide.draw(np.random.default_rng(seed), dtype), new_bench()
        latents, step, tickets = (bench.get(array) for array in case.launch(bench, dtype))
        expected, expected_step = case.reference()
        check(latents, expected, 2 * 4 * U * case.magnitude(), "float32", f"seed {seed}")
        np.testing.assert_array_equal(step, expected_step)
        assert not tickets.any()


@pytest.mark.parametrize("source, dtype", [*((t, t) for t in TYPES), ("float32", "float16"), ("float32", "bfloat16")])
def test_take_and_take_step(source: str, dtype: str, new_bench: NewBench, draws: Draws) -> None:
    """Nothing is computed, so nothing differs."""
    for seed in draws(8):
        case, bench = Take.draw(np.random.default_rng(seed), source), new_bench()
        taken, stepped = case.launch(bench, source, dtype)
        expected = case.reference()
        np.testing.assert_array_equal(bench.get(taken), rounded(expected[0], dtype))
        np.testing.assert_array_equal(bench.get(stepped), rounded(expected[1], dtype))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_halves_are_rounded_as_torch_rounds_them(dtype: str, new_bench: NewBench) -> None:
    """Every half number, the middle between two, its neighbours, infinity and NaN; in the kernels and here."""
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    halves = bits.view(getattr(torch, dtype)).float()
    finite = halves[halves.isfinite()].sort().values.numpy()
    middle = finite[:-1] + (finite[1:] - finite[:-1]) / 2  # exact in float32
    beside = [np.nextafter(middle, np.float32(end)) for end in (-np.inf, np.inf)]
    beyond = np.array([0x477FEFFF, 0x477FF000, 0x7F7F7FFF, 0x7F7F8000, 0x7F7FFFFF, 1], np.uint32).view(np.float32)
    nan = np.array([0x7F800001, 0xFF800001, 0x7FFFFFFF, 0xFFFFFFFF], np.uint32).view(np.float32)
    values = np.concatenate([halves.numpy(), middle, *beside, beyond, -beyond, nan])
    expected = torch.from_numpy(values).to(getattr(torch, dtype)).float().numpy()
    np.testing.assert_array_equal(rounded(values, dtype), expected)
    bench = new_bench()
    out = bench.empty((1, len(values)), dtype)
    rows = bench.put(np.zeros(1, np.int32))
    bench.kernels.take(bench.stream, bench.put(values[None]), rows, out)
    np.testing.assert_array_equal(bench.get(out)[0], expected)
    same = bench.empty((1, len(values)), dtype)
    bench.kernels.take(bench.stream, out, rows, same)
    np.testing.assert_array_equal(bench.get(same)[0], expected)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_find_nonfinite(value: float, new_bench: NewBench) -> None:
    bench, largest = new_bench(), np.finfo(np.float32).max
    values = np.tile(np.float32([0, -0.0, 1e-45, largest, -largest]), 141).reshape(5, 3, 47)
    array, found = bench.put(values), bench.put(np.zeros(1, np.int32))
    bench.kernels.find_nonfinite(bench.stream, array, found)
    assert bench.get(found) == [0]
    for position in (0, 255, 256, values.size - 1):
        wrong, found = values.copy(), bench.put(np.zeros(1, np.int32))
        wrong.flat[position] = value
        bench.kernels.find_nonfinite(bench.stream, bench.put(wrong), found)
        assert bench.get(found) == [1]
    bench.kernels.find_nonfinite(bench.stream, array, found)
    assert bench.get(found) == [1]  # it keeps its value


def test_a_cell_that_falls_on_a_cell_is_copied(new_bench: NewBench) -> None:
    """n → n and 3·n → n cells, up to the largest side: every sample is one input, and not a bit is lost."""
    rng = np.random.default_rng(0)
    for canvas in (*range(1, 40), 97, 128, 341, 1000, 1024):
        for times in (1, 3):
            side = times * canvas
            if side > 1024 or (times == 3 and canvas > 128):
                continue
            bench, latents = new_bench(), rng.standard_normal((1, 1, side, side), dtype=np.float32)
            faces = bench.empty((1, 1, canvas, canvas), "float32")
            box, picture = np.array([[0, 0, side, side]], np.int32), np.zeros(1, np.int32)
            bench.kernels.crop_upsample(bench.stream, *(bench.put(array) for array in (latents, picture, box)), faces)
            np.testing.assert_array_equal(bench.get(faces), latents[..., times // 2 :: times, times // 2 :: times])


def test_large_sides_are_sampled_as_small_ones(new_bench: NewBench) -> None:
    """Random pairs of sizes up to 1024, where positions are largest."""
    rng = np.random.default_rng(0)
    for _ in range(12):
        height, width, canvas = (int(n) for n in rng.integers(500, 1025, 3))
        case = Crop(
            rng.standard_normal((1, 1, height, width), dtype=np.float32),
            np.zeros(1, np.int32),
            np.array([rectangle(rng, height, width)], np.int32),
            canvas,
        )
        bench = new_bench()
        [faces] = case.launch(bench, "float32")
        expected = reference.crop_upsample(case.latents, case.pictures, case.boxes, canvas)
        bound = (KERNEL_BILINEAR + REFERENCE_BILINEAR) * U * np.abs(case.latents).max()
        check(bench.get(faces), expected, np.full(expected.shape, bound), "float32", str((height, width, canvas)))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("overlap", OVERLAPS)
def test_errs_at_most_twice_as_much_as_plain_half_arithmetic(dtype: str, overlap: str, new_bench: NewBench) -> None:
    """Against float64; plain: the paper's sum, every operation in the half type."""
    for seed in range(6):
        case, bench = Merge.draw(np.random.default_rng(seed), dtype), new_bench()
        out = case.launch(bench, dtype, "bilinear", overlap)
        named = {
            "skips": case.skips, "local_residuals": case.local, "global_residuals": case.whole, "boxes": case.boxes,
            **dict(zip(("encoder_of", "local_of", "global_of"), case.of, strict=True)), "levels": case.levels,
            "scales": case.scales,
        }  # fmt: skip
        truth = merge_in_float64(named, "bilinear", overlap)
        for index, (array, exact) in enumerate(zip(out, truth, strict=True)):
            plain = plain_merge(case, index, overlap, getattr(torch, dtype))
            ours, theirs = (np.abs(result - exact).max() for result in (bench.get(array), plain))
            assert ours <= 2 * theirs, (seed, index, ours, theirs)


def plain_merge(case: Merge, index: int, overlap: str, dtype: torch.dtype) -> NDArray[np.float64]:
    """One entry of relocate_merge as one would write it in torch, in that type."""
    absent = [np.empty((0, 0, 0, 0), np.float32)] * len(case.skips)
    groups = case.skips, case.local or absent, case.whole or absent
    skip, local, whole = (torch.from_numpy(group[index]).to(dtype) for group in groups)
    out = skip[torch.from_numpy(case.plan.encoder_of).long()].clone()
    for r, (local_scale, whole_scale) in enumerate(torch.from_numpy(case.scales).to(dtype)):
        rows, global_rows = ([row for row in of[r] if row >= 0] for of in case.of[1:])
        total, count = torch.zeros_like(out[r]), torch.zeros_like(out[r, 0])
        for row in rows:
            x0, y0, x1, y1 = case.boxes[row, case.levels[index]]
            small = torch.nn.functional.interpolate(local[row][None], size=(y1 - y0, x1 - x0), mode="bilinear")[0]
            total[:, y0:y1, x0:x1] = small if overlap == "priority" else total[:, y0:y1, x0:x1] + small
            count[y0:y1, x0:x1] += 1
        if overlap == "average":
            total /= count.clamp(1)
        if rows:
            out[r] = out[r] + local_scale * total
        if global_rows:
            out[r] = out[r] + whole_scale * whole[global_rows].mean(0)
    return out.double().numpy()
