"""python -m benchmarks.latency: milliseconds per picture, stage and step, beside a baseline on the same weights.

Engines (one per --backend) and baselines run interleaved in one process on the same device, threads, prompts, persons
and noise. A ratio is the median of the ratios within each round. The final latents are compared in every round, so no
ratio compares different work. A warm-up round takes four steps, or the more that it needs for steps without and with
the ID. In it torch.compile compiles for every shape of a case; a later compilation is an error.

Measure on a machine that does nothing else: torch's OpenMP threads wait by spinning, and another program on their cores
slows the baselines down several times. On a busy machine --threads 1 still gives usable figures.

--json prints one object as the last line of stdout, and --out FILE stores the same. All times are milliseconds; a
spread is {"p50", "p95", "min", "max", "count"}; TFLOP are 1e12 operations, a multiply-add is 2:

  schema, date (UTC), commit (or null), command, versions {package: version}
  hardware      gpu (or null), cpu, architecture, threads, cores_available, cores, ram_bytes, system, load_average_1min
  engine        name, seal (digest of all that its manifest lists); backend and precision of the first engine
  engines       {"engine", or "engine:BACKEND" if several were asked for: {backend, precision}}
  left_out      {backend: the reason why --backend all does not measure it}
  settings      height, width, steps, steps_without_id, sampler, runs, warmup, seed, prompt, compiler (of
                naive-compiled), controls (branches that are shown a picture), memory_format (of the baselines),
                baseline (the class of their pipeline)
  cases         one per number of persons:
    persons
    contenders  {an engine | a baseline: {
      total_ms, stages_ms {stage: spread}       "a.b" is a part of stage "a"
      step_ms {"without_id" | "with_id": spread or null}, step_ms_runs [[ms of each step] of each run]
      cores_busy_elsewhere, cores_stolen (spread or null)     by other processes and by other virtual machines
                                                meanwhile: a figure with much of either is unreliable
      rows, step_rows {"without_id" | "with_id": {network: rows} or null}      counted where they ran; step_rows and
                                                step_tflop are of the first such step: a branch may end later
      tflop, step_tflop {"without_id" | "with_id": TFLOP or null}, gflop_per_s: of the whole picture, at p50
      stage_gflop_per_s {stage: at p50}, for the stages that are one network
      resting_memory_bytes, peak_memory_bytes   of a process that does nothing else (memory.py), when it is open and
                                                while it makes a picture; null without --memory}}
    ratios      {baseline, or "baseline / engine:BACKEND" of several engines: {engine, baseline,
      total, denoise {median, min, max, pairs}  how many times faster the engine is
      flop                                      how many times more operations the baseline evaluates
      latents_relative_rms                      of the difference of the final latents, the worst round}}
  photo         {stage: spread}, or null without --photo

Schema 1 has one engine. It lacks engines, left_out, gpu, memory, and the names in ratios.

Exit status: 0 measured, 1 failed, 2 bad usage.
"""

from __future__ import annotations

import contextlib
import json
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from realisid_trt import Engine
from realisid_trt.commands.command_line import Outcome, execute, run
from realisid_trt.errors import RealisIDError, RequestError
from realisid_trt.files import sha256, whole_or_not
from realisid_trt.machine import available_cores
from realisid_trt.manifest import Manifest

from .contenders import of_engine, open_baselines, open_engines, photo_stages
from .flops import Operations
from .measure import commit, hardware, now, versions
from .memory import Job, bytes_used, measure_alone, release
from .options import Options, parser
from .report import plot, summarise, table
from .rounds import interleaved
from .same import check_same_arithmetic, open_original
from .scene import Scene

SCHEMA = 2
MEMORY = ("resting_memory_bytes", "peak_memory_bytes")
Report = Callable[[str], None]


def measure(options: Options, command: Sequence[str] = (), report: Report = lambda line: None) -> dict[str, Any]:
    """The measurement, as JSON values: the schema is at the top of this file. A progress bar goes to stderr.

    command: the arguments, to be stated with the figures. report: called with each line of text for people.
    Raises RequestError, CheckpointError, or the errors of loading and running an engine.
    """
    options.check()
    threads = options.threads or _threads(options.device)
    device = f"cpu:{threads}" if options.device == "cpu" else options.device
    if options.memory:
        bytes_used(device)  # raises if the system does not state it
    manifest = Manifest.read(options.engine)
    options = options.of_engine(manifest.config)
    scene = Scene.of(options, manifest)
    result = {
        "schema": SCHEMA,
        "date": now(),
        "commit": commit(),
        "versions": versions(),
        "command": shlex.join(["python", "-m", "benchmarks.latency", *command]),
        **_times(options, manifest, scene, device, threads, report),
    }
    _add_memory(options, result, threads, report)
    return result


