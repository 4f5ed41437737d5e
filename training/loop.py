"""The loop of every training: steps, averaged weights, a state that survives a kill, a log that people can look at."""

from __future__ import annotations

import json
import math
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from diffusers.training_utils import EMAModel
from tqdm import tqdm

from export.files import disk_errors, exchange, target_folder, write_json
from realisid_trt.errors import NumericsError, RequestError

from .places import batches
from .stages.stage import Stage

CLIP_NORM = 1.0
BETAS, WEIGHT_DECAY = (0.9, 0.99), 0.01
LEAST_RATE = 0.02  # of the learning rate, at the end
EVERY_STEP = 50  # steps whose losses are logged one by one, to compare a run with another
LOG_STEPS = 50  # of one line of the log afterwards


@dataclass(frozen=True, kw_only=True)
class Course:
    """How long and how fast. The command line reads its defaults from here.

    steps:         in all, those of an earlier run that is continued included.
    batch_size:    examples per step, of all processes together; learning_rate: of AdamW. None: the stage's own.
    warmup_steps:  the learning rate rises to its value over these.
    decay:         share of the steps, the last ones, over which it falls to a fiftieth.
    ema:           decay of the averaged weights, which are what is written in the end.
    save_steps:    between two states.
    seed:          of fresh weights, the examples' order, noise, timesteps and drops.
    precision:     "bf16" (autocast, weights in float32) or "no".
    """

    steps: int = 1000
    batch_size: int | None = None
    learning_rate: float | None = None
    warmup_steps: int = 100
    decay: float = 0.5
    ema: float = 0.999
    save_steps: int = 250
    seed: int = 0
    precision: str = "bf16"

    def rate(self, step: int, learning_rate: float) -> float:
        """The learning rate of step 0, 1, …"""
        rising = min(1.0, (step + 1) / max(self.warmup_steps, 1))
        left = (self.steps - step) / max(self.decay * self.steps, 1)
        return learning_rate * rising * (LEAST_RATE + (1 - LEAST_RATE) * min(1.0, left))


def accelerator_of(course: Course, cpu: bool = False) -> Accelerator:
    """One CPU, one GPU or as many as the launcher started."""
    buckets = DistributedDataParallelKwargs(gradient_as_bucket_view=True)
    return Accelerator(mixed_precision=course.precision, cpu=cpu, kwargs_handlers=[buckets])


def optimizer_of(parameters: list[torch.nn.Parameter], learning_rate: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=learning_rate, betas=BETAS, weight_decay=WEIGHT_DECAY, fused=True)


class _Progress:
    """Steps done, in the saved state."""

    def __init__(self) -> None:
        self.step = 0

    def state_dict(self) -> dict[str, int]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.step = int(state["step"])


