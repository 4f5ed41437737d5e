"""The NumPy reference of the fused operations: against torch in float64, and what the mathematics promises."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from realisid_trt.kernels import EVERYWHERE, INSIDE, RELOCATED, crop_upsample, guide_step
from realisid_trt.kernels.launch import OVERLAPS
from realisid_trt.kernels.resample import resize_matrix
from tests.kernels import two_sources
from tests.kernels.cases import RULES, STATES, Guide, Merge, rectangle

EPS = np.finfo(np.float32).eps


@pytest.mark.parametrize("mode", ["bilinear", "area"])
def test_resize_matrix_is_torch_interpolate(mode: str) -> None:
    """Every pair of sizes up to 20, in float64: torch's weights, rounded once to float32."""
    options = {"align_corners": False} if mode == "bilinear" else {}
    for size_in in range(1, 21):
        x = torch.eye(size_in, dtype=torch.float64).reshape(1, size_in, size_in, 1)
        for size_out in range(1, 21):
            expected = F.interpolate(x, size=(size_out, 1), mode=mode, **options)[0, :, :, 0].T.numpy()
            np.testing.assert_allclose(resize_matrix(size_in, size_out, mode), expected, atol=EPS)


def test_crop_upsample_is_interpolate_of_the_crop() -> None:
    rng = np.random.default_rng(0)
    for _ in range(60):
        pictures, channels, height, width = (int(n) for n in rng.integers(1, 23, 4))
        canvas, faces = int(rng.integers(1, 33)), int(rng.integers(1, 5))
        latents = rng.standard_normal((pictures, channels, height, width), dtype=np.float32)
        of = rng.integers(0, pictures, faces).astype(np.int32)
        boxes = np.array([rectangle(rng, height, width) for _ in range(faces)], np.int32)
        ours = crop_upsample(latents, of, boxes, canvas)
        for face, picture, (x0, y0, x1, y1) in zip(ours, of, boxes, strict=True):
            crop = torch.from_numpy(latents[picture, :, y0:y1, x0:x1].astype(np.float64))[None]
            truth = F.interpolate(crop, size=(canvas, canvas), mode="bilinear", align_corners=False)[0].numpy()
            # four products and three sums of numbers no larger than the crop's largest
            np.testing.assert_allclose(face, truth, atol=8 * EPS * np.abs(crop.numpy()).max())


def merge_in_torch(
    case: Merge, mode: str, overlap: str, dtype: torch.dtype = torch.float64
) -> list[NDArray[np.float64]]:
    """The sum as one would write it in torch, with torch's own resizing, every operation in that type."""
    options = {"align_corners": False} if mode == "bilinear" else {}
    scales, merged = torch.from_numpy(case.scales).to(dtype), []
    for skip, level, *maps in zip(case.skips, case.levels, *case.residuals, strict=True):
        out = torch.from_numpy(skip).to(dtype)[torch.from_numpy(case.encoder_of).long()]
        sources = [torch.from_numpy(residual).to(dtype) for residual in maps]
        for r, s in np.ndindex(case.rows_of.shape[:2]):
            rows = [row for row in case.rows_of[r, s].tolist() if row >= 0]
            placement, is_mean, first_box = case.rules[s].tolist()
            if not rows:
                continue
            if placement == EVERYWHERE:
                received = sources[s][rows]
                out[r] = out[r] + scales[r, s] * (received.mean(0) if is_mean else received.sum(0))
                continue
            total, count = torch.zeros_like(out[r]), torch.zeros_like(out[r, 0])
            for row in rows:
                x0, y0, x1, y1 = case.boxes[first_box + row, level].tolist()
                part = (
                    sources[s][row, :, y0:y1, x0:x1]
                    if placement == INSIDE
                    else F.interpolate(sources[s][row][None], size=(y1 - y0, x1 - x0), mode=mode, **options)[0]
                )
                total[:, y0:y1, x0:x1] = part if overlap == "priority" else total[:, y0:y1, x0:x1] + part
                count[y0:y1, x0:x1] += 1
            if overlap == "average":
                total /= count.clamp(1)
            out[r] = out[r] + scales[r, s] * (total / len(rows) if is_mean else total)
        merged.append(out.double().numpy())
    return merged


