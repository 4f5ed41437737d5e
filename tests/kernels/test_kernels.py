"""The NumPy reference of the fused operations: against torch in float64, and what the mathematics promises."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from realisid_trt.kernels import crop_upsample, guide_step, relocate_merge
from realisid_trt.kernels.resample import resize_matrix

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


def rectangle(rng: np.random.Generator, height: int, width: int) -> tuple[int, int, int, int]:
    x0, y0 = int(rng.integers(0, width)), int(rng.integers(0, height))
    return x0, y0, int(rng.integers(x0 + 1, width + 1)), int(rng.integers(y0 + 1, height + 1))


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


def merge_case(rng: np.random.Generator) -> dict[str, Any]:
    """A random batch: odd and oblong sizes, 1-3 pictures of 0-4 persons, rectangles that overlap."""
    levels = int(rng.integers(1, 4))
    height, width = (int(n) * 2 ** (levels - 1) for n in rng.integers(1, 7, 2))
    canvas = int(rng.integers(1, 5)) * 2 ** (levels - 1)
    entries = [(int(rng.integers(1, 6)), level) for level in range(levels) for _ in range(2)]
    counts = rng.integers(0, 5, rng.integers(1, 4))
    branches = [[int(counts[:b].sum()) + p for p in range(n)] for b, n in enumerate(counts)]
    encoder_rows, branch_rows = int(rng.integers(1, 4)), int(counts.sum())
    rows = [int(rng.integers(len(counts))) for _ in range(int(rng.integers(1, 6)))]
    most = max(len(branches[b]) for b in rows)

    def draw(count: int, channels: int, h: int, w: int) -> np.ndarray:
        return rng.standard_normal((count, channels, h, w), dtype=np.float32)

    return {
        "skips": [draw(encoder_rows, c, height >> k, width >> k) for c, k in entries],
        "local_residuals": [draw(branch_rows, c, canvas >> k, canvas >> k) for c, k in entries],
        "global_residuals": [draw(branch_rows, c, height >> k, width >> k) for c, k in entries],
        "encoder_of": rng.integers(0, encoder_rows, len(rows)).astype(np.int32),
        "local_of": padded([branches[b] for b in rows], most),
        "global_of": padded([branches[b][::-1] if rng.integers(4) else [] for b in rows], most),
        "boxes": np.array(
            [[rectangle(rng, height >> k, width >> k) for k in range(levels)] for _ in range(branch_rows)], np.int32
        ).reshape(branch_rows, levels, 4),
        "levels": [k for _, k in entries],
        "scales": rng.uniform(0, 2, (len(rows), 2)).astype(np.float32),
    }


def padded(rows: list[list[int]], length: int) -> np.ndarray:
    return np.array([row + [-1] * (length - len(row)) for row in rows], np.int32).reshape(len(rows), length)


def merge_in_float64(case: dict[str, Any], mode: str, overlap: str) -> list[np.ndarray]:
    """The sum, written as the paper says it, with torch's own resizing."""
    options = {"align_corners": False} if mode == "bilinear" else {}
    merged = []
    for skip, local, whole, level in zip(
        case["skips"], case["local_residuals"], case["global_residuals"], case["levels"], strict=True
    ):
        out = skip[case["encoder_of"]].astype(np.float64)
        for r, (s_l, s_g) in enumerate(case["scales"].astype(np.float64)):
            rows = [row for row in case["local_of"][r] if row >= 0]
            global_rows = [row for row in case["global_of"][r] if row >= 0]
            total, count = np.zeros(skip.shape[1:]), np.zeros(skip.shape[2:])
            for row in rows:
                x0, y0, x1, y1 = case["boxes"][row, level]
                x = torch.from_numpy(local[row].astype(np.float64))[None]
                small = F.interpolate(x, size=(y1 - y0, x1 - x0), mode=mode, **options)[0].numpy()
                if overlap == "priority":
                    total[:, y0:y1, x0:x1] = small
                else:
                    total[:, y0:y1, x0:x1] += small
                count[y0:y1, x0:x1] += 1
            for row in global_rows:
                out[r] += s_g * whole[row] / len(global_rows)
            out[r] += s_l * (total / np.maximum(count, 1) if overlap == "average" else total)
        merged.append(out)
    return merged


@pytest.mark.parametrize("mode", ["bilinear", "area"])
@pytest.mark.parametrize("overlap", ["sum", "average", "priority"])
def test_relocate_merge_is_the_sum_of_the_paper(mode: str, overlap: str) -> None:
    rng = np.random.default_rng(0)
    for _ in range(40):
        case = merge_case(rng)
        ours = relocate_merge(**case, mode=mode, overlap=overlap)
        for out, truth in zip(ours, merge_in_float64(case, mode, overlap), strict=True):
            assert out.dtype == np.float32
            np.testing.assert_allclose(out, truth, atol=64 * EPS * max(1, np.abs(truth).max()))


def one_person(box: tuple[int, int, int, int], size: int = 8) -> dict[str, Any]:
    rng = np.random.default_rng(1)
    shape = (1, 3, size, size)
    return {
        "skips": [rng.standard_normal(shape, dtype=np.float32)],
        "local_residuals": [rng.standard_normal(shape, dtype=np.float32)],
        "global_residuals": [rng.standard_normal(shape, dtype=np.float32)],
        "encoder_of": np.zeros(1, np.int32),
        "local_of": np.zeros((1, 1), np.int32),
        "global_of": np.zeros((1, 1), np.int32),
        "boxes": np.array([[box]], np.int32),
        "levels": [0],
        "scales": np.ones((1, 2), np.float32),
    }