class Run:
    """One training in its folder: state/, log.jsonl, run.json, and in the end checkpoint/ and loss.png beside them."""

    def __init__(
        self, accelerator: Accelerator, stage: Stage, course: Course, out: str | Path, origin: dict[str, Any]
    ) -> None:
        """origin: what else decides the outcome (checkpoint, examples, options), as JSON values.

        Raises RequestError if `out` holds another training.
        """
        self.accelerator, self.out, self.course = accelerator, target_folder(out), course
        processes = self.accelerator.num_processes
        self.batch_size = course.batch_size or stage.batch_size
        self.learning_rate = course.learning_rate or stage.learning_rate
        if self.batch_size % processes:
            raise RequestError(f"batch size {self.batch_size} is not divisible by {processes} processes.")
        self._check_folder(stage, origin)
        learning = [parameter for parameter in stage.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(
            learning, lr=self.learning_rate, betas=BETAS, weight_decay=WEIGHT_DECAY, fused=True
        )
        for module in stage.frozen:
            module.to(self.accelerator.device)
        self.stage = stage
        self.model, self.optimizer = self.accelerator.prepare(stage, optimizer)
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.ema = EMAModel(self.parameters, decay=course.ema, foreach=True)
        self.progress = _Progress()
        self.accelerator.register_for_checkpointing(self.ema, self.progress)
        if (self.out / "state").is_dir():
            self.accelerator.load_state(str(self.out / "state"))
            self.ema.to(self.accelerator.device)

    @property
    def step(self) -> int:
        return self.progress.step

    def train(self, workers: int = 0, show: bool = True) -> None:
        """From the saved step to the last one, saving on the way and at the end.

        Raises NumericsError if the loss is not a number, DiskError.
        """
        main = self.accelerator.is_main_process
        loader = batches(
            self.stage, self.course.seed, self.step, self.course.steps, self.batch_size,
            self.accelerator.process_index, self.accelerator.num_processes, workers,
        )  # fmt: skip
        log = _Log(self.out / "log.jsonl", self.step) if main else None
        bar = tqdm(initial=self.step, total=self.course.steps, desc=self.stage.name, disable=not (show and main),
                   file=sys.stderr, mininterval=1.0)  # fmt: skip
        collected: list[dict[str, torch.Tensor]] = []
        since = time.monotonic()
        try:
            for batch in loader:
                collected.append(self._step(batch))
                bar.update()
                if self.step <= EVERY_STEP or self.step % LOG_STEPS == 0:
                    values = self._means(collected)
                    seconds, since = time.monotonic() - since, time.monotonic()
                    speed = len(collected) * self.batch_size / seconds
                    collected.clear()
                    if not math.isfinite(values["loss"]):
                        raise NumericsError(
                            f"the loss of step {self.step} is {values['loss']}. The state of the last save is whole; "
                            "continue with a smaller --learning-rate in another --out, or with --precision no."
                        )
                    if log is not None:
                        log.add({"step": self.step, **values, "examples_per_s": round(speed, 2)})
                        bar.set_postfix_str(f"loss {values['loss']:.4f}, {speed:.1f}/s")
                if self.step % self.course.save_steps == 0 and self.step < self.course.steps:
                    self.save()
        finally:
            bar.close()
        self.save()

    def _step(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        device = self.accelerator.device
        for group in self.optimizer.param_groups:
            group["lr"] = self.course.rate(self.step, self.learning_rate)
        with self.accelerator.autocast():
            losses = self.model({name: value.to(device, non_blocking=True) for name, value in batch.items()})
        self.accelerator.backward(losses["loss"])
        self.accelerator.clip_grad_norm_(self.parameters, CLIP_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.step(self.parameters)
        self.progress.step += 1
        return {name: value.detach() for name, value in losses.items()}

    def _means(self, collected: list[dict[str, torch.Tensor]]) -> dict[str, float]:
        """Over the steps since the last line of the log, and over the processes."""
        names = list(collected[0])
        means = torch.stack([torch.stack([losses[name] for losses in collected]).mean() for name in names])
        means = self.accelerator.reduce(means, reduction="mean")
        return {name: float(value) for name, value in zip(names, means, strict=True)}

    def save(self) -> None:
        """The whole state, in the place of the last one: whole or not at all."""
        partial = self.out / "state.part"
        with disk_errors(self.out):
            if self.accelerator.is_main_process:
                shutil.rmtree(partial, ignore_errors=True)
            self.accelerator.wait_for_everyone()
            self.accelerator.save_state(str(partial))
            self.accelerator.wait_for_everyone()
            if self.accelerator.is_main_process:
                exchange(partial, self.out / "state")
        self.accelerator.wait_for_everyone()

    def finish(self, write: Callable[[dict[str, torch.nn.Module]], None]) -> None:
        """Gives the averaged weights to the stage's modules, ends the stage and has them written, by one process."""
        self.ema.copy_to(self.parameters)
        if self.accelerator.is_main_process:
            self.stage.eval()
            self.stage.finish()
            write({name: module.to("cpu") for name, module in self.stage.trained().items()})
        self.accelerator.wait_for_everyone()

    def _check_folder(self, stage: Stage, origin: dict[str, Any]) -> None:
        """run.json says what this folder trains. Raises RequestError when it is something else."""
        course = asdict(self.course) | {"batch_size": self.batch_size, "learning_rate": self.learning_rate}
        said = json.loads(json.dumps({"stage": stage.name, **origin, **course}))
        free = {"steps", "save_steps", "decay"}  # these may change from one call to the next
        path = self.out / "run.json"
        if path.is_file():
            before = json.loads(path.read_text(encoding="utf-8"))
            other = sorted(key for key in {*before, *said} - free if before.get(key) != said.get(key))
            if other:
                told = ", ".join(f"{key} was {before.get(key)!r} and is now {said.get(key)!r}" for key in other)
                raise RequestError(f"{self.out} holds another training: {told}. Choose another --out.")
        elif self.out.exists() and any(self.out.iterdir()):
            raise RequestError(f"{self.out} exists and is no training. Choose another --out.")
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            with disk_errors(self.out):
                self.out.mkdir(parents=True, exist_ok=True)
                write_json(path, said)
        self.accelerator.wait_for_everyone()


class _Log:
    """log.jsonl: one JSON object per line. Lines after the step that is gone on from are dropped."""

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        lines = read_log(path) if path.is_file() else []
        path.write_text("".join(json.dumps(line) + "\n" for line in lines if line["step"] <= step), encoding="utf-8")

    def add(self, values: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log.jsonl; a last line that a kill cut off is left out."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return found
