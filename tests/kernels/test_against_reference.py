"""The kernels' own source against the NumPy reference: 940 random cases, a quarter as many that every commit has anew,
and what must be exact. Compiled by g++ on a CPU, and by NVRTC on a GPU.

Bounds are counted roundings. u = 2⁻²⁴ is the most that one float32 operation errs, relative to its result; a sum of
products errs by at most (its roundings)·u·(the sum of the magnitudes). For a result v of float32 arithmetic that is B
away from the reference, stored in a half type: |stored - reference| ≤ |nearest half - reference| + 2·B. Plain
half arithmetic yields half numbers too, so it is not nearer to the truth than the nearest one.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import realisid_trt.kernels as reference
from realisid_trt.kernels.launch import OVERLAPS, levels
from tests.kernels.bench import OnCpu, rounded
from tests.kernels.cases import (
    KERNEL_BILINEAR,
    REFERENCE_BILINEAR,
    STATES,
    TYPES,
    Crop,
    Guide,
    Merge,
    Take,
    rectangle,
)
from tests.kernels.test_kernels import merge_in_torch, two_coefficients
from tests.kernels.two_sources import TwoSources

NewBench = Callable[[], Any]
Draws = Callable[[int], list[list[int]]]
U = 2.0**-24


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
    """Sources of every rule, and the two of a step of RealisID; the roundings of every term are counted."""
    vectors, seeds = set(), draws(24)
    for seed in seeds:
        for draw in (Merge.draw, Merge.draw_step):
            case, bench = draw(np.random.default_rng([*seed, len(mode), len(overlap)]), dtype), new_bench()
            out = case.launch(bench, dtype, mode, overlap)
            vectors.add(levels(out, [], out, case.levels).vector)
            roundings, expected = case.roundings(mode, overlap), case.reference(mode, overlap)
            nothing = (case.rows_of < 0).all(axis=(1, 2))
            results = zip(out, case.skips, expected, case.magnitude(mode, overlap), strict=True)
            for array, skip, truth, magnitude in results:
                check(bench.get(array), truth, roundings * U * magnitude, dtype, f"seed {seed}")
                np.testing.assert_array_equal(bench.get(array)[nothing], skip[case.encoder_of][nothing])
    both = {1, 16 // (4 if dtype == "float32" else 2)}
    assert vectors == both or (len(seeds) < 24 and vectors < both)


@pytest.mark.parametrize("mode", ["bilinear", "area"])
@pytest.mark.parametrize("overlap", OVERLAPS)
@pytest.mark.parametrize("dtype", TYPES)
def test_two_sources_are_merged_to_the_bit_as_by_the_kernel_that_knew_only_two(
    dtype: str, overlap: str, mode: str, host_kernels: Path, two_sources: TwoSources
) -> None:
    for seed in range(12):
        case, bench = Merge.draw_step(np.random.default_rng([seed, 2]), dtype), OnCpu(host_kernels)
        expected = two_sources.merge(bench, dtype, mode, overlap, **case.two_sources())
        for ours, theirs in zip(case.launch(bench, dtype, mode, overlap), expected, strict=True):
            np.testing.assert_array_equal(bits(bench.get(ours)), bits(bench.get(theirs)), err_msg=f"seed {seed}")


def bits(values: NDArray[Any]) -> NDArray[np.uint32]:
    return values.view(np.uint32)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("histories, noise, preview", STATES)
def test_guide_step(histories: int, noise: bool, preview: bool, dtype: str, new_bench: NewBench, draws: Draws) -> None:
    """Both multiply by the same rounded coefficients: per term a product and at most six sums. What has no row, or a
    coefficient of zero, is not touched: there it is compared to the bit, or holds NaN."""
    for seed in draws(8):
        case, bench = Guide.draw(np.random.default_rng(seed), dtype, histories, noise, preview), new_bench()
        *found, tickets = (bench.get(array) for array in case.launch(bench, dtype))
        still, moved = case.without_rows, ~case.without_rows
        for ours, expected, magnitude in zip(found, case.reference(), case.magnitude(), strict=True):
            np.testing.assert_array_equal(bits(ours[still]), bits(expected[still]))
            if ours.dtype == np.int32:
                np.testing.assert_array_equal(ours, expected)
            else:
                check(ours[moved], expected[moved], 2 * 7 * U * magnitude[moved], "float32", f"seed {seed}")
        assert not tickets.any()


@pytest.mark.parametrize("dtype", TYPES)
def test_guide_step_without_a_state_is_the_kernel_of_before_to_the_bit(dtype: str, host_kernels: Path) -> None:
    for seed in range(24):
        case, bench = Guide.draw(np.random.default_rng([seed, 1]), dtype), OnCpu(host_kernels)
        latents, step, _ = (bench.get(array) for array in case.launch(bench, dtype))
        expected, moved = case.latents.copy(), ~case.without_rows
        of_moved = case.step[moved], case.noise_pred, case.decoder_of[moved], case.weights[moved], case.matrix[:, 0, :2]
        expected[moved] = two_coefficients(case.latents[moved], *of_moved)
        np.testing.assert_array_equal(bits(latents), bits(expected), err_msg=f"seed {seed}")
        np.testing.assert_array_equal(step, case.step + moved)


@pytest.mark.parametrize("dtype", TYPES)
def test_guide_step_computes_every_new_value_from_the_old_ones(dtype: str, new_bench: NewBench) -> None:
    """A matrix that lets latents and histories change places; on a grid of more than one block."""
    rng, bench = np.random.default_rng(7), new_bench()
    latents, noise = (rng.standard_normal((2, 3, 17, 19), dtype=np.float32) for _ in range(2))
    histories = rng.standard_normal((2, 2, 3, 17, 19), dtype=np.float32)
    matrix = np.zeros((1, 4, 5))
    matrix[0, 0, 2] = matrix[0, 1, 3] = matrix[0, 2, 0] = matrix[0, 3, 4] = 1
    zeros = np.zeros((1, 3, 17, 19), np.float32)
    rows, weights = np.zeros((2, 3), np.int32), np.ones((2, 3))
    case = Guide(latents, histories, np.zeros(2, np.int32), zeros, rows, weights, matrix, noise, np.zeros_like(noise))
    changed = [histories[:, 0], [1, 1], np.stack([histories[:, 1], latents], axis=1), noise]
    *found, _ = (bench.get(array) for array in case.launch(bench, dtype))
    for ours, theirs, expected in zip(found, case.reference(), changed, strict=True):
        np.testing.assert_array_equal(ours, expected)
        np.testing.assert_array_equal(theirs, expected)


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
    """Against float64; plain: the sum of merge_in_torch, every operation in the half type."""
    for seed in range(6):
        for draw in (Merge.draw, Merge.draw_step):
            case, bench = draw(np.random.default_rng(seed), dtype), new_bench()
            out = case.launch(bench, dtype, "bilinear", overlap)
            truth = merge_in_torch(case, "bilinear", overlap)
            plain = merge_in_torch(case, "bilinear", overlap, getattr(torch, dtype))
            for index, (array, exact, other) in enumerate(zip(out, truth, plain, strict=True)):
                ours, theirs = (np.abs(result - exact).max() for result in (bench.get(array), other))
                assert ours <= 2 * theirs, (seed, index, ours, theirs)
