"""The loop of every training: steps, averaged weights, a state that survives a kill, a log and its plot."""

from __future__ import annotations

import json
import math
import os
import pickle
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError
from tqdm import tqdm

from export.files import check_space, disk_errors, exchange, locked, sync, target_folder, write_json
from realisid_trt.errors import CheckpointError, DiskError, NumericsError, RequestError

from .log import Log, draw_losses
from .processes import by_one, in_all, wait_for_all
from .sequence import batches
from .stages.stage import Stage

CLIP_NORM = 1.0
BETAS = (0.9, 0.99)
WEIGHT_DECAY = 0.01  # of all parameters alike, as diffusers trains ControlNets and as in the recorded losses
LEAST_RATE = 0.02  # share of the learning rate at the last step
EVERY_STEP = 50  # steps whose losses are logged one by one, to compare a run with another
LOG_STEPS = 50  # steps in a line of the log afterwards
MAY_CHANGE = {"steps", "save_steps", "decay", "accumulate"}  # between two calls that continue a run
GPU_WORKERS = 4  # processes that prepare examples
# From this number of parameters on, the average is updated tensor by tensor: all at once is quicker, but takes as much
# memory as the parameters again.
FOREACH_LIMIT = 10**8


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """The length and the rates of a training. The command line reads its defaults from here.

    steps:         in all, including those done before the run was continued.
    batch_size:    examples per step, of all processes together; learning_rate: of AdamW. None: the stage's own.
    accumulate:    parts in which a process works through its batch, one after the other: less memory, the same step.
                   Only where the loss is a mean over examples (`Stage.whole_batch`).
    warmup_steps:  the learning rate rises to its value over these.
    decay:         share of the steps, the last ones, over which it falls to a fiftieth.
    ema:           decay of the averaged weights, which are written at the end; 0: no average, less memory.
    save_steps:    between two states.
    seed:          of fresh weights, the examples' order, noise, timesteps and drops.
    precision:     "bf16" (autocast, weights in float32) or "no".

    Raises RequestError for an impossible number.
    """

    steps: int = 1000
    batch_size: int | None = None
    learning_rate: float | None = None
    accumulate: int = 1
    warmup_steps: int = 100
    decay: float = 0.5
    ema: float = 0.999
    save_steps: int = 250
    seed: int = 0
    precision: str = "bf16"

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("batch_size", 1), ("accumulate", 1), ("warmup_steps", 0),
                            ("save_steps", 1), ("seed", 0)):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < least:
                raise RequestError(f"{name.replace('_', '-')} is {value}, expected at least {least}.")
        if self.seed >= 2**32:
            raise RequestError(f"seed is {self.seed}, expected less than {2**32}.")
        if self.learning_rate is not None and not 0 < self.learning_rate < math.inf:
            raise RequestError(f"learning-rate is {self.learning_rate}, expected a number above 0.")
        for name in ("decay", "ema"):
            if not 0 <= getattr(self, name) <= 1:
                raise RequestError(f"{name} is {getattr(self, name)}, expected a number from 0 to 1.")

    def rate(self, step: int, learning_rate: float) -> float:
        """The learning rate of step 0, 1, …"""
        rising = min(1.0, (step + 1) / max(self.warmup_steps, 1))
        left = (self.steps - step) / max(self.decay * self.steps, 1)
        return learning_rate * rising * (LEAST_RATE + (1 - LEAST_RATE) * min(1.0, left))

    def check_shared(self, processes: int) -> None:
        """Raises RequestError unless every process can work through its share of a batch in equal parts."""
        assert self.batch_size is not None
        if self.batch_size % (processes * self.accumulate):
            raise RequestError(
                f"--batch-size {self.batch_size} is not divisible by {processes} processes × {self.accumulate} parts."
            )

    def of(self, stage: type[Stage]) -> TrainingOptions:
        """The course with the stage's own batch size and learning rate where none are given."""
        return replace(
            self,
            batch_size=self.batch_size or stage.batch_size,
            learning_rate=self.learning_rate or stage.learning_rate,
        )


