"""Examples on the disk, as arrays that are read where they lie: made once, read in any order, a million times."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.lib.format import open_memmap
from numpy.typing import DTypeLike, NDArray
from tqdm import tqdm

from export.files import check_space, disk_errors, exchange, target_folder, write_json
from realisid_trt.errors import RequestError

FORMAT = 1
WORTH_A_POOL = 256  # examples
CAPTION = "caption"  # the one entry of an example that is no array
Array = NDArray[Any]


@dataclass(frozen=True)
class LeftOut:
    """In the place of an example that cannot be used: what it was, and why."""

    name: str
    reason: str


class Examples(Protocol):
    """Numbered examples: name → array, and perhaps a "caption".

    shapes:   name → shape and dtype of every array of an example.
    describe: what decides all of them, as JSON values: stores of the same description hold the same bytes.
    """

    def shapes(self) -> Mapping[str, tuple[tuple[int, ...], DTypeLike]]: ...
    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Mapping[str, Any] | LeftOut: ...
    def describe(self) -> dict[str, Any]: ...


class Store:
    """An opened folder of examples: NAME.npy (N, …) for every array, store.json with description and captions."""

    def __init__(self, path: str | Path) -> None:
        """Raises RequestError if the folder is no store of this version."""
        self.path = Path(path)
        try:
            header = json.loads((self.path / "store.json").read_text(encoding="utf-8"))
            if header["format"] != FORMAT:
                raise RequestError(f"{path} is of format {header['format']}, expected {FORMAT}. Make it again.")
            self.description: dict[str, Any] = header["examples"]
            self.captions: list[str] = header["captions"]
            self.left_out: dict[str, str] = header.get("left_out", {})
            self.arrays: dict[str, Array] = {
                file.stem: np.load(file, mmap_mode="r") for file in sorted(self.path.glob("[!.]*.npy"))
            }
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RequestError(f"{path} holds no examples ({error}). Make them: python -m training.prepare.") from error

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values()), ()))

    def __getitem__(self, name: str) -> Array:
        """(N, …), one of the arrays. Raises RequestError if these examples have none of this name."""
        if name not in self.arrays:
            raise RequestError(
                f"{self.path} holds {', '.join(self.arrays)} and no {name}: these examples are for another stage."
            )
        return self.arrays[name]


class Unmade(Store):
    """What a Store of these examples would give, each made when it is asked for: for a few of very many."""

    def __init__(self, examples: Examples) -> None:
        self.examples, self.left_out = examples, {}
        self.description = json.loads(json.dumps(examples.describe()))
        self.example: Callable[[int], Any] = lru_cache(maxsize=256)(examples.__getitem__)
        self.arrays = {name: _Column(self, name, shape) for name, (shape, _) in examples.shapes().items()}  # type: ignore[misc]

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def captions(self) -> list[str]:  # type: ignore[override]
        """Of all examples; those that can say theirs without being made do."""
        told = getattr(self.examples, "told", None) or (lambda index: self.example(index)[CAPTION])
        return [told(index) for index in range(len(self))]


class _Column:
    """One array of all examples, (N, …)."""

    def __init__(self, unmade: Unmade, name: str, shape: tuple[int, ...]) -> None:
        self.unmade, self.name, self.shape = unmade, name, (len(unmade.examples), *shape)

    def __getitem__(self, key: Any) -> Any:
        index, *rest = key if isinstance(key, tuple) else (key,)
        return np.asarray(self.unmade.example(int(index))[self.name])[tuple(rest)]


def store_of(examples: Examples, path: str | Path, progress: bool = False) -> Store:
    """The store at `path`, made from `examples` unless it is there already; it appears whole or not at all.

    Raises RequestError if `path` holds something else, DiskError.
    """
    path = target_folder(path)
    description = json.loads(json.dumps(examples.describe()))
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        store = Store(path)
        had = store.description
        if changed := sorted(key for key in {*had, *description} if had.get(key) != description.get(key)):
            raise RequestError(f"{path} holds other examples ({', '.join(changed)}). Choose another folder.")
        return store
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with disk_errors(path.parent):
            partial.mkdir(parents=True)
            _write(examples, partial, description, progress)
        exchange(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Store(path)


def _write(examples: Examples, folder: Path, description: dict[str, Any], progress: bool) -> None:
    shapes = {name: ((len(examples), *shape), np.dtype(dtype)) for name, (shape, dtype) in examples.shapes().items()}
    # what is mapped takes its place on the disk only when it is written, and a full disk is then a dead process
    check_space(folder, sum(math.prod(shape) * dtype.itemsize for shape, dtype in shapes.values()), "all examples")
    arrays = {
        name: open_memmap(folder / f"{name}.npy", mode="w+", dtype=dtype, shape=shape)
        for name, (shape, dtype) in shapes.items()
    }
    captions, left_out, count = [], {}, 0
    for example in tqdm(_made(examples), "examples", len(examples), disable=not progress):
        if isinstance(example, LeftOut):
            left_out[example.name] = example.reason
            continue
        for name, array in arrays.items():
            array[count] = example[name]
        if CAPTION in example:
            captions.append(example[CAPTION])
        count += 1
    if not count:
        name, reason = next(iter(left_out.items()))
        raise RequestError(f"none of {len(examples)} examples can be used. {name}: {reason}")
    for name, array in arrays.items():
        array.flush()
        if left_out:
            _shorten(folder / f"{name}.npy", array[:count])
    header = {"format": FORMAT, "examples": description, "captions": captions, "left_out": left_out}
    write_json(folder / "store.json", header)


def _made(examples: Examples) -> Iterator[Mapping[str, Any] | LeftOut]:
    """All examples in order; many of them by several processes."""
    if len(examples) < WORTH_A_POOL:
        yield from map(examples.__getitem__, range(len(examples)))
        return
    # "spawn": a fork of a process whose libraries have threads of their own may wait for one that it does not have
    with multiprocessing.get_context("spawn").Pool(os.cpu_count(), _one_thread) as pool:
        yield from pool.imap(examples.__getitem__, range(len(examples)), chunksize=16)


def _shorten(path: Path, kept: Array) -> None:
    partial = path.with_suffix(".part")
    short = open_memmap(partial, mode="w+", dtype=kept.dtype, shape=kept.shape)
    short[:] = kept
    short.flush()
    os.replace(partial, path)


def _one_thread() -> None:
    import cv2

    cv2.setNumThreads(1)
