"""Examples on the disk, as memory-mapped arrays: made once, read in any order, any number of times."""

from __future__ import annotations

import copy
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

from export.files import check_space, disk_errors, exchange, locked, target_folder, write_json
from realisid_trt.errors import RequestError

FORMAT = 1
WORTH_A_POOL = 256  # examples
RECORD_EVERY = 64  # examples that are flushed to the disk together, and then recorded
RECORD = "made.jsonl"  # of an unfinished store: its description, then a line for every example made so far
CAPTION = "caption"  # the one entry of an example that is not an array
Array = NDArray[Any]


@dataclass(frozen=True)
class LeftOut:
    """The substitute for an example that cannot be used: its name, and the reason."""

    name: str
    reason: str


class Examples(Protocol):
    """Numbered examples: name → array, and perhaps a "caption".

    shapes:   name → shape and dtype of every array of an example.
    describe: everything that determines them, as JSON values: stores of the same description hold the same bytes.
    """

    def shapes(self) -> Mapping[str, tuple[tuple[int, ...], DTypeLike]]: ...
    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Mapping[str, Any] | LeftOut: ...
    def describe(self) -> dict[str, Any]: ...


def check_least(examples: object, **least: float) -> None:
    """Raises RequestError for the first of these fields that is less than its least, NaN or infinite."""
    for name, bound in least.items():
        if not bound <= (value := getattr(examples, name)) < math.inf:
            raise RequestError(f"{name} is {value}, expected at least {bound}.")


class Store:
    """An opened folder of examples: NAME.npy (N, …) for every array, store.json with description and captions.

    keeps: whether data computed from all of them may be kept beside them.
    """

    keeps = True

    def __init__(self, path: str | Path) -> None:
        """Raises RequestError if the folder is not a store of this version."""
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

    def first(self, count: int) -> Store:
        """The first `count` examples. Data computed from them is not stored: it is for a few of very many."""
        few = copy.copy(self)
        few.keeps = False
        few.arrays = {name: array[:count] for name, array in self.arrays.items()}
        few.captions = self.captions[:count]
        return few


class OnDemandStore(Store):
    """A Store of these examples, each made on request: for a few of very many."""

    keeps = False

    def __init__(self, examples: Examples) -> None:
        self.examples, self.left_out = examples, {}
        self.description = json.loads(json.dumps(examples.describe()))
        self.example: Callable[[int], Any] = lru_cache(maxsize=256)(examples.__getitem__)
        self.arrays = {name: _Column(self, name, shape) for name, (shape, _) in examples.shapes().items()}  # type: ignore[misc]

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def captions(self) -> list[str]:  # type: ignore[override]
        """The captions of all examples. No example is made if its kind can give a caption alone."""
        caption_of = getattr(self.examples, "caption_of", None) or (lambda index: self.example(index)[CAPTION])
        return [caption_of(index) for index in range(len(self))]


class _Column:
    """One array of all examples, (N, …)."""

    def __init__(self, unmade: OnDemandStore, name: str, shape: tuple[int, ...]) -> None:
        self.unmade, self.name, self.shape = unmade, name, (len(unmade.examples), *shape)

    def __getitem__(self, key: Any) -> Any:
        index, *rest = key if isinstance(key, tuple) else (key,)
        return np.asarray(self.unmade.example(int(index))[self.name])[tuple(rest)]


def store_of(examples: Examples, path: str | Path, progress: bool = False) -> Store:
    """The store at `path`, made from `examples` unless it is there already; published atomically.

    It is made in `.NAME.making` beside it. The next call for the same examples continues a stopped one there; leftovers
    of other examples are removed. Raises RequestError if `path` holds something else or another process is
    making it, DiskError.
    """
    path = target_folder(path)
    description = json.loads(json.dumps(examples.describe()))
    if _stands(path, description):
        return Store(path)
    partial = path.with_name(f".{path.name}.making")
    with disk_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
    busy = RequestError(f"another process is making {path}. Wait for it, or choose another folder.")
    with locked(path.with_name(f".{path.name}.lock"), busy):
        if not _stands(path, description):  # made meanwhile
            try:
                with disk_errors(path.parent):
                    _write(examples, partial, description, progress)
            except RequestError:  # starting again would not help
                shutil.rmtree(partial)
                raise
            exchange(partial, path)
    return Store(path)


