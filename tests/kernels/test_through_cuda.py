"""The real cuda.core on a machine without a GPU: loads, launches, captures and replays. stand_in.py says how."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels import stand_in

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def environment(host_kernels: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return stand_in.build(tmp_path_factory.mktemp("stand-in"), host_kernels)


def run(environment: dict[str, str], *arguments: str, **variables: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=os.environ | environment | variables, capture_output=True,
        text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "[stand-in]" not in done.stderr, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", ["every_kernel", "replay", "refusals", "host_functions"])
def test_through_cuda_core(
    name: str, environment: dict[str, str], compiled: tuple[Path, list[str]], host_kernels: Path
) -> None:
    print(run(environment, "-m", "tests.kernels.through_cuda", name, str(compiled[0]), str(host_kernels)))


def test_a_gpu_of_no_use(environment: dict[str, str]) -> None:
    script = "from realisid_trt.kernels.launch import *\ntry: open_driver()\nexcept BackendError as error: print(error)"
    said = run(environment, "-c", script, STAND_IN_CAPABILITY="0")
    assert "found no GPU" in said and "CUDA_ERROR_NO_DEVICE" in said and "CUDA_VISIBLE_DEVICES" in said
    script = "from pathlib import Path\nfrom realisid_trt.kernels.launch import *\n" + (
        "try: Kernels.load(Path('.'), ['x.sm_90.cubin'])\nexcept EngineMismatch as error: print(error)"
    )
    assert "compute capability 8.9); built: sm_90" in run(environment, "-c", script, STAND_IN_CAPABILITY="8.9")


def test_what_a_gpu_is_tested_with(environment: dict[str, str]) -> None:
    """The tests marked gpu in this folder, rehearsed; without the slow ones, which the g++ build runs elsewhere."""
    said = run(environment, "-m", "pytest", "-q", "-m", "gpu and not slow", "tests/kernels", "-p", "no:cacheprovider")
    assert re.search(r"\b7\d passed", said) and "skipped" not in said, said


@pytest.mark.slow
def test_what_a_gpu_is_tested_with_at_length(environment: dict[str, str]) -> None:
    """The fixed random cases too."""
    said = run(environment, "-m", "pytest", "-q", "-m", "gpu and slow", "tests/kernels", "-p", "no:cacheprovider")
    assert re.search(r"\d passed", said) and "skipped" not in said, said
