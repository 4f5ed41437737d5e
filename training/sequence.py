"""The endless sequence of a training's examples. The example at a place depends on the seed alone."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from .stages.stage import Item, Stage


class ExampleSequence(Dataset[Item]):
    """Place → prepared example: every epoch in another order, every place with random numbers of its own."""

    def __init__(self, stage: Stage, seed: int) -> None:
        self.stage, self.seed = stage, seed

    def __getitem__(self, place: int) -> Item:
        epoch, number = divmod(place, self.stage.size)
        index = int(_order(self.seed, epoch, self.stage.size)[number])
        return self.stage.item(index, np.random.Generator(np.random.Philox(key=[self.seed, place])))


class _Batches:
    """The places of one process's part of every batch from `step` to `steps`."""

    def __init__(self, step: int, steps: int, batch_size: int, rank: int, processes: int) -> None:
        self.step, self.steps, self.batch_size, self.rank, self.processes = step, steps, batch_size, rank, processes

    def __len__(self) -> int:
        return max(self.steps - self.step, 0)

    def __iter__(self) -> Iterator[list[int]]:
        each = self.batch_size // self.processes
        for step in range(self.step, self.steps):
            first = step * self.batch_size + self.rank * each
            yield list(range(first, first + each))


def batches(
    stage: Stage,
    seed: int,
    step: int,
    steps: int,
    batch_size: int,
    rank: int = 0,
    processes: int = 1,
    workers: int = 0,
    pinned: bool = False,
) -> DataLoader[Item]:
    """Batches number `step` to `steps` - 1: the part of process `rank` of `processes`, which divide `batch_size`.

    workers: forks that prepare them. pinned: they are put in memory from which a GPU copies while it computes.
    """
    return DataLoader(
        ExampleSequence(stage, seed),
        batch_sampler=_Batches(step, steps, batch_size, rank, processes),
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=pinned,
        multiprocessing_context="fork" if workers else None,  # a stage that accelerate prepared cannot be pickled
    )


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, size: int) -> NDArray[np.int64]:
    # A list of both would be an array of floats, which cannot tell one epoch from the next.
    key = np.array([seed, 2**63 + epoch], np.uint64)
    return np.random.Generator(np.random.Philox(key=key)).permutation(size)
