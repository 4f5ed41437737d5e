"""Everything of tests/gpu, without a GPU: in a process of its own, whose libcuda is the stand-in of tests/kernels."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.stand_in import build
from tests.methods import HALF_TOO, built_method

ROOT = Path(__file__).resolve().parents[2]
OTHER_TABLES = ["tests/gpu/test_text_branches.py", "tests/gpu/test_id_patch.py"]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {**os.environ, **build(tmp_path_factory.mktemp("stand_in"))}


def run(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)


def rehearse(environment: dict[str, str], marked: str, *tests: str) -> int:
    """How many of the tests passed; all others were skipped."""
    card = environment | {"STAND_IN_CAPABILITY": "8.9"}  # one that TensorRT-RTX has plans for
    done = run(card, "-m", "pytest", "-q", "-m", marked, *tests, "-p", "no:cacheprovider")
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    return int(passed[1])


@pytest.mark.parametrize(
    ("marked", "least"), [("gpu and not slow", 40), pytest.param("gpu and slow", 6, marks=pytest.mark.slow)]
)
def test_the_engine_on_a_gpu(marked: str, least: int, environment: dict[str, str], engine_dir: Path) -> None:
    """least: of tests that need no real GPU. engine_dir: built before, so that the other process finds it."""
    assert rehearse(environment, marked, "tests/gpu", *(f"--ignore={path}" for path in OTHER_TABLES)) >= least


@pytest.mark.slow("controlnet")
def test_engines_of_other_tables_on_a_gpu(environment: dict[str, str]) -> None:
    for name in HALF_TOO:
        built_method(name)  # so that the other process finds it
    assert rehearse(environment, "gpu", *OTHER_TABLES) >= 40


LOAD = "import sys; from realisid_trt import Engine; Engine.load(sys.argv[1], 'onnxruntime', 'cuda')"


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            {"STAND_IN_CAPABILITY": "0"},
            "the NVIDIA driver found no GPU that it can use (CUDA_ERROR_NO_DEVICE). nvidia-smi",
        ),
        ({"STAND_IN_CAPABILITY": "5.0"}, "no kernels for this GPU (compute capability 5.0); built:"),
    ],
)
def test_a_gpu_that_will_not_do(
    environment: dict[str, str], engine_dir: Path, setting: dict[str, str], message: str
) -> None:
    program = (
        "from realisid_trt.backends import onnxruntime_cuda as o; o.PROVIDER, o.ARENA = 'CPUExecutionProvider', 'Cpu'; "
        "o.provider_options = lambda gpu, precision: {}; " + LOAD
    )
    done = run(environment | setting, "-c", program, str(engine_dir))
    assert done.returncode == 1 and message in done.stderr


def test_capture_that_onnx_runtime_does_not_allow(environment: dict[str, str], engine_dir: Path) -> None:
    program = (
        "from realisid_trt.backends import onnxruntime_cuda as o; o.PROVIDER, o.ARENA = 'CPUExecutionProvider', 'Cpu'; "
        "o.provider_options = lambda gpu, precision: {}; import sys; from realisid_trt import Engine; "
        "engine = Engine.load(sys.argv[1], 'onnxruntime', 'cuda', cuda_graph=True); step = print; "
        "assert engine.backend.repeated(step) is step"
    )
    done = run(environment, "-W", "always", "-c", program, str(engine_dir))
    assert done.returncode == 0, done.stderr
    assert "does not allow its networks to be captured as a part of a CUDA graph" in done.stderr


def test_memory_that_cannot_be_shared(environment: dict[str, str], engine_dir: Path) -> None:
    """This ONNX Runtime registers memory of the CPU only, and says so."""
    program = (
        "from realisid_trt.backends import onnxruntime_cuda as o; o.PROVIDER = 'CPUExecutionProvider'; "
        "o.provider_options = lambda gpu, precision: {}; " + LOAD
    )
    done = run(environment, "-c", program, str(engine_dir))
    assert "BackendError: ONNX Runtime" in done.stderr and "that its networks share on cuda:0: " in done.stderr
    assert "Only CPU devices are supported" in done.stderr


@pytest.mark.parametrize("end", ["engine.close()", "del engine", "pass"])
def test_an_orderly_end(environment: dict[str, str], engine_dir: Path, end: str) -> None:
    """Closed, dropped, or open at the interpreter's exit: networks, memory and stream are freed, in order."""
    program = f"""
import atexit, gc, sys
def count():
    counters = Counters()
    print("held", counters.device_bytes, counters.pinned_bytes)
atexit.register(count)  # before anybody else, so called after all of them
import tests.gpu.conftest
from realisid_trt import Engine
from realisid_trt.backends import cuda_memory, onnxruntime_cuda
from tests.kernels.stand_in import Counters
for owner in (onnxruntime_cuda.Sessions, cuda_memory.Gpu):
    close = owner.close
    owner.close = lambda self, close=close, name=owner.__name__: (print(name), close(self))[1]
engine = Engine.load(sys.argv[1], "onnxruntime", "cuda")
engine.generate("a beach", num_inference_steps=1)
count()
gc.disable()
{end}
count()
"""
    done = run(environment, "-c", program, str(engine_dir))
    assert done.returncode == 0 and not done.stderr, done.stderr
    first, *rest = done.stdout.splitlines()
    assert first.startswith("held ") and " 0" not in first
    gone = ["Sessions", "Gpu", "held 0 0"]
    assert rest == ([first, *gone] if end == "pass" else [*gone, "held 0 0"])


def test_an_onnxruntime_for_the_cpu(engine_dir: Path) -> None:
    done = run(dict(os.environ), "-c", LOAD, str(engine_dir))
    assert "runs on the CPU only. pip uninstall onnxruntime, then pip install 'realisid_trt[gpu]'" in done.stderr
