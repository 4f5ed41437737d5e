"""One process, or as many as a launcher started: on a CPU, on GPUs, on several machines."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    broadcast_object_list,
    parse_flag_from_env,
)

from realisid_trt.errors import RealisIDError, RequestError

WAIT = timedelta(hours=6)  # of all processes, while one of them writes a state or makes what all read
# Variables of accelerate's launcher and configuration that change what a step computes → their values that do not.
NEUTRAL_VALUES = {
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("1",),
    "ACCELERATE_DYNAMO_BACKEND": ("no",),
    "ACCELERATE_USE_PARALLELISM_CONFIG": ("false", "0", ""),
}
SHARDING = ("DEEPSPEED", "FSDP", "MEGATRON_LM")  # accelerate's names of what an average and a checkpoint cannot follow


def accelerator_of(precision: str = "no", cpu: bool = False) -> Accelerator:
    """Of every process that the launcher started.

    precision: "bf16" (autocast) or "no". cpu: even where there is a GPU.
    Raises RequestError where accelerate was told to share out the weights.
    """
    if told := [name for name in SHARDING if parse_flag_from_env(f"ACCELERATE_USE_{name}")]:
        raise RequestError(
            f"accelerate is set to {told[0]}, but every process of a training holds all weights. Launch it with "
            "accelerate launch --multi_gpu; where memory is short, --checkpointing, --accumulate and --ema 0 help."
        )
    for variable, harmless in NEUTRAL_VALUES.items():
        if os.environ.get(variable, harmless[0]).lower() not in harmless:
            raise RequestError(
                f"{variable} is {os.environ[variable]}, which changes what a step computes, and no run.json would "
                "say so. Unset it, or run accelerate config again; --accumulate accumulates gradients."
            )
    handlers = [DistributedDataParallelKwargs(gradient_as_bucket_view=True), InitProcessGroupKwargs(timeout=WAIT)]
    return Accelerator(mixed_precision=precision, cpu=cpu, kwargs_handlers=handlers)


@contextlib.contextmanager
def by_one(accelerator: Accelerator, enter: Callable[[contextlib.ExitStack], None]) -> Iterator[None]:
    """`enter` in the main process alone; what it enters there is held until the end of the block.

    What it refuses is raised in all processes, so nobody waits for one that has ended.
    """
    with contextlib.ExitStack() as held:
        refusal = None
        if accelerator.is_main_process:
            try:
                enter(held)
            except RealisIDError as error:
                refusal = error
        [refusal] = broadcast_object_list([refusal])
        if refusal is not None:
            raise refusal
        yield


def in_all(accelerator: Accelerator, here: bool) -> bool:
    """Whether it is so in every process."""
    return bool(accelerator.gather(torch.tensor([here], device=accelerator.device)).all())