@pytest.mark.parametrize("mode", ["bilinear", "area"])
@pytest.mark.parametrize("overlap", OVERLAPS)
def test_relocate_merge_is_the_sum_of_the_paper(mode: str, overlap: str) -> None:
    """A step of RealisID; and sources of every rule, in any number."""
    rng = np.random.default_rng(0)
    for draw in (Merge.draw_step, Merge.draw):
        for _ in range(40):
            case = draw(rng, "float32")
            truths = merge_in_torch(case, mode, overlap)
            for out, truth in zip(case.reference(mode, overlap), truths, strict=True):
                assert out.dtype == np.float32
                np.testing.assert_allclose(out, truth, atol=64 * EPS * max(1, np.abs(truth).max()))


@pytest.mark.parametrize("mode", ["bilinear", "area"])
@pytest.mark.parametrize("overlap", OVERLAPS)
def test_two_sources_are_merged_to_the_bit_as_when_there_were_only_two(mode: str, overlap: str) -> None:
    rng, mixed = np.random.default_rng(1), set()
    for _ in range(60):
        case = Merge.draw_step(rng, "float32")
        mixed.add(len(case.residuals))
        expected = two_sources.relocate_merge(**case.two_sources(), mode=mode, overlap=overlap)
        for ours, theirs in zip(case.reference(mode, overlap), expected, strict=True):
            np.testing.assert_array_equal(ours.view(np.uint32), theirs.view(np.uint32))
    assert mixed == {0, 1, 2}


def one_person(box: tuple[int, int, int, int], size: int = 8) -> Merge:
    """The local and the global branch's row for one person."""
    rng = np.random.default_rng(1)
    skip, local, whole = ([rng.standard_normal((1, 3, size, size), dtype=np.float32)] for _ in range(3))
    return Merge(
        skip, [local, whole], np.zeros(1, np.int32), np.zeros((1, 2, 1), np.int32), np.ones((1, 2), np.float32),
        np.array(RULES, np.int32), np.array([[box]], np.int32), [0],
    )  # fmt: skip


def merged(case: Merge, overlap: str = "sum", **changed: Any) -> list[NDArray[np.float32]]:
    return replace(case, **changed).reference("bilinear", overlap)


def test_a_box_over_the_whole_picture_makes_crop_and_relocate_identities() -> None:
    case = one_person((0, 0, 8, 8))
    [latents] = case.skips
    np.testing.assert_array_equal(crop_upsample(latents, np.zeros(1, np.int32), case.boxes[:, 0], 8), latents)
    [out], [[local], [whole]] = merged(case), case.residuals
    np.testing.assert_allclose(out, latents + local + whole, atol=4 * EPS)


def test_outside_the_box_the_local_branch_is_not_seen() -> None:
    for placement in (RELOCATED, INSIDE):
        case = one_person((2, 3, 5, 6))
        case.rules[0, 0] = placement
        [with_local], [without] = merged(case), merged(case, scales=np.float32([[0, 1]]))
        differs = (with_local != without).any(axis=(0, 1))
        assert differs[3:6, 2:5].all()
        differs[3:6, 2:5] = False
        assert not differs.any()


@pytest.mark.parametrize("is_mean", [0, 1])
@pytest.mark.parametrize("overlap", OVERLAPS)
def test_placements_that_coincide_are_equal_to_the_bit(overlap: str, is_mean: int) -> None:
    """INSIDE is the relocation of a crop with a cell for every cell; in boxes over all of the picture, nothing is cut
    off, and their sum is that of EVERYWHERE."""
    rng = np.random.default_rng(6)
    rows_of, scales = np.array([[[2, 0, 1, -1]], [[1, -1, -1, -1]]], np.int32), np.float32([[0.7], [1.3]])
    skip, picture = (rng.standard_normal((3, 4, 7, 9), dtype=np.float32) for _ in range(2))
    crops, boxes = np.empty((3, 4, 4, 4), np.float32), np.empty((3, 1, 4), np.int32)
    for row, (x, y) in enumerate(((0, 0), (2, 1), (5, 3))):
        crops[row], boxes[row, 0] = picture[row, :, y : y + 4, x : x + 4], (x, y, x + 4, y + 4)

    def result(maps: NDArray[np.float32], boxes: NDArray[np.int32], placement: int) -> NDArray[np.float32]:
        rules = np.array([[placement, is_mean, 0]], np.int32)
        case = Merge([skip], [[maps]], np.array([1, 2], np.int32), rows_of, scales, rules, boxes, [0])
        return case.reference("area", overlap)[0]

    np.testing.assert_array_equal(result(picture, boxes, INSIDE), result(crops, boxes, RELOCATED))
    whole = np.tile(np.array([[0, 0, 9, 7]], np.int32), (3, 1, 1))
    np.testing.assert_array_equal(result(picture, whole, INSIDE), result(picture, whole, RELOCATED))
    if overlap == "sum":
        np.testing.assert_array_equal(result(picture, whole, INSIDE), result(picture, whole, EVERYWHERE))


