"""python -m benchmarks.gpu: all that needs a GPU, behind one command, into one JSON file. `make gpu-test` runs it.

Builds the miniature in half precision, runs every test marked gpu, the kernels' tests under compute-sanitizer's
memcheck and racecheck, then the kernel benchmark and the latency benchmark. A part that
fails is recorded with its output, and the next one runs all the same: a GPU is a rare guest.

--out FILE (default gpu-test.json): {"schema", "date", "gpu", "versions", "parts": {"build" | "tests" | "kernels" |
"memcheck" | "racecheck" | "latency": {"command", "seconds", "status" (null: its program is not
here), "output" (its end), "result" (its own JSON, or null)}}}.

Exit status: 0 no part failed (one whose program is not here is left out, and said), 1 one failed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from realisid_trt.backends.cuda_memory import Gpu, probe
from realisid_trt.command_line import Outcome, reporter, run
from realisid_trt.files import whole_or_not

from .measure import now, versions

ROOT = Path(__file__).resolve().parent.parent
OUTPUT_CHARACTERS, PART_SECONDS = 6000, 1800
PYTHON = shlex.quote(sys.executable)
LATENCY = "{python} -m benchmarks.latency --engine {engine} --device cuda --baseline none --runs 10 --json"
SANITIZER = "compute-sanitizer --error-exitcode 1 --tool"
PARTS = {
    "build": "{python} -m export.build --fp16 --out {engine} --json",
    "tests": "{python} -m pytest -q -m gpu tests/gpu tests/kernels",
    "memcheck": SANITIZER + " memcheck {python} -m pytest -q -m gpu tests/kernels",
    "racecheck": SANITIZER + " racecheck {python} -m pytest -q -m gpu tests/kernels",
    "kernels": "{python} -m benchmarks.kernels --json",
    "latency": LATENCY,
}


def run_part(command: str) -> dict[str, Any]:
    """One part, in a process of its own."""
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
    try:
        done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=PART_SECONDS)
    except subprocess.TimeoutExpired as stuck:
        done = subprocess.CompletedProcess(arguments, 124, str(stuck.stdout), f"stopped after {PART_SECONDS} s")
    result = None
    if "--json" in arguments and done.returncode == 0:
        with contextlib.suppress(ValueError, IndexError):
            result = json.loads(done.stdout.strip().splitlines()[-1])
    return {
        "command": command.replace(PYTHON, "python"),
        "seconds": round(time.perf_counter() - start, 1),
        "status": done.returncode,
        "output": ("" if result else done.stdout[-OUTPUT_CHARACTERS:]) + done.stderr[-OUTPUT_CHARACTERS:],
        "result": result,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description="Build, test and measure on this machine's GPU.",
        epilog="example:\n  python -m benchmarks.gpu --out gpu-test.json",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("gpu-test.json"), metavar="FILE")
    parser.add_argument("--engine", default="engines/miniature-fp16", metavar="DIR", help="built there")
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
        for name in options.only:
            parts[name] = part = run_part(PARTS[name].format(python=PYTHON, engine=shlex.quote(options.engine)))
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
