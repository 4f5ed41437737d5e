"""One process, or as many as a launcher started: on a CPU, on GPUs, on several machines."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from datetime import timedelta

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, parse_flag_from_env
from torch import distributed

from realisid_trt.errors import RealisIDError, RequestError

WAIT_IN_STEP = timedelta(minutes=30)  # for the other processes; after that a hanging or missing one ends all
WAIT_FOR_ONE = timedelta(hours=6)  # while one process writes a state or makes files for all
# Variables of accelerate's launcher and configuration that change what a step computes → their values that do not.
NEUTRAL_VALUES = {
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("1",),
    "ACCELERATE_DYNAMO_BACKEND": ("no",),
    "ACCELERATE_USE_PARALLELISM_CONFIG": ("false", "0", ""),
}
SHARDING = ("DEEPSPEED", "FSDP", "MEGATRON_LM")  # accelerate's ways to share weights out: not supported here


def accelerator_of(precision: str = "no", cpu: bool = False) -> Accelerator:
    """The Accelerator of all processes that the launcher started.

    precision: "bf16" (autocast) or "no". cpu: even where there is a GPU.
    Raises RequestError where accelerate was told to share out the weights.
    """
    if sharding := [name for name in SHARDING if parse_flag_from_env(f"ACCELERATE_USE_{name}")]:
        raise RequestError(
            f"accelerate is set to {sharding[0]}, but every process of a training holds all weights. Launch it with "
            "accelerate launch --multi_gpu; where memory is short, --checkpointing, --accumulate and --ema 0 help."
        )
    for variable, harmless in NEUTRAL_VALUES.items():
        if os.environ.get(variable, harmless[0]).lower() not in harmless:
            raise RequestError(
                f"{variable} is {os.environ[variable]}, which changes what a step computes, and run.json would not "
                "record that. Unset it, or run accelerate config again; --accumulate accumulates gradients."
            )
    handlers = [
        DistributedDataParallelKwargs(gradient_as_bucket_view=True),
        InitProcessGroupKwargs(timeout=WAIT_IN_STEP),
    ]
    return Accelerator(mixed_precision=precision, cpu=cpu, kwargs_handlers=handlers)


@contextlib.contextmanager
def by_one(accelerator: Accelerator, enter: Callable[[contextlib.ExitStack], None]) -> Iterator[None]:
    """Calls `enter` in the main process alone; contexts that it enters stay open until the end of the block.

    Its error is raised in all processes, so that no process waits for one that has ended.
    """
    with contextlib.ExitStack() as stack:
        refusal = None
        if accelerator.is_main_process:
            try:
                enter(stack)
            except RealisIDError as error:
                refusal = error
        if distributed.is_initialized():
            said = [refusal]
            distributed.broadcast_object_list(said, src=0, group=_patient())
            [refusal] = said
        if refusal is not None:
            raise refusal
        yield


@contextlib.contextmanager
def main_first() -> Iterator[None]:
    """The main process works in the block first, and then the others."""
    main = PartialState().is_main_process
    if not main:
        wait_for_all()
    yield
    if main:
        wait_for_all()


def wait_for_all() -> None:
    """Returns when all processes have called it, even if one of them works alone for hours."""
    if distributed.is_initialized():
        distributed.monitored_barrier(_patient(), timeout=WAIT_FOR_ONE)  # it names missing processes


@functools.cache
def _patient() -> distributed.ProcessGroup | None:
    """A second group of all processes, over sockets. These close when a process ends, so the others notice at once."""
    group: distributed.ProcessGroup | None = distributed.new_group(backend="gloo", timeout=WAIT_FOR_ONE)
    return group


def in_all(accelerator: Accelerator, here: bool) -> bool:
    """Whether `here` is true in every process."""
    return bool(accelerator.gather(torch.tensor([here], device=accelerator.device)).all())