def test_copies_of_a_person() -> None:
    """N times the same person: the global mean stays, the local sum is N-fold, its average is not, its last covers."""
    one, three = one_person((1, 1, 7, 7)), np.zeros((1, 2, 3), np.int32)
    for overlap, factor in (("sum", 3), ("average", 1), ("priority", 1)):
        [expected] = merged(one, overlap, scales=np.float32([[factor, 1]]))
        np.testing.assert_allclose(merged(one, overlap, rows_of=three)[0], expected, atol=16 * EPS)


def test_persons_permuted_give_the_same_but_for_priority() -> None:
    rng = np.random.default_rng(2)
    case = Merge.draw(rng, "float32")
    while case.rows_of.shape[2] < 3:
        case = Merge.draw(rng, "float32")
    swapped = np.full_like(case.rows_of, -1)
    for of, target in zip(case.rows_of.reshape(-1, case.rows_of.shape[2]), swapped.reshape(-1, case.rows_of.shape[2]),
                          strict=True):  # fmt: skip
        received = of[of >= 0]
        target[: len(received)] = received[::-1]
    for overlap in ("sum", "average"):
        for a, b in zip(merged(case, overlap), merged(case, overlap, rows_of=swapped), strict=True):
            np.testing.assert_allclose(a, b, atol=64 * EPS * max(1, np.abs(a).max()))


def test_nobody_gets_the_skip_alone() -> None:
    case = one_person((0, 0, 8, 8))
    np.testing.assert_array_equal(merged(case, rows_of=np.full((1, 2, 1), -1, np.int32))[0], case.skips[0])
    empty = {"rows_of": case.rows_of[:, :0], "rules": case.rules[:0], "scales": case.scales[:, :0]}
    np.testing.assert_array_equal(merged(case, residuals=[], **empty)[0], case.skips[0])


def test_a_source_without_rows_is_one_whose_scale_is_zero() -> None:
    """To the bit, whether other decoder rows have it, or none, and it is not in the list."""
    rng = np.random.default_rng(4)
    for draw, overlap in itertools.product((Merge.draw_step, Merge.draw), OVERLAPS):
        case = draw(rng, "float32")
        while not case.residuals:
            case = draw(rng, "float32")
        for source, nobody in itertools.product(range(len(case.residuals)), (False, True)):
            silent = np.full(len(case.encoder_of), True) if nobody else rng.integers(2, size=len(case.encoder_of)) > 0
            scales, rows_of = case.scales.copy(), case.rows_of.copy()
            scales[silent, source], rows_of[silent, source] = 0, -1
            without = replace(case, scales=scales, rows_of=rows_of)
            if nobody:
                rest = [s for s in range(len(case.residuals)) if s != source]
                without = replace(
                    case, residuals=[case.residuals[s] for s in rest], scales=scales[:, rest],
                    rows_of=rows_of[:, rest], rules=case.rules[rest],
                )  # fmt: skip
            for a, b in zip(merged(without, overlap), merged(case, overlap, scales=scales), strict=True):
                np.testing.assert_array_equal(a, b)


def two_coefficients(
    latents: NDArray[np.float32],
    step: NDArray[np.int32],
    noise_pred: NDArray[np.float32],
    decoder_of: NDArray[np.int32],
    weights: NDArray[np.float64],
    coefficients: NDArray[np.float64],
) -> NDArray[np.float32]:
    """The oracle: guide_step as it was when it knew DDIM only, z' = A·z + B·m. coefficients: (S, 2), A and B."""
    new = latents.copy()
    for z, rows, row_weights, (scale, shift) in zip(new, decoder_of, weights, coefficients[step], strict=True):
        z *= np.float32(scale)
        for row, weight in zip(rows, row_weights, strict=True):
            if row >= 0:
                z += np.float32(shift * weight) * noise_pred[row]
    return new


