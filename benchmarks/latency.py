"""python -m benchmarks.latency: milliseconds per picture, stage and step, beside a baseline on the same weights.

Engine and baselines run interleaved in one process on the same threads, prompts, persons and noise; a ratio is the
median of the ratios within each round. The final latents are compared in every round, so that nobody compares
different work. Warm-up rounds take up to four steps.

Measure on a machine that does nothing else: threads of OpenMP and of ONNX Runtime wait by spinning, and whoever shares
their cores slows them down several times, the baseline most. On a busy machine --threads 1 still means something.

--json prints one object as the last line of stdout, and --out FILE stores the same. All times are milliseconds; a
spread is {"p50", "p95", "min", "max", "count"}; TFLOP are 1e12 operations, a multiply-add is 2:

  schema, date (UTC), commit (or null), command, versions {package: version}
  hardware      cpu, architecture, threads, cores_available, cores, ram_bytes, system, load_average_1min
  engine        name, seal (digest of all that its manifest lists), backend, precision
  settings      height, width, steps, steps_without_id, runs, warmup, seed, prompt, memory_format (of the baselines)
  cases         one per number of persons:
    persons
    contenders  {"engine" | a baseline: {
      total_ms, stages_ms {stage: spread}       "a.b" is a part of stage "a"
      step_ms {"without_id" | "with_id": spread or null}, step_ms_runs [[ms of each step] of each run]
      cores_busy_elsewhere, cores_stolen (spread or null)     by other processes and by other virtual machines
                                                meanwhile: a figure with much of either is worth little
      rows, step_rows {"without_id" | "with_id": {network: rows} or null}      counted where they ran
      tflop, step_tflop {"without_id" | "with_id": TFLOP or null}, gflop_per_s: of the whole picture, at p50
      stage_gflop_per_s {stage: at p50}, for the stages that are one network}}
    ratios      {baseline: {
      total, denoise {median, min, max, pairs}  how many times faster the engine is
      flop                                      how many times more operations the baseline evaluates
      latents_relative_rms                      of the difference of the final latents, the worst round}}
  photo         {stage: spread}, or null without --photo

Exit status: 0 measured, 1 failed, 2 bad usage.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from tqdm import tqdm

from realisid_trt import Engine
from realisid_trt.command_line import Outcome, run
from realisid_trt.ddim import initial_noise
from realisid_trt.errors import RequestError
from realisid_trt.files import sha256, whole_or_not
from realisid_trt.machine import available_cores
from realisid_trt.rows import steps_without_id

from .contenders import Contender, check_same_arithmetic, check_same_picture, make_persons, open_original, photo_stages
from .flops import flops_per_row
from .measure import Run, commit, hardware, now, turns, versions
from .options import BASELINES, Options, parser
from .report import plot, summarise, table

SCHEMA = 1
WARM_STEPS = 4  # of a warm-up round: both phases, and other weights show before anybody has waited long


def measure(
    options: Options, command: Sequence[str] = (), report: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """The measurement, as JSON values: the schema stands at the top of this file. A progress bar goes to stderr.

    command: the arguments, to be stated with the figures. report: gets a line for what a person should know.
    Raises RequestError, CheckpointError, or what keeps the engine from being loaded or run.
    """
    options.check()
    threads = options.threads or _threads(options.device)
    device = f"cpu:{threads}" if options.device == "cpu" else options.device
    engine = Engine.load(options.engine, backend=options.backend, device=device, cuda_graph=options.cuda_graph or None)
    model, config = engine.model, engine.config
    height, width = options.height or model.default_size, options.width or model.default_size
    multiple = model.vae_scale_factor * 2 ** (model.levels - 1)
    for name, side_px in (("height", height), ("width", width)):
        if side_px % multiple:
            raise RequestError(f"--{name} is {side_px}, expected a multiple of {multiple} px.")
    steps = options.steps or config.num_inference_steps
    engine.manifest.ddim.timesteps(steps)  # refuses a number of steps that the schedule does not have
    switch = steps_without_id(steps, config.subject_conditioning_ratio)
    backend, manifest = engine.backend, engine.manifest
    names = ["engine", *(name for name in BASELINES if name in options.baseline)]
    if len(names) > 1:
        check_same_arithmetic(backend.device, backend.precision)
    facts = {"date": now(), "commit": commit(), "hardware": hardware(threads), "versions": versions()}

    checkpoint = pipeline = None
    if options.checkpoint is not None or len(names) > 1:
        checkpoint = open_original(manifest, options.checkpoint, options.base_model, options.variant)
    try:
        per_row = flops_per_row(manifest, height, width, checkpoint)
    except RequestError as error:
        report(f"No operations are counted: {error}")
        per_row = {}
    photo = photo_stages(engine, options.photo, options.runs) if options.photo else None
    cells = model.latent_channels, height // model.vae_scale_factor, width // model.vae_scale_factor
    latents = initial_noise(options.seed, cells)[None]
    contenders = {"engine": Contender(partial(engine.generate, height=height, width=width, output="np"), backend)}
    with contextlib.ExitStack() as stack:
        if checkpoint is not None and len(names) > 1:
            from .naive import NaivePipeline, torch_threads

            report("loading the baseline's weights")
            stack.enter_context(torch_threads(threads))
            pipeline = NaivePipeline(checkpoint)
            if options.memory_format == "auto":
                pipeline.use_faster_format(make_persons(engine, 1, height, width, options.seed), latents)
            else:
                pipeline.use_format(options.memory_format)
            for name in names[1:]:
                contenders[name] = Contender(partial(pipeline.generate, **BASELINES[name]), pipeline)
        rounds = [min(steps, WARM_STEPS)] * options.warmup + [steps] * options.runs
        total = len(options.persons) * len(names) * sum(rounds)
        bar = stack.enter_context(tqdm(total=total, unit="step", file=sys.stderr))
        numbers = itertools.count()
        cases = []
        for num_persons in options.persons:
            bar.set_description(f"persons: {num_persons}")
            persons = make_persons(engine, num_persons, height, width, options.seed)
            taken: list[dict[str, Run]] = []
            differences = dict.fromkeys(names[1:], 0.0)
            for num_steps, number in zip(rounds, numbers, strict=False):
                prompt = f"{number}: {options.prompt}"  # never the same again: the engine remembers prompts
                given: dict[str, Any] = {"persons": persons, "latents": latents, "num_inference_steps": num_steps}
                runs = {
                    name: contenders[name].run(prompt, lambda *_: bar.update(), **given)
                    for name in turns(names, number)
                }
                for name, worst in differences.items():
                    differences[name] = max(worst, check_same_picture(runs["engine"], runs[name]))
                taken.append(runs)
            measured = {name: [runs[name] for runs in taken[options.warmup :]] for name in names}
            cases.append(summarise(num_persons, measured, differences, switch, per_row))
    return {
        "schema": SCHEMA,
        **facts,
        "command": shlex.join(["python", "-m", "benchmarks.latency", *command]),
        "engine": {
            "name": manifest.path.name,
            "seal": sha256(json.dumps(manifest.values["seal"], sort_keys=True).encode()),
            "backend": f"{backend.name} on {backend.device}",
            "precision": backend.precision,
        },
        "settings": {
            **{"height": height, "width": width, "steps": steps, "steps_without_id": switch},
            **{name: getattr(options, name) for name in ("runs", "warmup", "seed", "prompt")},
            "memory_format": pipeline and pipeline.memory_format,
        },
        "cases": cases,
        "photo": photo,
    }


def _threads(device: str) -> int:
    """The threads a device's name asks for, or every core."""
    count = device.partition(":")[2]
    return int(count) if device.startswith("cpu") and count.isdigit() and int(count) else available_cores()


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns the exit status: 0 measured, 1 failed, 2 bad usage."""
    arguments = sys.argv[1:] if arguments is None else arguments
    given: dict[str, Any] = vars(parser().parse_args(arguments))
    as_json = given.pop("json")
    options = Options(**{key: tuple(value) if isinstance(value, list) else value for key, value in given.items()})

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
    sys.exit(main())