def _times(
    options: Options, manifest: Manifest, scene: Scene, device: str, threads: int, report: Report
) -> dict[str, Any]:
    """The measured times, and the hardware. Everything that was opened for it is released."""
    engines, left_out = open_engines(options, manifest, device)
    for backend, reason in left_out.items():
        report(f"{backend} is left out: {reason}")
    first = next(iter(engines.values()))
    device, precision = first.backend.device, first.backend.precision
    if options.baselines:
        check_same_arithmetic(device, precision)
    machine = hardware(threads, device)
    checkpoint, pipeline = None, None
    if options.checkpoint is not None or options.baselines:
        checkpoint = open_original(manifest, options.checkpoint, options.base_model, options.variant)
    operations = Operations(manifest, scene.height, scene.width, checkpoint)
    try:
        per_row = {count: operations.of(count) for count in options.persons or ()}
    except RequestError as error:
        report(f"No operations are counted: {error}")
        per_row = {}
    photo = photo_stages(first, options.photo, options.runs) if options.photo else None
    contenders = {name: of_engine(engine, scene) for name, engine in engines.items()}
    with contextlib.ExitStack() as stack:
        if checkpoint is not None and options.baselines:
            report("loading the baseline's weights")
            opened, pipeline = open_baselines(
                options, options.baselines, checkpoint, scene, device, precision, threads, stack
            )
            contenders |= opened
        cases = [
            summarise(persons, taken, differences, scene.switch, per_row.get(persons, {}))
            for persons, taken, differences in interleaved(options, scene, list(engines), contenders, precision)
        ]
    asked = {name: getattr(options, name) for name in ("sampler", "runs", "warmup", "seed", "prompt", "compiler")}
    asked["controls"] = list(scene.controls)
    asked["memory_format"] = pipeline and pipeline.memory_format
    asked["baseline"] = pipeline and type(pipeline).__name__
    size = {"height": scene.height, "width": scene.width, "steps": scene.steps, "steps_without_id": scene.switch}
    return {
        "hardware": machine,
        "engine": {
            "name": manifest.path.name,
            "seal": sha256(json.dumps(manifest.values["seal"], sort_keys=True).encode()),
            **_backend(first),
        },
        "engines": {name: _backend(engine) for name, engine in engines.items()},
        "left_out": left_out,
        "settings": {**size, **asked},
        "cases": cases,
        "photo": photo,
    }


def _backend(engine: Engine) -> dict[str, str]:
    backend = engine.backend
    return {"backend": f"{backend.name} on {backend.device}", "precision": backend.precision}


def _add_memory(options: Options, result: dict[str, Any], threads: int, report: Report) -> None:
    """Adds the memory of every contender of every case, measured alone. A failure is reported; the times are kept."""
    release()
    for case in result["cases"]:
        for name, contender in case["contenders"].items():
            contender |= dict.fromkeys(MEMORY)
            if not options.memory:
                continue
            report(f"memory of {name}, persons: {case['persons']}")
            try:
                contender |= measure_alone(_job(options, result, threads, name, case["persons"]))
            except RealisIDError as error:
                report(f"not measured: {error}")


def _job(options: Options, result: Mapping[str, Any], threads: int, name: str, persons: int) -> Job:
    first, engines = result["engine"], result["engines"]
    backend, _, device = engines.get(name, first)["backend"].partition(" on ")
    memory_format = result["settings"]["memory_format"]
    return Job(
        options=replace(options, memory_format=memory_format) if memory_format else options,
        backend=backend,
        baseline=None if name in engines else name,
        device=device,
        precision=first["precision"],
        threads=threads,
        persons=persons,
    )


def _threads(device: str) -> int:
    """The number of threads that a device's name states, or of all cores."""
    count = device.partition(":")[2]
    given = int(count) if device.startswith("cpu") and count.isascii() and count.isdecimal() else 0
    return given or available_cores()


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns the exit status: 0 measured, 1 failed, 2 bad usage."""
    arguments = sys.argv[1:] if arguments is None else arguments
    given: dict[str, Any] = vars(parser().parse_args(arguments))
    as_json = given.pop("json")
    given = {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}
    options = Options(**{key: value for key, value in given.items() if value is not None})

    def command() -> Outcome:
        result = measure(options, arguments, lambda text: print(text, file=sys.stderr, flush=True))
        if options.out is not None:
            with whole_or_not(options.out) as partial:
                partial.write_text(json.dumps(result, allow_nan=False) + "\n", encoding="utf-8")
        if options.plot is not None:
            plot(result, options.plot)
        return Outcome(result, [table(result)])

    return run(command, as_json)


if __name__ == "__main__":
    sys.exit(execute(main))
