"""python -m benchmarks.training: the time and the memory of a step that trains both branches.

python -m benchmarks.training --checkpoint CKPT --checkpointing
accelerate launch --num_processes 8 -m benchmarks.training --checkpoint CKPT --batch-size 32 --checkpointing

The real stage, optimizer and average, on drawn people at the checkpoint's own size; nothing is written.

--json: {"schema", "command", "date", "commit", "versions", "hardware", "processes", "device", "side_px", "parameters"
(trained ones), "options", "checkpointing", "step_s" (spread, without the first two steps), "examples_per_s" (of all
processes, at the median), "peak_bytes" (of this process on its GPU; null on a CPU), "losses"}.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from export.checkpoint import Checkpoint
from realisid_trt.commands.command_line import Outcome, execute, run
from realisid_trt.errors import RequestError
from training.examples import WorldScenes
from training.loop import Learner, TrainingOptions, average_of
from training.processes import accelerator_of
from training.sequence import batches
from training.stages.branches import BranchesStage
from training.store import OnDemandStore
from training.train import memory_errors

from .measure import commit, hardware, now, spread, versions

WARMUP = 2  # steps in which memory is first allocated


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 1 failed, 2 bad usage."""
    given = vars(_parser().parse_args(arguments))
    as_json = given.pop("json")
    return run(lambda: _outcome(**given), as_json)


def _outcome(checkpoint: str, checkpointing: bool, cpu: bool, **options: Any) -> Outcome:
    asked = TrainingOptions(**options).of(BranchesStage)
    if asked.steps <= WARMUP:
        raise RequestError(f"--steps is {asked.steps}, expected more than the {WARMUP} that are not counted.")
    with memory_errors(asked, BranchesStage, checkpointing):
        values = measure(Checkpoint.open(checkpoint), asked, checkpointing, cpu)
    peak = "" if values["peak_bytes"] is None else f", {values['peak_bytes'] / 2**30:.1f} GiB on {values['device']}"
    said = f"{values['parameters'] / 1e6:.1f} M parameters, {values['side_px']} px, {asked.batch_size} examples a step"
    return Outcome(values, [f"{said}: {values['step_s']['p50']:.2f} s{peak}"])


def measure(checkpoint: Checkpoint, options: TrainingOptions, checkpointing: bool, cpu: bool) -> dict[str, Any]:
    """The figures, as JSON values: the keys are at the top of this file.

    options: with batch size and learning rate, see `TrainingOptions.of`.
    """
    c, accelerator = checkpoint, accelerator_of(options.precision, cpu)
    options.check_shared(accelerator.num_processes)
    assert options.batch_size is not None
    on_gpu = accelerator.device.type == "cuda"
    side = c.sample_size * c.vae_scale_factor
    people = WorldScenes(
        pictures=2 * options.batch_size, persons=(1,), size_px=side, grid_px=c.config.box_snap or c.vae_scale_factor,
        crop_px=c.image_size, margin=c.config.face_margin,
    )  # fmt: skip
    stage = BranchesStage(c, OnDemandStore(people), accelerator, new=False, seed=options.seed)
    if checkpointing:
        stage.save_memory()
    learner = Learner(accelerator, stage, options)
    ema = average_of(learner)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    rows = batches(
        stage, options.seed, 0, options.steps, options.batch_size, accelerator.process_index, accelerator.num_processes
    )
    seconds, losses = [], []
    for number, batch in enumerate(rows):  # preparing a batch is not timed: training does it in other processes
        start = time.perf_counter()
        losses.append(float(learner.learn(batch, number)["loss"]))
        if ema:
            ema.step(learner.parameters)
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    steps = spread(seconds[WARMUP:])
    return {
        "schema": 1,
        "command": f"python -m benchmarks.training {' '.join(sys.argv[1:])}",
        "date": now(),
        "commit": commit(),
        "versions": versions(),
        "hardware": hardware(torch.get_num_threads(), str(accelerator.device)),
        "processes": accelerator.num_processes,
        "device": str(accelerator.device),
        "side_px": side,
        "parameters": learner.size,
        "options": asdict(options),
        "checkpointing": checkpointing,
        "step_s": steps,
        "examples_per_s": options.batch_size / steps["p50"],
        "peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
        "losses": [loss if math.isfinite(loss) else str(loss) for loss in losses],
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training",
        description="Time a step of training both branches at a checkpoint's full size, and its memory.",
    )
    default, add = TrainingOptions(), parser.add_argument
    add("--checkpoint", required=True, metavar="CKPT", help="checkpoint to train")
    add("--steps", type=int, default=8, help=f"the first {WARMUP} are not counted (default %(default)s)")
    add("--batch-size", type=int, default=4, help="of all processes together (default %(default)s)")
    add("--accumulate", type=int, default=1, metavar="N", help="work through a batch in N parts")
    add("--checkpointing", action="store_true", help="compute activations twice instead of keeping them")
    add("--ema", type=float, default=default.ema, help="decay of the averaged weights, 0: none (default %(default)s)")
    add("--precision", choices=("bf16", "no"), default=default.precision, help="default %(default)s")
    add("--cpu", action="store_true", help="on the CPU, even where there is a GPU")
    add("--json", action="store_true", help="the last line of stdout is one JSON object")
    return parser


if __name__ == "__main__":
    sys.exit(execute(main))
