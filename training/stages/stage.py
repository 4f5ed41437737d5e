"""The interface of a training stage."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from accelerate import Accelerator
from torch import Tensor, nn

from export.checkpoint import Checkpoint
from realisid_trt.errors import RequestError

from ..store import Store

Item = dict[str, Tensor]

# the name in diffusers, in transformers, and in older versions of transformers
CHECKPOINTING = ("enable_gradient_checkpointing", "activation_checkpointing_enable", "gradient_checkpointing_enable")


class Stage(nn.Module):
    """Parts of a checkpoint that learn, how an example is prepared for them, and their loss.

    Its parameters are exactly those that are trained. Frozen networks are in the list `self.frozen`, which `nn.Module`
    does not register, so neither a state nor a gradient includes them.

    A loss is a function of the parameters and the batch alone: all random values (noise, timesteps, drops, crops) are
    drawn by `item` from the generator of its place in the sequence of examples. So a killed run continues exactly. If
    the loss is a mean over examples, two processes with half of a batch each compute the same as one; a contrast
    compares the examples of one process only.
    """

    name: ClassVar[str]
    learning_rate: ClassVar[float]
    batch_size: ClassVar[int]
    reads: ClassVar[tuple[str, ...]] = ()  # parts of the checkpoint that decide the outcome and stay as they are
    writes: ClassVar[tuple[str, ...]] = ()  # parts that are trained; without --new, from the weights they have
    whole_batch: ClassVar[bool] = True  # a loss is a mean over examples, so it can be computed in parts

    def __init__(self, checkpoint: Checkpoint, store: Store, accelerator: Accelerator, *, new: bool, seed: int) -> None:
        """new: begin with new weights, drawn from `seed`, instead of the checkpoint's."""
        super().__init__()
        self.checkpoint, self.store = checkpoint, store
        self.frozen: list[Any] = []

    def trained(self) -> dict[str, nn.Module]:
        """Folder of the checkpoint → the module that is written there."""
        return {name: module for name, module in self.named_children()}

    @property
    def size(self) -> int:
        """Number of examples."""
        return len(self.store)

    def item(self, index: int, rng: np.random.Generator) -> Item:
        """Example number `index`, ready for `forward`, without its batch axis."""
        raise NotImplementedError

    def forward(self, batch: Item) -> dict[str, Tensor]:
        """Name → mean over the batch; "loss" is minimised, the others are shown."""
        raise NotImplementedError

    def validation_losses(self, batch: Item) -> dict[str, Tensor]:
        """The losses that `training.validate` reports: those of `forward`, and more that would slow every step down."""
        return self.forward(batch)

    def save_memory(self) -> None:
        """Computes activations again in the backward pass instead of keeping them, in every network that supports it.

        Raises RequestError if no network does.
        """
        able = [
            getattr(module, name)
            for module in (*self.modules(), *self.frozen)
            if (name := next((name for name in CHECKPOINTING if hasattr(module, name)), None))
        ]
        for enable in able:
            enable()
        if not able:
            raise RequestError(
                f"no network of {self.name} can compute its activations again: leave --checkpointing out."
            )

    def finish(self) -> None:
        """Called once before the trained parts are written, for work that can only be done at the end."""
