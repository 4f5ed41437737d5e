"""Torch beside an engine."""

from __future__ import annotations

import time

import pytest
import torch

from benchmarks.torch_device import Clock, ClockedUsage, beside, settings
from realisid_trt.errors import RequestError


def test_where_a_baseline_computes() -> None:
    assert beside("cpu:2") == torch.device("cpu")
    if torch.cuda.is_available():
        assert beside("cuda") == torch.device("cuda", 0)
        return
    with pytest.raises(RequestError, match="cannot use a GPU.* engine, which is on cuda:0.* --baseline none"):
        beside("cuda:0")


def test_settings_are_given_back() -> None:
    cudnn, before = torch.backends.cudnn, torch.get_num_threads()
    flags = torch.backends.cuda.matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark
    for precision in ("float32", "float16"):
        with settings(before + 1, precision):
            assert torch.get_num_threads() == before + 1 and cudnn.benchmark
            assert cudnn.allow_tf32 is torch.backends.cuda.matmul.allow_tf32 is (precision != "float32")
        assert (torch.get_num_threads(), torch.backends.cuda.matmul.allow_tf32) == (before, flags[0])
        assert (cudnn.allow_tf32, cudnn.benchmark) == flags[1:]


def test_a_clock() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    clock = Clock(device)
    usage, stamps = ClockedUsage(clock), [clock.stamp()]
    for rows in (2, 3):
        with usage.measure("unet", rows):
            time.sleep(0.02)
        assert usage.rows["unet"] == (2 if rows == 2 else 5)
        stamps.append(clock.stamp())
    first, second = clock.elapsed_ms(stamps)
    assert min(first, second) > 15
    assert usage.ms == usage.ms and 30 < usage.ms["unet"] <= first + second
