"""python -m benchmarks.gpu: all that needs a GPU, behind one command, into one JSON file. `make gpu-test` runs it.

Builds the miniature in half precision, runs every test marked gpu, the kernels' tests under compute-sanitizer's
memcheck and racecheck, then the kernel benchmark and the latency benchmark: first of the miniature, whose pictures in
half precision are also judged beside those in float32, then of full-size SDXL at 1024², 30 steps, for 1, 2 and 4
persons, every backend that can be opened here beside diffusers, eager and compiled; and a few steps of training one of
that size. --only leaves parts out, or runs
them one by one: what "checkpoint-sdxl" and "build-sdxl" made stays, and a build that was stopped goes on where it was.
A part that fails is recorded with its output, and the next one runs all the same: a GPU is a rare guest.

--out FILE (default gpu-test.json): {"schema", "date", "gpu", "versions", "parts": {PART: {"command", "seconds",
"status" (null: its program is not here), "output" (its end), "result" (its own JSON, or null)}}}.

Exit status: 0 no part failed (one whose program is not here is left out, and said), 1 one failed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from realisid_trt.backends.cuda_memory import Gpu, probe
from realisid_trt.command_line import Outcome, reporter, run
from realisid_trt.files import whole_or_not

from .measure import now, versions

ROOT = Path(__file__).resolve().parent.parent
OUTPUT_CHARACTERS = 6000
PYTHON = shlex.quote(sys.executable)
LATENCY = "{python} -m benchmarks.latency --device cuda --backend all --baseline naive naive-compiled --memory --json"
GRAPH = "{python} -m benchmarks.latency --device cuda --backend all --baseline none --cuda-graph --json"
SDXL = LATENCY + " --engine {sdxl} --height 1024 --width 1024 --steps 30 --persons "
SANITIZER = "compute-sanitizer --error-exitcode 1 --tool"


class Part(NamedTuple):
    """A command, and after how many seconds it is stopped."""

    command: str
    seconds: int = 1800


PARTS = {
    "build": Part("{python} -m export.build --fp16 --out {engine} --json"),
    "tests": Part("{python} -m pytest -q -m gpu tests/gpu tests/kernels"),
    "memcheck": Part(SANITIZER + " memcheck {python} -m pytest -q -m gpu tests/kernels"),
    "racecheck": Part(SANITIZER + " racecheck {python} -m pytest -q -m gpu tests/kernels"),
    "kernels": Part("{python} -m benchmarks.kernels --json"),
    "latency": Part(LATENCY + " --engine {engine} --persons 1 2 --runs 10"),
    "latency-graph": Part(GRAPH + " --engine {engine} --persons 1 2 --runs 10"),
    "pictures": Part(
        "{python} -m training.evaluate --engine {engine} --checkpoint checkpoints/miniature --experiment precision "
        "--out {engine}-tables --json"
    ),
    "checkpoint-sdxl": Part("{python} -m export.miniature --preset sdxl --out {sdxl}-checkpoint --force --json"),
    "training-sdxl": Part(
        "{python} -m benchmarks.training --checkpoint {sdxl}-checkpoint --batch-size 4 --checkpointing --json"
    ),
    "build-sdxl": Part(
        "{python} -m export.build --checkpoint {sdxl}-checkpoint --out {sdxl} --fp16 --gpu-only --batch 1 "
        "--persons 4 --resolution 1024 --json",
        7200,
    ),
    "latency-sdxl-1": Part(SDXL + "1 --runs 20", 3600),
    "latency-sdxl-2": Part(SDXL + "2 --runs 20", 3600),
    "latency-sdxl-graph": Part(GRAPH + " --engine {sdxl} --persons 1 2 --runs 20", 3600),
    "latency-sdxl-4": Part(SDXL + "4 --runs 20", 3600),
}


def run_part(command: str, seconds: float = 1800) -> dict[str, Any]:
    """One part, in a process of its own; it and whatever it started are ended after so many seconds."""
    start = time.perf_counter()
    arguments = shlex.split(command)
    if shutil.which(arguments[0]) is None:
        return {
            "command": command,
            "seconds": 0.0,
            "status": None,
            "output": f"{arguments[0]} is not here",
            "result": None,
        }
    process = subprocess.Popen(
        arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        said, complained = process.communicate(timeout=seconds)
    except BaseException as stopped:
        os.killpg(process.pid, signal.SIGKILL)
        said, complained = process.communicate()
        if not isinstance(stopped, subprocess.TimeoutExpired):
            raise
        complained += f"stopped after {seconds} s"
    result = None
    if "--json" in arguments and process.returncode == 0:
        with contextlib.suppress(ValueError, IndexError):
            result = json.loads(said.strip().splitlines()[-1])
    return {
        "command": command.replace(PYTHON, "python"),
        "seconds": round(time.perf_counter() - start, 1),
        "status": process.returncode,
        "output": ("" if result else said[-OUTPUT_CHARACTERS:]) + complained[-OUTPUT_CHARACTERS:],
        "result": result,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description="Build, test and measure on this machine's GPU.",
        epilog="""examples:
  python -m benchmarks.gpu --out gpu-test.json
  python -m benchmarks.gpu --only checkpoint-sdxl build-sdxl latency-sdxl-1 --out sdxl.json""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("gpu-test.json"), metavar="FILE")
    parser.add_argument("--engine", default="engines/miniature-fp16", metavar="DIR", help="built there")
    parser.add_argument("--sdxl", default="engines/sdxl-fp16", metavar="DIR", help="the full-size engine, built there")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--json", action="store_true", help="the last line of stdout is one JSON object")
    options = parser.parse_args(arguments)

    def command() -> Outcome:
        cuda = probe(0)
        report = reporter(options.json)
        parts: dict[str, Any] = {}
        values = {
            "schema": 1,
            "date": now(),
            "gpu": f"{Gpu(0).name}, driver for CUDA {cuda}",
            "versions": versions(),
            "parts": parts,
        }
        engine, sdxl = shlex.quote(options.engine), shlex.quote(options.sdxl)
        for name in options.only:
            asked = PARTS[name].command.format(python=PYTHON, engine=engine, sdxl=sdxl)
            parts[name] = part = run_part(asked, PARTS[name].seconds)
            said = {0: "passed", None: part["output"]}.get(part["status"], "FAILED")
            report(f"{name}: {said}, {part['seconds']} s")
            with whole_or_not(options.out) as partial:
                partial.write_text(json.dumps(values, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        failed = [name for name, part in parts.items() if part["status"]]
        absent = [name for name, part in parts.items() if part["status"] is None]
        last = f"{options.out}: {', '.join(failed) or 'nothing'} failed, {', '.join(absent) or 'nothing'} left out"
        return Outcome(values, [last], 1 if failed else 0)

    return run(command, options.json)


if __name__ == "__main__":
    sys.exit(main())