def test_guide_step_without_a_state_is_that_of_before_to_the_bit() -> None:
    """A preview changes nothing."""
    rng = np.random.default_rng(3)
    for preview in [False, True] * 20:
        case = Guide.draw(rng, "float32", preview=preview)
        moved, (latents, step, *_) = ~case.without_rows, case.reference()
        expected = case.latents.copy()
        expected[moved] = two_coefficients(
            case.latents[moved], case.step[moved], case.noise_pred, case.decoder_of[moved], case.weights[moved],
            case.matrix[:, 0, :2],
        )  # fmt: skip
        np.testing.assert_array_equal(latents.view(np.uint32), expected.view(np.uint32))
        np.testing.assert_array_equal(step, case.step + moved)


@pytest.mark.parametrize("histories, noise, preview", STATES)
def test_guide_step_is_equation_8_and_a_product_with_a_matrix(histories: int, noise: bool, preview: bool) -> None:
    """In float64. What no coefficient takes may be NaN, and pictures without rows stay as they are."""
    rng, still, silent = np.random.default_rng(4), 0, 0
    for _ in range(24):
        case = Guide.draw(rng, "float32", histories, noise, preview)
        latents, step, *rest = case.reference()
        new = np.zeros((len(step), 4, *latents.shape[1:]), np.float32)
        old = np.zeros((len(step), 5, *latents.shape[1:]))
        new[:, 0], old[:, 0] = latents, case.latents
        if case.histories is not None:
            new[:, 1 : 1 + histories], old[:, 2 : 2 + histories] = rest.pop(0), case.histories
        if case.noise is not None:
            old[:, 4] = case.noise
        if case.preview is not None:
            new[:, 3] = rest.pop(0)
        for b, without_rows in enumerate(case.without_rows):
            if without_rows:
                still += 1
                np.testing.assert_array_equal(new[b, :3], old[b, [0, 2, 3]])
                assert np.isnan(new[b, 3]).all() or not preview
                continue
            rows = [case.noise_pred[row].astype(np.float64) if row >= 0 else 0 for row in case.decoder_of[b]]
            parts = np.stack([weight * row + 0 * latents[b] for weight, row in zip(case.weights[b], rows, strict=True)])
            old[b, 1] = parts.sum(0)
            silent += np.isnan(old[b]).any()
            finite = np.nan_to_num(old[b])
            expected = np.einsum("jk,k...->j...", case.matrix[case.step[b]], finite)
            magnitude = np.abs(finite).sum(0) + np.abs(parts).sum(0)  # no coefficient is larger than 1
            assert (np.abs(new[b] - expected) <= 8 * EPS * magnitude).all()
        np.testing.assert_array_equal(step, case.step + ~case.without_rows)
    assert still and bool(silent) == bool(histories or noise)


def test_guide_step_takes_each_picture_at_a_step_of_its_own() -> None:
    rng = np.random.default_rng(3)
    z = rng.standard_normal((2, 4, 5, 7), dtype=np.float32)
    noise_pred = rng.standard_normal((5, 4, 5, 7), dtype=np.float32)
    decoder_of = np.array([[0, 1, 2], [3, 4, -1]], np.int32)
    weights = np.array([[-6.5, 2.5, 5.0], [-6.5, 7.5, 0.0]])
    matrix = np.zeros((2, 4, 5))
    matrix[:, 0, :2] = [[1.02, -0.05], [0.9, 0.3]]
    expected = z.astype(np.float64)
    for b, place in enumerate((1, 0)):
        none, text, full = (noise_pred[r].astype(np.float64) if r >= 0 else 0 for r in decoder_of[b])
        guided = weights[b, 0] * none + weights[b, 1] * text + weights[b, 2] * full
        expected[b] = matrix[place, 0, 0] * expected[b] + matrix[place, 0, 1] * guided
    step = np.array([1, 0], np.int32)
    guide_step(z, None, step, noise_pred, decoder_of, weights, matrix, None, None)
    assert step.tolist() == [2, 1]
    np.testing.assert_allclose(z, expected, atol=16 * EPS)


def test_guidance_of_one_returns_the_full_row_exactly() -> None:
    """λt = λi = 1: c = (0, 0, 1). On integers there is no rounding to hide behind."""
    z, noise_pred = np.zeros((1, 1, 3, 3), np.float32), np.arange(27, dtype=np.float32).reshape(3, 1, 3, 3)
    decoder_of, weights, matrix = np.array([[0, 1, 2]], np.int32), np.array([[0.0, 0.0, 1.0]]), np.zeros((1, 4, 5))
    matrix[0, 0, :2] = 1
    guide_step(z, None, np.zeros(1, np.int32), noise_pred, decoder_of, weights, matrix, None, None)
    np.testing.assert_array_equal(z, noise_pred[2:])