def _stands(path: Path, description: dict[str, Any]) -> bool:
    """Whether the store is there. Raises RequestError if something else is."""
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return False
    had = Store(path).description
    if changed := sorted(key for key in {*had, *description} if had.get(key) != description.get(key)):
        raise RequestError(f"{path} holds other examples ({', '.join(changed)}). Choose another folder.")
    return True


def _write(examples: Examples, folder: Path, description: dict[str, Any], progress: bool) -> None:
    entries = _recorded(folder, description)
    if entries is None:
        entries = _begin(examples, folder, description)
    else:
        _check_space(examples, folder, len(examples) - len(entries))
    arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r+") for name in examples.shapes()}
    count = sum("left_out" not in one for one in entries)
    with (folder / RECORD).open("a", encoding="utf-8") as record:
        written = len(entries)
        for example in tqdm(_made(examples, written), "examples", len(examples), initial=written, disable=not progress):
            if isinstance(example, LeftOut):
                entries.append({"left_out": [example.name, example.reason]})
            else:
                for name, array in arrays.items():
                    array[count] = example[name]
                entries.append({CAPTION: example[CAPTION]} if CAPTION in example else {})
                count += 1
            if len(entries) - written == RECORD_EVERY or len(entries) == len(examples):
                for array in arrays.values():
                    array.flush()  # first the arrays, then their record
                record.writelines(json.dumps(one) + "\n" for one in entries[written:])
                record.flush()
                os.fsync(record.fileno())
                written = len(entries)
    left_out = dict(one["left_out"] for one in entries if "left_out" in one)
    if not count:
        name, reason = next(iter(left_out.items()))
        raise RequestError(f"none of {len(examples)} examples can be used. {name}: {reason}")
    if left_out:
        for name in arrays:
            _shorten(folder / f"{name}.npy", count)
    captions = [one[CAPTION] for one in entries if CAPTION in one]
    header = {"format": FORMAT, "examples": description, "captions": captions, "left_out": left_out}
    write_json(folder / "store.json", header)
    (folder / RECORD).unlink()


def _begin(examples: Examples, folder: Path, description: dict[str, Any]) -> list[dict[str, Any]]:
    """Creates arrays of their full length, and an empty record. Returns the record."""
    shutil.rmtree(folder, ignore_errors=True)
    _check_space(examples, folder, len(examples))
    folder.mkdir()
    for name, (shape, dtype) in examples.shapes().items():
        open_memmap(folder / f"{name}.npy", mode="w+", dtype=dtype, shape=(len(examples), *shape))
    (folder / RECORD).write_text(json.dumps([FORMAT, description]) + "\n", encoding="utf-8")
    return []


def _check_space(examples: Examples, folder: Path, missing: int) -> None:
    """Raises DiskError in time: mapped files take disk space only when they are written, and then a full disk kills the
    process."""
    each = sum(math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in examples.shapes().values())
    check_space(folder, missing * each, "all examples" if missing == len(examples) else f"{missing} more examples")


def _recorded(folder: Path, description: dict[str, Any]) -> list[dict[str, Any]] | None:
    """The record of a stopped call that made the same examples, else None; an unfinished line is cut off."""
    try:
        content = (folder / RECORD).read_bytes()
        *lines, unfinished = content.split(b"\n")
        begun, *entries = (json.loads(line) for line in lines)
        os.truncate(folder / RECORD, len(content) - len(unfinished))
    except (OSError, ValueError):
        return None
    return entries if begun == [FORMAT, description] else None


def _made(examples: Examples, first: int) -> Iterator[Mapping[str, Any] | LeftOut]:
    """All examples from `first` on, in order; many of them by several processes."""
    numbers = range(first, len(examples))
    if len(numbers) < WORTH_A_POOL:
        yield from map(examples.__getitem__, numbers)
        return
    # "spawn": a forked process lacks the threads of its parent's libraries, and may wait for one of them for ever
    with multiprocessing.get_context("spawn").Pool(os.cpu_count(), _one_thread) as pool:
        yield from pool.imap(examples.__getitem__, numbers, chunksize=16)


def _shorten(path: Path, count: int) -> None:
    """Cuts an array to its first rows where it lies: numpy leaves room in the header for any number of rows."""
    with path.open("r+b") as file:
        np.lib.format.read_magic(file)
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        start, shape = file.tell(), (count, *shape[1:])
        file.seek(0)
        np.lib.format.write_array_header_1_0(
            file, {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        )
        assert file.tell() == start
        file.truncate(start + math.prod(shape) * dtype.itemsize)


def _one_thread() -> None:
    import cv2

    cv2.setNumThreads(1)