class Learner:
    """A stage's parameters and the step that improves them."""

    def __init__(self, accelerator: Accelerator, stage: Stage, options: TrainingOptions) -> None:
        """options: with batch size and learning rate, see `TrainingOptions.of`."""
        assert options.learning_rate is not None
        self.accelerator, self.options, self.learning_rate = accelerator, options, options.learning_rate
        learning = [parameter for parameter in stage.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(
            learning, lr=self.learning_rate, betas=BETAS, weight_decay=WEIGHT_DECAY, fused=True
        )
        half = accelerator.device.type == "cuda" and options.precision == "bf16"
        for module in stage.frozen:  # a frozen network needs no more precision than autocast gives it
            module.to(accelerator.device, torch.bfloat16 if half else None)
        self.model, self.optimizer = accelerator.prepare(stage, optimizer)
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.size = sum(parameter.numel() for parameter in self.parameters)

    def learn(self, batch: dict[str, torch.Tensor], step: int) -> dict[str, torch.Tensor]:
        """One step on this process's part of a batch.

        Returns the losses, means over that part, and "gradient": its norm over the whole batch, before it is clipped.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = self.options.rate(step, self.learning_rate)
        device, parts = self.accelerator.device, self.options.accumulate
        pieces = [dict(zip(batch, values, strict=True)) for values in zip(*(v.chunk(parts) for v in batch.values()))]  # noqa: B905
        totals: dict[str, torch.Tensor] = {}
        for number, piece in enumerate(pieces):
            last = number == len(pieces) - 1
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                with self.accelerator.autocast():
                    losses = self.model({name: value.to(device, non_blocking=True) for name, value in piece.items()})
                self.accelerator.backward(losses["loss"] / len(pieces))
            for name, value in losses.items():
                totals[name] = totals.get(name, torch.zeros((), device=device)) + value.detach() / len(pieces)
        totals["gradient"] = self.accelerator.clip_grad_norm_(self.parameters, CLIP_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return totals


def average_of(learner: Learner) -> EMAModel | None:
    """The average of the learner's parameters that the options ask for; None if it asks for none."""
    decay = learner.options.ema
    return EMAModel(learner.parameters, decay=decay, foreach=learner.size < FOREACH_LIMIT) if decay else None


class _Progress:
    """Steps done, in the saved state."""

    def __init__(self) -> None:
        self.step = 0

    def state_dict(self) -> dict[str, int]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.step = int(state["step"])


@contextmanager
def claimed(
    accelerator: Accelerator,
    out: str | Path,
    stage: type[Stage],
    options: TrainingOptions,
    origin: dict[str, Any],
    no_further: bool = False,
) -> Iterator[Path]:
    """The folder of a run, locked for this call, its run.json written or checked.

    It is cheap: enter it before all other work.

    origin:     everything else that decides the outcome (checkpoint, examples, options), as JSON values.
    no_further: a saved run is only read: run.json stays as it is.
    Raises RequestError if the folder holds another training, another process uses it, some of the processes do not see
    it, or the batch cannot be shared out; DiskError.
    """
    folder, processes = target_folder(out), accelerator.num_processes
    options.check_shared(processes)
    if options.accumulate > 1 and not stage.whole_batch:
        raise RequestError(
            f"accumulate is {options.accumulate}, but {stage.name} compares the examples of a batch with each other. "
            "Leave --accumulate out, or choose a smaller --batch-size."
        )
    said = json.loads(json.dumps({"stage": stage.name, **origin, **asdict(options)}))
    if not stage.whole_batch:
        said["processes"] = processes

    def claim(claims: ExitStack) -> None:
        with disk_errors(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
        busy = RequestError(f"another process is training in {folder}. Wait for it, stop it, or choose another --out.")
        claims.enter_context(locked(folder.with_name(f".{folder.name}.lock"), busy))
        _claim(folder, said, no_further)

    with by_one(accelerator, claim):
        if not in_all(accelerator, (folder / "run.json").is_file()):
            raise RequestError(f"{folder} is not the same folder on all machines. Choose an --out that all share.")
        yield folder


def _claim(folder: Path, said: dict[str, Any], no_further: bool) -> None:
    path, saved = folder / "run.json", (folder / "state").is_dir() or (folder / "state.old").is_dir()
    if no_further and not saved:
        raise RequestError(f"{folder} holds no saved state. Train first, or leave --no-further out.")
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        # a training that ended before its first state left nothing that could be mixed up
        other = sorted(key for key in {*before, *said} - MAY_CHANGE if before.get(key) != said.get(key) and saved)
        if other:
            differences = ", ".join(f"{key} was {before.get(key)!r} and is now {said.get(key)!r}" for key in other)
            raise RequestError(f"{folder} holds another training: {differences}. Choose another --out.")
    elif folder.exists() and any(folder.iterdir()):
        raise RequestError(f"{folder} exists and is not a training. Choose another --out.")
    with disk_errors(folder):
        folder.mkdir(exist_ok=True)
        if not no_further:
            write_json(path, said)
        if not (folder / "state").exists() and saved:  # a kill between the two renames of a save
            os.rename(folder / "state.old", folder / "state")


class Run:
    """One training in its folder: state/, log.jsonl, loss.png, run.json, and in the end checkpoint/ beside them."""

    def __init__(self, accelerator: Accelerator, stage: Stage, options: TrainingOptions, out: Path) -> None:
        """out: as `claimed` gives it; a state in it is continued.

        Raises CheckpointError if that state cannot be read, DiskError.
        """
        self.accelerator, self.stage, self.options, self.out = accelerator, stage, options, out
        self.learner = Learner(accelerator, stage, options)
        self.ema = average_of(self.learner)
        self.progress = _Progress()
        accelerator.register_for_checkpointing(*([self.ema] if self.ema else []), self.progress)
        saved = (out / "state").is_dir()
        # float32 weights, AdamW's two moments and the average; while a state is saved, the previous one still exists
        states = 1 if saved or options.steps <= options.save_steps else 2
        check_space(out, states * 4 * self.learner.size * (4 if self.ema else 3), "the state of this training")
        if saved:
            self._load(out / "state")

    def _load(self, state: Path) -> None:
        try:
            self.accelerator.load_state(str(state))
        except torch.OutOfMemoryError:
            raise
        except (SafetensorError, pickle.UnpicklingError, EOFError, OSError, RuntimeError) as error:
            raise CheckpointError(
                f"{state} cannot be read: {error} Restore it from an intact copy, or train in another --out."
            ) from error
        if self.ema:
            self.ema.to(self.accelerator.device)

    @property
    def step(self) -> int:
        return self.progress.step

    def train(self, workers: int | None = None, show: bool = True) -> None:
        """From the saved step to the last one, saving on the way and at the end.

        workers: processes that prepare examples. None: four with a GPU, which would wait otherwise, none on a CPU.
        Raises NumericsError if the loss is not a number, DiskError.
        """
        main, options = self.accelerator.is_main_process, self.options
        assert options.batch_size is not None
        on_gpu = self.accelerator.device.type == "cuda"
        if workers is None:
            workers = GPU_WORKERS if on_gpu else 0
        loader = batches(
            self.stage, options.seed, self.step, options.steps, options.batch_size,
            self.accelerator.process_index, self.accelerator.num_processes, workers, on_gpu,
        )  # fmt: skip
        log = Log(self.out / "log.jsonl", self.step) if main else None
        bar = tqdm(initial=self.step, total=options.steps, desc=self.stage.name, disable=not (show and main),
                   file=sys.stderr, mininterval=1.0)  # fmt: skip
        collected: list[dict[str, torch.Tensor]] = []
        since = time.monotonic()
        try:
            for batch in loader:
                collected.append(self.learner.learn(batch, self.step))
                if self.ema:
                    self.ema.step(self.learner.parameters)
                self.progress.step += 1
                bar.update()
                saving = self.step % options.save_steps == 0 and self.step < options.steps
                if self.step <= EVERY_STEP or self.step % LOG_STEPS == 0 or saving or self.step == options.steps:
                    values = self._means(collected)
                    seconds, since = time.monotonic() - since, time.monotonic()
                    speed = len(collected) * options.batch_size / seconds
                    collected.clear()
                    if log is not None:
                        log.add({"step": self.step, **values, "examples_per_s": round(speed, 2)})
                        bar.set_postfix_str(f"loss {values['loss']:.4f}, {speed:.1f}/s")
                if saving:
                    self.save()
        finally:
            bar.close()
        self.save()

    def _means(self, collected: list[dict[str, torch.Tensor]]) -> dict[str, float]:
        """Over the steps since the last line of the log, and over the processes.

        Raises NumericsError before a state with NaN or infinity is saved.
        """
        names = list(collected[0])
        means = torch.stack([torch.stack([losses[name] for losses in collected]).mean() for name in names])
        means = self.accelerator.reduce(means, reduction="mean")
        values = {name: float(value) for name, value in zip(names, means, strict=True)}
        if bad := [name for name, value in values.items() if not math.isfinite(value)]:
            raise NumericsError(
                f"the {bad[0]} at step {self.step} is {values[bad[0]]}. The state of the last save is intact: "
                "--no-further makes a checkpoint of it. Continue from that in another --out, without --new, with a "
                "smaller --learning-rate or --precision no."
            )
        return values

    def save(self) -> None:
        """Replaces the saved state by the present one, atomically, and draws the losses beside it."""
        partial = self.out / "state.part"
        with disk_errors(self.out):
            if self.accelerator.is_main_process:
                shutil.rmtree(partial, ignore_errors=True)
            wait_for_all()
            try:
                self.accelerator.save_state(str(partial))
            except (SafetensorError, RuntimeError) as error:  # torch's own writer does not raise OSError either
                if isinstance(error, RuntimeError) and "inline_container" not in str(error):
                    raise
                raise DiskError(f"{partial} could not be written: {error}. Free some space and go on.") from error
            wait_for_all()
            if self.accelerator.is_main_process:
                for file in filter(Path.is_file, partial.rglob("*")):  # flushed before the old state is removed
                    sync(file)
                exchange(partial, self.out / "state")
                draw_losses(self.out / "log.jsonl", self.out / "loss.png", self.stage.name)
        wait_for_all()

    def finish(self, write: Callable[[dict[str, torch.nn.Module]], None]) -> None:
        """Copies the averaged weights into the stage's modules, ends the stage, and calls `write` in one process."""
        if self.ema:
            self.ema.copy_to(self.learner.parameters)
        if self.accelerator.is_main_process:
            self.stage.eval()
            self.stage.finish()
            write({name: module.to("cpu") for name, module in self.stage.trained().items()})
        wait_for_all()
