"""python -m training.train: trains one stage.

python -m training.train vae --checkpoint START --data DATA --out RUN
accelerate launch --num_processes 2 --cpu -m training.train vae …      # several processes, GPUs or machines
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from export.checkpoint import Checkpoint
from realisid_trt.commands.command_line import Outcome, execute, run
from realisid_trt.commands.flags import flags_of
from realisid_trt.errors import RequestError

from .loop import Run, TrainingOptions, claimed
from .processes import accelerator_of
from .result import trained_for, write_apart, write_checkpoint, write_origin
from .stages import STAGES, Stage
from .store import Store


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 1 failed, 2 bad usage."""
    given = vars(_parser().parse_args(arguments))
    as_json = given.pop("json")
    return run(lambda: _train(**given), as_json)


def _train(
    stage: str,
    checkpoint: str,
    data: str,
    out: str,
    *,
    new: bool,
    half: bool,
    cpu: bool,
    threads: int | None,
    workers: int | None,
    checkpointing: bool,
    no_further: bool,
    base_model: str | None,
    variant: str | None,
    **options: Any,
) -> Outcome:
    if threads or "OMP_NUM_THREADS" not in os.environ:
        shared = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(threads or max(1, shared))
    kind = STAGES[stage]
    planned = TrainingOptions(**options).of(kind)
    start = Checkpoint.open(checkpoint, base_model=base_model, variant=variant)
    store = Store(data)
    accelerator = accelerator_of(planned.precision, cpu)
    planned.check_shared(accelerator.num_processes)
    read = {*kind.reads, *(() if new else kind.writes)} & {*start.components, "scheduler"}
    origin = {
        "weights": {name: start.weights_key(name) for name in sorted(read)},
        "config": trained_for(start) if "unet" in kind.reads else None,
        "examples": store.description,
        "new": new,
    }
    dtype = torch.float16 if half else torch.float32
    with (
        claimed(accelerator, out, kind, planned, origin, no_further) as folder,
        memory_errors(planned, kind, checkpointing),
    ):
        made = kind(start, store, accelerator, new=new, seed=planned.seed)
        if checkpointing:
            made.save_memory()
        training = Run(accelerator, made, planned, folder)
        if not no_further:
            training.train(workers)
        training.finish(lambda trained: _leave(start, trained, folder, training.step, dtype))
    values = {"out": str(folder), "stage": stage, "steps": training.step, "batch_size": planned.batch_size}
    lines = [f"{folder}: {training.step} steps of {planned.batch_size}"]
    return Outcome(values, lines if accelerator.is_main_process else [])


@contextmanager
def memory_errors(options: TrainingOptions, stage: type[Stage], checkpointing: bool) -> Iterator[None]:
    """Turns a GPU's lack of memory into a RequestError that names the options that need less."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        assert options.batch_size is not None
        more = 2 * options.accumulate
        less = [] if checkpointing else ["--checkpointing"]
        if stage.whole_batch and options.batch_size % (PartialState().num_processes * more) == 0:
            less.append(f"--accumulate {more}")
        less += ["a smaller --batch-size"] + ["--ema 0"] * (options.ema > 0)
        raise RequestError(
            f"the GPU has too little memory for this training: {str(error).splitlines()[0]} Try {', '.join(less)}; "
            "nothing that was saved is lost."
        ) from error


def _leave(start: Checkpoint, trained: dict[str, torch.nn.Module], out: Path, step: int, dtype: torch.dtype) -> None:
    if set(trained) <= set(start.components):
        written = write_checkpoint(start, trained, out / "checkpoint", dtype)
    else:
        written = write_apart(trained, out / "weights")
    write_origin(out, step, written)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m training.train",
        description="Train a part of a RealisID checkpoint. A stopped run continues where it stopped.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""examples:
  python -m training.train vae --new --checkpoint START --data out/training/scenes --out out/training/vae
  accelerate launch -m training.train branches --checkpoint CKPT --data data --out runs/mine --steps 20000
  ACCELERATE_USE_CPU=1 torchrun --nproc_per_node 2 -m training.train text-to-image … --cpu""",
    )
    add = parser.add_argument
    add("stage", choices=STAGES, help="stage to train")
    add("--checkpoint", required=True, metavar="CKPT", help="checkpoint to begin with")
    add("--base-model", metavar="MODEL", help="folder or hub id for what the checkpoint lacks")
    add("--variant", help='of the weight files, e.g. "fp16"')
    add("--data", required=True, metavar="DIR", help="examples, as training.prepare makes them")
    add("--out", required=True, metavar="DIR", help="the run: state, log, loss curve, checkpoint")
    add("--new", action="store_true", help="begin with new weights in the parts that are trained")
    shown = "default %(default)s"
    words = {
        "steps": f"steps in all ({shown})",
        "batch_size": "examples per step, of all processes together (default: the stage's)",
        "learning_rate": "default: the stage's",
        "accumulate": "work through a batch in N parts",
        "warmup_steps": shown,
        "decay": f"last share of the steps, with a falling learning rate ({shown})",
        "ema": f"decay of the averaged weights, 0: none ({shown})",
        "save_steps": shown,
        "seed": shown,
        "precision": shown,
    }
    for flag, arguments in flags_of(
        TrainingOptions, words, accumulate={"metavar": "N"}, precision={"choices": ("bf16", "no")}
    ):
        add(flag, **arguments)
    add("--checkpointing", action="store_true", help="compute activations twice instead of keeping them")
    add("--no-further", action="store_true", help="only write the checkpoint of the state that was saved last")
    add("--half", action="store_true", help="write the trained parts in half precision")
    add("--cpu", action="store_true", help="on the CPU, even where there is a GPU")
    add("--threads", type=int, help="threads of a process on the CPU (default: OMP_NUM_THREADS, or else its share "
        "of the cores)")  # fmt: skip
    add("--workers", type=int, metavar="N", help="processes that prepare examples for one that trains (default: 4 if "
        "that has a GPU, else none)")  # fmt: skip
    add("--json", action="store_true", help="the last line of stdout is one JSON object")
    return parser


if __name__ == "__main__":
    sys.exit(execute(main))
