"""python -m benchmarks.gpu: all that needs a GPU, behind one command, into one JSON file. `make gpu-test` runs it.

Builds the miniature in half precision, runs every test marked gpu, then the kernel benchmark and the latency benchmark.
A part that fails is recorded with its output, and the next one runs all the same: a GPU is a rare guest.

--out FILE (default gpu-test.json): {"schema", "date", "gpu", "versions", "parts": {"build" | "tests" | "kernels" |
"latency" | "latency_graph": {"command", "seconds", "status", "output" (its end), "result" (its own JSON, or null)}}}.

Exit status: 0 all parts passed, 1 one failed.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from realisid_trt.backends.cuda_memory import probe
from realisid_trt.command_line import Outcome, reporter, run
from realisid_trt.files import whole_or_not

from .measure import now, versions

ROOT = Path(__file__).resolve().parent.parent
OUTPUT_CHARACTERS = 6000
LATENCY = "-m benchmarks.latency --engine {engine} --device cuda --baseline none --persons 1 2 --runs 10 --json"
PARTS = {
    "build": "-m export.build --fp16 --out {engine} --json",
    "tests": "-m pytest -q -m gpu tests/gpu tests/kernels",
    "kernels": "-m benchmarks.kernels --json",
    "latency": LATENCY,
    "latency_graph": LATENCY + " --cuda-graph",
}


def run_part(command: str) -> dict[str, Any]:
    """One part, in a process of its own."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, *shlex.split(command)], cwd=ROOT, capture_output=True, text=True)
    lines = done.stdout.strip().splitlines()
    try:
        result = json.loads(lines[-1]) if "--json" in command and lines else None
    except ValueError:
        result = None
    return {
        "command": f"python {command}",
        "seconds": round(time.perf_counter() - start, 1),
        "status": done.returncode,
        "output": (done.stdout if result is None else done.stderr)[-OUTPUT_CHARACTERS:]
        + (done.stderr[-OUTPUT_CHARACTERS:] if done.returncode else ""),
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
        values = {"schema": 1, "date": now(), "gpu": f"CUDA {cuda}", "versions": versions(), "parts": parts}
        for name in options.only:
            parts[name] = part = run_part(PARTS[name].format(engine=shlex.quote(options.engine)))
            report(f"{name}: {'passed' if part['status'] == 0 else 'FAILED'} in {part['seconds']} s")
            with whole_or_not(options.out) as partial:
                partial.write_text(json.dumps(values, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        failed = [name for name, part in parts.items() if part["status"]]
        last = f"{options.out}: {', '.join(failed) or 'nothing'} failed"
        return Outcome(values, [last], 1 if failed else 0)

    return run(command, options.json)


if __name__ == "__main__":
    sys.exit(main())
