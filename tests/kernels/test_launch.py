"""The launcher: the file that a GPU gets, and the error where there is none."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from realisid_trt.errors import EngineMismatch
from realisid_trt.kernels.compile import ARCHITECTURES
from realisid_trt.kernels.launch import Array, choose, levels
from tests.kernels.bench import OnCpu

FILES = [*(f"0123456789ab.{name}.cubin" for name in ARCHITECTURES), "0123456789ab.compute_120.ptx"]


@pytest.mark.parametrize(
    "capability, name",
    {
        (7, 5): "sm_75",
        (8, 0): "sm_80",
        (8, 6): "sm_86",
        (8, 7): "sm_86",
        (8, 9): "sm_89",
        (9, 0): "sm_90",
        (10, 0): "sm_100",
        (10, 3): "sm_100",
        (12, 0): "sm_120",
        (12, 1): "sm_120",
        (13, 0): "compute_120",
    }.items(),
)
def test_each_gpu_gets_its_own(capability: tuple[int, int], name: str) -> None:
    assert choose(FILES, capability).split(".")[1] == name
    assert choose(FILES[::-1], capability).split(".")[1] == name


@pytest.mark.parametrize("capability", [(7, 0), (11, 0)])
def test_a_gpu_without_kernels(capability: tuple[int, int]) -> None:
    said = re.escape(f"{capability[0]}.{capability[1]}); built: compute_120, sm_100, sm_120, sm_75, sm_80, sm_86")
    with pytest.raises(EngineMismatch, match=f"{said}.*Build the engine again"):
        choose(FILES, capability)


def test_what_is_no_kernel_is_not_chosen() -> None:
    with pytest.raises(EngineMismatch, match="built: none"):
        choose(["manifest.json", "README", "x.sm_90.cubin.part"], (9, 0))
    assert choose(["x.compute_90.ptx", "x.compute_75.ptx"], (12, 0)) == "x.compute_90.ptx"


def test_without_a_driver() -> None:
    """In a process of its own, twice, since cuda.core's second call would never return."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        pass
    else:
        pytest.skip("this machine has a driver")
    script = """
from pathlib import Path
from realisid_trt.errors import BackendError
from realisid_trt.kernels.launch import Kernels
for _ in range(2):
    try:
        Kernels.load(Path("."), ["x.sm_90.cubin"])
    except BackendError as error:
        print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, env=os.environ | {"PYTHONPATH": ""}
    )
    said = done.stdout.splitlines()
    assert len(said) == 2 and all("no NVIDIA driver" in line and "device='cpu'" in line for line in said)


def test_arrays_that_do_not_agree_are_refused(host_kernels: Path) -> None:
    bench = OnCpu(host_kernels)
    values, rows = bench.put(np.zeros((2, 3), np.float32)), bench.put(np.zeros(4, np.int32))
    with pytest.raises(AssertionError, match=re.escape("out is (3, 3), expected (4, 3)")):
        bench.kernels.take(None, values, rows, bench.empty((3, 3), "float32"))
    with pytest.raises(AssertionError, match="rows is float32, expected int32"):
        bench.kernels.take(None, values, bench.empty((4,), "float32"), bench.empty((4, 3), "float32"))


@pytest.mark.parametrize(
    "name, shape, said",
    [
        ("histories", (1, 3, 2, 5, 4), "histories is (1, 3, 2, 5, 4), expected one or two of them"),
        ("histories", (1, 2, 2, 5, 3), "histories is (1, 2, 2, 5, 3), expected (1, 2, 2, 5, 4)"),
        ("noise", (2, 2, 5, 4), "noise is (2, 2, 5, 4), expected (1, 2, 5, 4)"),
        ("preview", (1, 2, 4, 5), "preview is (1, 2, 4, 5), expected (1, 2, 5, 4)"),
        ("matrix", (3, 1, 2), "matrix is (3, 1, 2), expected (3, 4, 5)"),
    ],
)
def test_the_state_of_a_step_is_checked(name: str, shape: tuple[int, ...], said: str, host_kernels: Path) -> None:
    bench = OnCpu(host_kernels)
    shapes = {"latents": (1, 2, 5, 4), "histories": (1, 2, 2, 5, 4), "noise": (1, 2, 5, 4), "preview": (1, 2, 5, 4)}
    given = {
        key: bench.put(np.zeros(each, np.float32)) for key, each in (shapes | {"noise_pred": (3, 2, 5, 4)}).items()
    }
    given |= {key: bench.put(np.zeros(1, np.int32)) for key in ("step", "tickets")}
    given |= {"decoder_of": bench.put(np.int32([[0, 1, 2]])), "weights": bench.put(np.ones((1, 3)))}
    given["matrix"] = bench.put(np.zeros((3, 4, 5)))
    bench.kernels.guide_step(None, **given)
    given[name] = bench.put(np.zeros(shape, given[name].dtype))
    with pytest.raises(AssertionError, match=re.escape(said)):
        bench.kernels.guide_step(None, **given)


def test_a_level_that_is_no_whole_number_of_vectors_takes_single_cells() -> None:
    def entry(*shapes: tuple[int, ...]) -> list[Array]:
        return [Array(4096, shape, "float16") for shape in shapes]

    even, odd = (1, 2, 2, 4), (1, 1, 3, 3)
    both = levels(entry(even, odd), [entry(even, odd)], entry(even, odd), [0, 1])
    assert (both.vector, levels(entry(even), [], entry(even), [0]).vector) == (1, 8)
    assert both.table["size"].tolist() == [16, 9] and both.table["first_block"].tolist() == [0, 1] and both.blocks == 2
    unaligned = [Array(4096 + 2, even, "float16")]
    for skips, residuals, out in ((unaligned, [], entry(even)), (entry(even), [unaligned], entry(even))):
        with pytest.raises(AssertionError):
            levels(skips, residuals, out, [0])


def test_every_source_of_every_level_has_an_entry() -> None:
    """Sources on canvases of their own; one that lacks rows, a level or channels is refused."""
    shapes = (2, 4, 6, 10), (2, 8, 3, 5)
    skips = [Array(4096 * (1 + k), shape, "float32") for k, shape in enumerate(shapes)]
    crop = [Array(65536 * (1 + k), (3, shape[1], 8 >> k, 8 >> k), "float32") for k, shape in enumerate(shapes)]
    plan = levels(skips, [crop, skips, crop], skips, [0, 1])
    assert plan.sources.shape == (2, 3) and plan.table["box_level"].tolist() == [0, 1]
    assert plan.sources["residuals"].tolist() == [[65536, 4096, 65536], [131072, 8192, 131072]]
    assert plan.sources["height"].tolist() == [[8, 6, 8], [4, 3, 4]]
    assert plan.sources["width"].tolist() == [[8, 10, 8], [4, 5, 4]]
    for wrong, error in (([crop[:1]], ValueError), ([crop[::-1]], AssertionError), ([[], []], ValueError)):
        with pytest.raises(error):
            levels(skips, wrong, skips, [0, 1])
    with pytest.raises(AssertionError):
        levels(skips, [[Array(4096, (0, *array.shape[1:]), "float32") for array in crop]], skips, [0, 1])
