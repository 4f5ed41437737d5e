"""The parts of `benchmarks.gpu`, in order of importance, with their commands, times and needs."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
OUTPUT_CHARACTERS = 6000
PYTHON = shlex.quote(sys.executable)
MINIATURE = "checkpoints/miniature"
LATENCY = "{python} -m benchmarks.latency --device cuda --backend all --json"
SDXL = LATENCY + " --engine {sdxl} --height 1024 --width 1024 --steps 30 --runs {sdxl_runs} {baseline_sdxl} --persons "
SANITIZER = "compute-sanitizer --error-exitcode 1 --tool"
TOOLKIT = "/usr/local/cuda/bin"  # where CUDA's installers put it, and seldom on the PATH
SANITIZER_FAULT = re.compile(r"^========= (Invalid|.*[Rr]ace reported)", re.MULTILINE)  # printed when a fault is found
SANITIZER_REFUSAL = "Device not supported"  # compute-sanitizer's text where a virtual machine hides the counters
EXPORTER = {"torch": "2.13", "diffusers": "0.42", "tflite": "", "onnxscript": ""}  # as setup.py has them
DIFFUSERS = {"diffusers": ""}
CUDA_PYTHON = {"cuda-core": "", "cuda-bindings": ""}


SHARES_OF_MINUTES = 12  # for which the shares of the parts are stated


@dataclass(frozen=True)
class Part:
    """A command, and the conditions under which it is run.

    max_seconds:   it is stopped after this time.
    min_seconds:   it is not begun if less of --minutes is left. Estimated, not measured.
    share_seconds: the most that it may take of 12 --minutes or fewer, and more of more; 0: all that are left.
    item:          of a kit, with this part's result. If the kit has it, it is put in its place, and the command is not
                   run.
    needs:         package → the beginning of its version; they must be installed if the command is run.
    after:         parts that must have passed before this one. One that was not requested counts as passed.
    needs_backend: whether it needs a backend that opens on the GPU; the part "backends" finds that out.
    """

    command: str
    max_seconds: int = 1800
    min_seconds: int = 30
    share_seconds: int = 0
    item: str = ""
    needs: Mapping[str, str] = field(default_factory=dict)
    after: tuple[str, ...] = ()
    needs_backend: bool = False

    def share_of(self, minutes: float | None) -> float:
        """The most seconds that it may take of so many minutes, infinite where it has no share."""
        if minutes is None or not self.share_seconds:
            return math.inf
        return self.share_seconds * max(1.0, minutes / SHARES_OF_MINUTES)


PARTS = {
    "kernel-tests": Part(
        "{python} -m pytest -q -m gpu tests/kernels tests/gpu/test_kernel_benchmark.py", needs=CUDA_PYTHON
    ),
    "kernels": Part("{python} -m benchmarks.kernels --json", min_seconds=40),
    "memcheck": Part(
        SANITIZER + " memcheck {python} -m pytest -q -m gpu {some} tests/kernels",
        share_seconds=90,
        needs=CUDA_PYTHON,
    ),
    "racecheck": Part(
        SANITIZER + " racecheck {python} -m pytest -q -m gpu {some} tests/kernels",
        share_seconds=90,
        needs=CUDA_PYTHON,
    ),
    "build": Part(
        "{python} -m export.build --fp16 --out {engine} --json", min_seconds=10, item="miniature", needs=EXPORTER
    ),
    "backends": Part("{python} -m benchmarks.backends --engine {engine} --json", needs=CUDA_PYTHON, after=("build",)),
    "engine-tests": Part(
        "{python} -m pytest -q -m gpu {engine_tests}",
        min_seconds=60,
        share_seconds=150,
        after=("build",),
        needs_backend=True,
    ),
    "latency": Part(
        LATENCY + " --engine {engine} --persons 1 2 --runs {runs} {baseline} {memory}",
        after=("build",),
        needs_backend=True,
    ),
    "pictures": Part(
        "{python} -m training.evaluate --engine {engine} --checkpoint " + MINIATURE + " --experiment precision "
        "--out {engine}-tables {pictures} --json",
        share_seconds=90,
        needs=DIFFUSERS,
        after=("build",),
        needs_backend=True,
    ),
    "latency-graph": Part(
        LATENCY + " --engine {engine} --persons 1 2 --runs {runs} --baseline none --cuda-graph",
        needs={"tensorrt": ""},
        after=("build",),
        needs_backend=True,
    ),
    "checkpoint-sdxl": Part(
        "{python} -m export.miniature --preset sdxl --out {sdxl}-checkpoint --force --json",
        item="sdxl-checkpoint",
        needs=DIFFUSERS,
    ),
    "build-sdxl": Part(
        "{python} -m export.build --checkpoint {sdxl}-checkpoint --out {sdxl} --fp16 --gpu-only --batch 1 "
        "--persons 4 --resolution 1024 --json",
        7200,
        item="sdxl",
        needs=EXPORTER,
        after=("checkpoint-sdxl",),
    ),
    "latency-sdxl-1": Part(SDXL + "1 {memory}", 3600, 60, after=("build-sdxl",), needs_backend=True),
    "latency-sdxl-2": Part(SDXL + "2 {memory}", 3600, 60, after=("build-sdxl",), needs_backend=True),
    "latency-sdxl-graph": Part(
        LATENCY + " --engine {sdxl} --persons 1 2 --runs {sdxl_runs} --baseline none --cuda-graph",
        3600,
        60,
        needs={"tensorrt": ""},
        after=("build-sdxl",),
        needs_backend=True,
    ),
    "latency-sdxl-4": Part(SDXL + "4 {memory}", 3600, 90, after=("build-sdxl",), needs_backend=True),
    "training-sdxl": Part(
        "{python} -m benchmarks.training --checkpoint {sdxl}-checkpoint --batch-size 4 --checkpointing --json",
        min_seconds=60,
        needs=DIFFUSERS | {"accelerate": ""},
        after=("checkpoint-sdxl",),
    ),
}


def placeholders(
    engine: str, sdxl: str, brief: bool, kit: bool, versions: Mapping[str, str], sdxl_checkpoint: bool = True
) -> dict[str, str]:
    """The values of the commands' placeholders.

    engine, sdxl:    the engines' folders.
    brief:           for minutes, not hours: fewer runs, no torch.compile, no memory. Under compute-sanitizer, which
                     slows tests down a hundredfold, only those of one number type run. Tests end at the first failure,
                     so that it is reported before the time is over.
    kit:             the engines come from a kit; tests that build others are left out.
    versions:        of the packages.
    sdxl_checkpoint: whether the full-size baselines' weights are there.
    """
    baselines = "naive" if brief else "naive naive-compiled"

    def baseline(checkpoint: str, there: bool = True) -> str:
        if "diffusers" not in versions or not there:
            return "--baseline none"
        return f"--baseline {baselines} --checkpoint {shlex.quote(checkpoint)}"

    return {
        "python": PYTHON,
        "engine": shlex.quote(engine),
        "sdxl": shlex.quote(sdxl),
        "baseline": baseline(MINIATURE),
        "baseline_sdxl": baseline(f"{sdxl}-checkpoint", sdxl_checkpoint),
        "memory": "" if brief else "--memory",
        "runs": "5" if brief else "10",
        "sdxl_runs": "5" if brief else "20",
        "pictures": "--pictures 20" if brief else "",
        "some": "-x -k 'float16 and not bfloat16'" if brief else "",
        "engine_tests": ("-x " if brief else "") + ("tests/gpu/test_engine.py" if kit else "tests/gpu"),
    }


def missing_packages(needs: Mapping[str, str], versions: Mapping[str, str]) -> list[str]:
    """The packages that are missing or of another version, a phrase for each."""
    problems = []
    for package, version in needs.items():
        found = versions.get(package)
        if found is None:
            problems.append(f"{package} is not installed here")
        elif not found.startswith(version):
            problems.append(f"{package} {found} is installed here, expected {version}")
    return problems


def run_part(
    command: str, seconds: float = 1800, environment: Mapping[str, str] | None = None, cwd: Path = ROOT
) -> dict[str, Any]:
    """Runs one part, in a process of its own; it and its children are killed after `seconds` seconds.

    Returns its entry of the JSON file. "status" is None for a program that is not here, or that refuses the device.
    """
    start = time.perf_counter()
    arguments = shlex.split(command)
    part = {"command": shlex.join(arguments).replace(PYTHON, "python"), "seconds": 0.0, "status": None, "result": None}
    path = os.pathsep.join([(os.environ if environment is None else environment).get("PATH", os.defpath), TOOLKIT])
    program = shutil.which(arguments[0], path=path)
    if program is None:
        return {**part, "output": f"{arguments[0]} is not here"}
    process = subprocess.Popen(
        [program, *arguments[1:]],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        stdout, stderr = process.communicate(timeout=seconds)
    except BaseException as stopped:
        os.killpg(process.pid, signal.SIGKILL)
        stdout, stderr = process.communicate()
        if not isinstance(stopped, subprocess.TimeoutExpired):
            raise
        stderr += f"stopped after {seconds:.0f} s"
    status: int | None = process.returncode
    if status and arguments[0] == SANITIZER.split()[0] and SANITIZER_REFUSAL in stdout + stderr:
        status = None
    result = None
    if "--json" in arguments:
        with contextlib.suppress(ValueError, IndexError):
            result = json.loads(stdout.strip().splitlines()[-1])
    return {
        **part,
        "seconds": round(time.perf_counter() - start, 1),
        "status": status,
        "output": ("" if result and not status else stdout[-OUTPUT_CHARACTERS:]) + stderr[-OUTPUT_CHARACTERS:],
        "result": result,
    }