def test_a_box_over_the_whole_picture_makes_crop_and_relocate_identities() -> None:
    case = one_person((0, 0, 8, 8))
    latents = case["skips"][0]
    np.testing.assert_array_equal(crop_upsample(latents, np.zeros(1, np.int32), case["boxes"][:, 0], 8), latents)
    [out] = relocate_merge(**case)
    np.testing.assert_allclose(
        out, case["skips"][0] + case["local_residuals"][0] + case["global_residuals"][0], atol=4 * EPS
    )


def test_outside_the_box_the_local_branch_is_not_seen() -> None:
    case = one_person((2, 3, 5, 6))
    [with_local] = relocate_merge(**case)
    case["scales"] = np.array([[0, 1]], np.float32)
    [without] = relocate_merge(**case)
    differs = (with_local != without).any(axis=(0, 1))
    assert differs[3:6, 2:5].all()
    differs[3:6, 2:5] = False
    assert not differs.any()


def test_copies_of_a_person() -> None:
    """N times the same person: the global mean stays; the local sum is N-fold; its average and the last one stay."""
    one = one_person((1, 1, 7, 7))
    expected = {
        overlap: relocate_merge(**{**one, "scales": np.array([[factor, 1]], np.float32)})[0]
        for overlap, factor in (("sum", 3), ("average", 1), ("priority", 1))
    }
    three = {**one, "local_of": np.zeros((1, 3), np.int32), "global_of": np.zeros((1, 3), np.int32)}
    for overlap, single in expected.items():
        np.testing.assert_allclose(relocate_merge(**three, overlap=overlap)[0], single, atol=16 * EPS)


def test_persons_permuted_give_the_same_but_for_priority() -> None:
    rng = np.random.default_rng(2)
    case = merge_case(rng)
    while case["local_of"].shape[1] < 3:
        case = merge_case(rng)
    swapped = {**case, **{name: case[name][:, ::-1].copy() for name in ("local_of", "global_of")}}
    for overlap in ("sum", "average"):
        for a, b in zip(
            relocate_merge(**case, overlap=overlap), relocate_merge(**swapped, overlap=overlap), strict=True
        ):
            np.testing.assert_allclose(a, b, atol=64 * EPS * max(1, np.abs(a).max()))


def test_nobody_gets_the_skip_alone() -> None:
    case = one_person((0, 0, 8, 8))
    case["local_of"] = case["global_of"] = np.full((1, 1), -1, np.int32)
    np.testing.assert_array_equal(relocate_merge(**case)[0], case["skips"][0])


@pytest.mark.parametrize("branch, scale", [("local", 0), ("global", 1)])
def test_a_branch_without_rows_is_one_whose_scale_is_zero(branch: str, scale: int) -> None:
    """To the bit, whether other rows have the branch or none has it."""
    rng = np.random.default_rng(4)
    for overlap in ("sum", "average", "priority"):
        case = merge_case(rng)
        for nobody in (False, True):
            silent = (
                np.ones(len(case["encoder_of"]), bool) if nobody else rng.integers(2, size=len(case["encoder_of"])) > 0
            )
            scales, of = case["scales"].copy(), case[f"{branch}_of"].copy()
            scales[silent, scale], of[silent] = 0, -1
            without = {**case, "scales": scales, f"{branch}_of": of}
            if nobody:
                without[f"{branch}_residuals"] = []
            expected = relocate_merge(**{**case, "scales": scales}, overlap=overlap)
            for a, b in zip(relocate_merge(**without, overlap=overlap), expected, strict=True):
                np.testing.assert_array_equal(a, b)


def test_guide_step_is_equation_8_and_ddim() -> None:
    rng = np.random.default_rng(3)
    z = rng.standard_normal((2, 4, 5, 7), dtype=np.float32)
    noise_pred = rng.standard_normal((5, 4, 5, 7), dtype=np.float32)
    decoder_of = np.array([[0, 1, 2], [3, 4, -1]], np.int32)
    weights = np.array([[-6.5, 2.5, 5.0], [-6.5, 7.5, 0.0]])
    coefficients = np.array([[1.02, -0.05], [0.9, 0.3]])
    expected = z.astype(np.float64)
    for b in range(2):
        none, text, full = (noise_pred[r].astype(np.float64) if r >= 0 else 0 for r in decoder_of[b])
        guided = weights[b, 0] * none + weights[b, 1] * text + weights[b, 2] * full
        expected[b] = coefficients[b, 0] * expected[b] + coefficients[b, 1] * guided
    step = np.array([1, 0], np.int32)
    guide_step(z, step, noise_pred, decoder_of, weights, coefficients[::-1])
    assert step.tolist() == [2, 1]  # each picture at a step of its own
    np.testing.assert_allclose(z, expected, atol=16 * EPS)


def test_guidance_of_one_returns_the_full_row_exactly() -> None:
    """λt = λi = 1: c = (0, 0, 1). On integers there is no rounding to hide behind."""
    z, noise_pred = np.zeros((1, 1, 3, 3), np.float32), np.arange(27, dtype=np.float32).reshape(3, 1, 3, 3)
    decoder_of, weights = np.array([[0, 1, 2]], np.int32), np.array([[0.0, 0.0, 1.0]])
    guide_step(z, np.zeros(1, np.int32), noise_pred, decoder_of, weights, np.array([[1.0, 1.0]]))
    np.testing.assert_array_equal(z, noise_pred[2:])
