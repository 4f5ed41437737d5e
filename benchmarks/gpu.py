"""python -m benchmarks.gpu: everything that needs a GPU, by one command, into one JSON file. `make gpu-test` runs it.

Runs, in order of importance: the kernels' tests, the kernel benchmark, the tests again under compute-sanitizer's
memcheck and racecheck. It builds the miniature in half precision, finds the backends that open it, compares their
pictures with the CPU's in float32, runs the engine's tests marked gpu, measures latencies, and tabulates the effect of
the precision on pictures. Then it measures full-size SDXL at 1024² and 30 steps for 1, 2 and 4 persons, with every
backend that opens, beside diffusers, eager and compiled; and a few steps of training a model of that size. --only names
the parts to run: "checkpoint-sdxl" and "build-sdxl" keep their results for a later run, and a stopped build continues.
A part that fails is recorded with its output, and the next one still runs.

**A GPU for minutes.** --minutes N starts no part that needs more than the remaining time, stops the running part when
the time is over, reduces each part (fewer runs, no torch.compile), and lists the parts that were left out.

--prepare KIT makes in advance, on any machine, the files that such a machine lacks: kernels for its GPU, the engine of
the miniature, the graphs and the checkpoint of full size without their weights, wheels of cuda-python, diffusers and
ONNX Runtime for CUDA. KIT/part-01, KIT/part-02, … are at most --part-mib MiB each, and can be copied one by one; on
that machine, --kit KIT uses those that were copied. The same --prepare again makes only what is missing; --items
selects the items. The full-size items take an hour and 60 GB the first time, all others a few minutes.
The machine needs Python with torch, onnx, transformers, opencv, pytest and their requirements; not this package itself.

--out FILE (default gpu-test.json), written anew after every part: {"schema", "date", "command", "minutes" (or null),
"gpu", "driver_problem", "hardware", "versions", "kit" ({ITEM: where it is} or null), "running" (the part under way, or
null), "parts": {PART: {"command", "seconds", "status" (null: its program is not here, or refuses the GPU, or the time
was over), "output" (its end), "result" (its own JSON, or null)}}, "left_out": {NAME: reason}}.

Exit status: 0 no part failed (a part that was left out has not failed), 1 one failed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from realisid_trt.backends.tensorrt_flavours import RTX_ARCHITECTURES
from realisid_trt.commands.command_line import Outcome, execute, reporter, run
from realisid_trt.errors import BackendError, DiskError, RequestError
from realisid_trt.files import cache_folder, whole_or_not

from .gpu_parts import PARTS, PYTHON, SANITIZER_FAULT, Part, missing_packages, placeholders, run_part
from .kit.index import Kit, KitError
from .kit.plan import ITEMS, Plan
from .measure import now

MIN_MINUTES = 1
SPARE_SECONDS = 5  # of --minutes, for writing and ending
TENSORRT = "tensorrt is not installed here, and no kit brings it: its libraries are gigabytes"


class Session:
    """One run of the command: its environment, its remaining time and its results.

    values: the content of the JSON file.
    """

    def __init__(self, options: argparse.Namespace, command: Sequence[str]) -> None:
        self.options = options
        self.start = time.monotonic()
        self.report = reporter(options.json)
        self.kit = None if options.kit is None else Kit.open(options.kit)
        self.environment = dict(os.environ)
        self.parts: dict[str, Any] = {}
        self.left_out: dict[str, str] = {}
        self.values: dict[str, Any] = {
            "schema": 2,
            "date": now(),
            "command": shlex.join(["python", "-m", "benchmarks.gpu", *command]),
            "minutes": options.minutes,
        }

    def seconds_left(self) -> float:
        """Remaining seconds of --minutes; infinite without --minutes."""
        if self.options.minutes is None:
            return math.inf
        return self.start + 60 * self.options.minutes - SPARE_SECONDS - time.monotonic()

    def unpack(self) -> dict[str, str] | None:
        """Unpacks the files that the parts' processes import and load. Returns the place of each item."""
        if self.kit is None:
            return None
        from .kit.place import place_beside
        from .kit.wheels import WHEELS, unzip

        site, found = self.kit.folder.absolute() / f"site-{self.kit.key[:8]}", {}
        for outdated in set(self.kit.folder.absolute().glob("site-*")) - {site}:
            shutil.rmtree(outdated, ignore_errors=True)
        for name, folder in {
            "cubins": self.kit.folder.absolute() / "cubins",
            "photos": cache_folder(),
            **dict.fromkeys(WHEELS, site),
        }.items():
            if problem := self.kit.missing(name):
                self.left_out[name] = problem
                continue
            try:
                if name in WHEELS:
                    with tempfile.TemporaryDirectory() as wheels:
                        place_beside(self.kit, name, Path(wheels))
                        found[name] = unzip(name, sorted(Path(wheels).iterdir()), site)
                else:
                    place_beside(self.kit, name, folder)
                    found[name] = str(folder)
            except (KitError, DiskError) as error:
                self.left_out[name] = str(error)
        link_cuda_libraries(site)
        before = self.environment.get("PYTHONPATH")
        self.environment["PYTHONPATH"] = f"{site}{os.pathsep}{before}" if before else str(site)
        self.environment["REALISID_TRT_CUBINS"] = str(self.kit.folder.absolute() / "cubins")
        self.environment["REALISID_TRT_TEST_ENGINE"] = str(Path(self.options.engine).absolute())
        return found

    def describe(self) -> None:
        """The GPU, the machine and the versions, as the parts find them. Raises BackendError without a GPU."""
        limit = max(1.0, min(120.0, self.seconds_left()))
        part = run_part(f"{PYTHON} -m benchmarks.machine --json", limit, self.environment)
        if part["status"] == -signal.SIGKILL:
            raise BackendError(
                f"the GPU did not answer within {limit:.0f} s: python -m benchmarks.machine was stopped. Check whether "
                f"nvidia-smi answers. Its last output: {part['output'].strip()[-300:]}"
            )
        if part["result"] is None:
            raise BackendError(part["output"].rpartition("error: ")[2].strip())
        self.values |= {key: part["result"][key] for key in ("gpu", "driver_problem", "hardware", "versions")}
        if "diffusers" not in self.values["versions"]:
            self.left_out["baselines"] = "diffusers is not installed here"
        if "tensorrt" not in self.values["versions"]:
            self.left_out["tensorrt"] = TENSORRT
        if "tensorrt_rtx" not in self.values["versions"]:
            capability, rtx = part["result"]["capability"], ", ".join(RTX_ARCHITECTURES)
            reason = "is not installed here" if capability in RTX_ARCHITECTURES else f"has plans for {rtx} only"
            self.left_out["tensorrt-rtx"] = f"tensorrt-rtx {reason}; this is {capability}"

    def obstacle(self, name: str) -> str | None:
        """Why a part is left out; None if it can be run now."""
        part, reasons = PARTS[name], list[str]()
        if not self._in_kit(part):
            reasons = missing_packages(part.needs, self.values["versions"])
            if reasons and part.item and self.kit is not None:
                reasons.append(self.kit.missing(part.item) or "")
            reasons += [f"{other} {problem}" for other in part.after if (problem := self._problem(other))]
        if part.needs_backend and not reasons and not self._opens():
            reasons.append("no backend opens on this GPU: see the part backends")
        if not reasons and part.min_seconds > self.seconds_left():
            left = max(0, self.seconds_left())
            reasons.append(f"{left:.0f} s of --minutes are left, and it takes about {part.min_seconds} s or more")
        return "; ".join(reasons) or None

    def _problem(self, name: str) -> str | None:
        """Why a part that others need counts as missing; None if it passed, or was not requested in this run."""
        if name in self.left_out:
            return "was left out"
        return "failed" if name in self.parts and self.parts[name]["status"] else None

    def _in_kit(self, part: Part) -> bool:
        return bool(part.item) and self.kit is not None and self.kit.missing(part.item) is None

    def _opens(self) -> bool:
        """Whether any backend opens on the GPU, according to the part "backends"; True if that part has no result."""
        found = self.parts.get("backends")
        if found is None or found["result"] is None:
            return True
        return any("left_out" not in backend for backend in found["result"]["backends"].values())

    def command(self, name: str) -> str:
        part = PARTS[name]
        values = placeholders(
            self.options.engine,
            self.options.sdxl,
            brief=self.options.minutes is not None,
            kit=self.kit is not None,
            versions=self.values["versions"],
            sdxl_checkpoint=self._problem("checkpoint-sdxl") is None,
        )
        if self._in_kit(part):
            out = values["engine"] if name == "build" else values["sdxl"]
            out += "-checkpoint" if name == "checkpoint-sdxl" else ""
            return f"{PYTHON} -m benchmarks.kit {shlex.quote(str(self.options.kit))} {part.item} --out {out} --json"
        return part.command.format_map(values)

    def run(self, name: str) -> None:
        """Runs a part, or records the reason why not; in the values and on the disk."""
        if reason := self.obstacle(name):
            self.left_out[name] = reason
            self.report(f"{name}: left out: {reason}")
            return
        self.write(running=name)
        brief = self.options.minutes is not None
        share = PARTS[name].share_of(self.options.minutes)
        limit = min(self.seconds_left(), PARTS[name].max_seconds, share)
        part = run_part(self.command(name), limit, self.environment)
        stopped = part["seconds"] + 0.1 >= limit  # the seconds are rounded
        if brief and part["status"] and stopped and not SANITIZER_FAULT.search(part["output"]):
            part["status"] = None
            over = "--minutes were over" if self.seconds_left() <= 0 else "its share of --minutes was over"
            self.left_out[name] = f"stopped after {part['seconds']:.0f} s, when {over}"
        elif part["status"] is None:
            self.left_out[name] = part["output"].strip()[-300:]
        self.parts[name] = part
        outcome = {0: "passed", None: f"left out: {self.left_out.get(name)}"}.get(part["status"], "FAILED")
        self.report(f"{name}: {outcome}, {part['seconds']} s")

    def write(self, running: str | None = None) -> None:
        """Writes the JSON file, atomically."""
        values = self.values | {"running": running, "parts": self.parts, "left_out": self.left_out}
        with whole_or_not(self.options.out) as partial:
            partial.write_text(json.dumps(values, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def link_cuda_libraries(site: Path) -> None:
    """Links CUDA's libraries, which torch's wheels installed, to the place where ONNX Runtime looks for them."""
    import importlib.util

    spec = importlib.util.find_spec("nvidia")
    found = [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec is not None else []
    if found and site.is_dir() and not (site / "nvidia").exists():
        (site / "nvidia").symlink_to(found[0])


def measure(options: argparse.Namespace, command: Sequence[str]) -> Outcome:
    """Runs all requested parts. Raises BackendError without a GPU, KitError, RequestError."""
    if options.minutes is not None and options.minutes < MIN_MINUTES:
        raise RequestError(f"--minutes is {options.minutes:g}, expected at least {MIN_MINUTES}.")
    session = Session(options, command)
    unpacked = session.unpack()
    session.describe()
    session.values["kit"] = unpacked
    for what, why in session.left_out.items():
        session.report(f"{what}: left out: {why}")
    session.write()
    for name in options.only:
        session.run(name)
        session.write()
    failed = [name for name, part in session.parts.items() if part["status"]]
    left_out = ", ".join(session.left_out) or "nothing"
    last = f"{options.out}: {', '.join(failed) or 'nothing'} failed, {left_out} left out"
    values = session.values | {"parts": session.parts, "left_out": session.left_out}
    return Outcome(values, [last], 1 if failed else 0)


def make_kit(options: argparse.Namespace) -> Outcome:
    """Makes the kit. Raises the errors of `prepare`."""
    from .kit.prepare import prepare  # imports torch

    plan = Plan(
        folder=options.prepare,
        items=tuple(options.items or ()),
        part_mib=options.part_mib,
        python=options.python,
        architecture=options.arch,
        engine=Path(options.engine),
        sdxl=Path(options.sdxl),
    )
    result = prepare(plan, reporter(options.json))
    lines = [f"{options.prepare}/{part}: {size / 2**20:.1f} MiB" for part, size in result["part_bytes"].items()]
    return Outcome(result, lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = _parser().parse_args(arguments)
    return run(lambda: make_kit(options) if options.prepare else measure(options, arguments), options.json)


def _parser() -> argparse.ArgumentParser:
    defaults: Mapping[str, Any] = vars(Plan(Path()))
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description="Build, test and measure on this machine's GPU; or prepare for one that is available for minutes.",
        epilog="""examples:
  python -m benchmarks.gpu --out gpu-test.json
  python -m benchmarks.gpu --only checkpoint-sdxl build-sdxl latency-sdxl-1 --out sdxl.json
  python -m benchmarks.gpu --prepare gpu-kit                       # here, with a network and time
  python -m benchmarks.gpu --kit gpu-kit --minutes 12              # there, with the parts that were carried""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--out", type=Path, default=Path("gpu-test.json"), metavar="FILE")
    add("--engine", default=str(defaults["engine"]), metavar="DIR", help="the miniature's engine, built there")
    add("--sdxl", default=str(defaults["sdxl"]), metavar="DIR", help="the full-size engine, built there")
    add("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    add("--minutes", type=float, metavar="N", help="time limit for everything (default: none)")
    add("--kit", type=Path, metavar="KIT", help="the kit that was prepared for this machine")
    add("--json", action="store_true", help="the last line of stdout is one JSON object")
    kit = parser.add_argument_group("to prepare for a machine")
    kit.add_argument("--prepare", type=Path, metavar="KIT", help="make a kit, and measure nothing")
    kit.add_argument("--items", nargs="+", metavar="ITEM", help=f"{', '.join(ITEMS)} (default: all)")
    kit.add_argument("--part-mib", type=int, default=defaults["part_mib"], metavar="N", help="default %(default)s")
    kit.add_argument("--python", default=defaults["python"], help="of that machine, default %(default)s")
    kit.add_argument("--arch", default=defaults["architecture"], help="of its GPU, default %(default)s")
    return parser


if __name__ == "__main__":
    sys.exit(execute(main))
