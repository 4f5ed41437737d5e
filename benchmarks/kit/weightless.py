"""Files without their weights: the places of the weights, the rest of a file, and the way back to the file.

A weight in a graph is a tensor of the checkpoint, in the graph's precision, transposed where a matrix product needs
that. It is recognised by its bytes, independent of how the graph was made. All other bytes are the *rest*, which is
copied. The weights come from a source that the other machine has too:

- a checkpoint that `export.miniature` made is drawn again from its seed;
- a checkpoint of the source tree is read.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from export.miniature import recipe_of, weights_of
from export.miniature.weights import Weights, drawing_threads
from realisid_trt.errors import CheckpointError
from realisid_trt.files import sha256

ROOT = Path(__file__).resolve().parents[2]
MIN_BYTES = 1024  # of a weight that is taken out; smaller ones are cheaper to carry
GRAPH, INITIALIZER, RAW_DATA = 7, 5, 9  # fields of onnx.proto's ModelProto, GraphProto, TensorProto


class Gap(NamedTuple):
    """Where a weight was taken out of a file.

    offset:                in the file, bytes.
    component, key, shape: of the tensor in the checkpoint.
    dtype, transposed:     as the file has it; torch's name of the type.
    """

    offset: int
    component: str
    key: str
    shape: tuple[int, ...]
    dtype: str
    transposed: bool

    @classmethod
    def from_list(cls, values: Sequence[Any]) -> Gap:
        """The gap from JSON values: the fields, in order."""
        offset, component, key, shape, dtype, transposed = values
        return cls(offset, component, key, tuple(shape), dtype, transposed)

    def content(self, tensor: Tensor) -> memoryview:
        """The bytes that fill this gap, from this tensor. Raises CheckpointError if it has another shape."""
        if tuple(tensor.shape) != self.shape:
            raise CheckpointError(
                f"{self.component} {self.key} is {tuple(tensor.shape)}, expected {self.shape}: it is not the "
                "checkpoint of the kit."
            )
        return _bytes(tensor, getattr(torch, self.dtype), self.transposed)


class Source(Protocol):
    """A source of weights."""

    @property
    def description(self) -> dict[str, Any]:
        """JSON values from which `source_of` makes the same source."""

    def tensor(self, component: str, key: str, shape: tuple[int, ...]) -> Tensor:
        """The tensor as the checkpoint stores it. Called by several threads at once."""


@dataclass(frozen=True)
class SeedSource:
    """The weights of a checkpoint that `export.miniature` made."""

    weights: Weights

    @property
    def description(self) -> dict[str, Any]:
        w = self.weights
        dtype = str(w.dtype).removeprefix("torch.")
        unet = dict(w.unet) if w.unet is not None else None
        return {"drawn": {"seed": w.seed, "branch_gain": w.branch_gain, "dtype": dtype, "unet": unet}}

    def tensor(self, component: str, key: str, shape: tuple[int, ...]) -> Tensor:
        return self.weights.draw(component, key, shape)


@dataclass(frozen=True)
class FolderSource:
    """The weights of a checkpoint of the source tree. path: relative to its root."""

    path: str

    @property
    def description(self) -> dict[str, Any]:
        return {"in_tree": self.path}

    def tensor(self, component: str, key: str, shape: tuple[int, ...]) -> Tensor:
        """The tensor as stored. Raises CheckpointError if it is not there."""
        from safetensors import safe_open

        for file in sorted((ROOT / self.path / component).glob("*.safetensors")):
            with safe_open(file, "pt") as stored:
                if key in stored.keys():  # noqa: SIM118 - it is not a mapping
                    found: Tensor = stored.get_tensor(key)
                    return found
        raise CheckpointError(f"{ROOT / self.path / component} holds no {key}: it is not the checkpoint of the kit.")


def source_of(description: Mapping[str, Any]) -> Source:
    if "in_tree" in description:
        return FolderSource(description["in_tree"])
    drawn = dict(description["drawn"])
    return SeedSource(Weights(**drawn | {"dtype": getattr(torch, drawn["dtype"])}))


def source_of_checkpoint(folder: Path) -> Source | None:
    """The source of these weights for a machine that has the source tree alone; None if there is none."""
    from export.checkpoint.files import read_json
    from export.miniature import MADE_BY

    folder = folder.resolve()
    if folder.is_relative_to(ROOT / "checkpoints"):
        return FolderSource(folder.relative_to(ROOT).as_posix())
    index = read_json(folder / "model_index.json", "it says what the checkpoint is made of")
    if index.get("_made_by") != MADE_BY:
        return None
    recipe = recipe_of(**index["_recipe"])
    return SeedSource(weights_of(recipe, read_json(folder / "unet" / "config.json", "it describes the UNet")))


class TensorIndex:
    """The tensors of a checkpoint, to be found by their bytes."""

    def __init__(self, checkpoint: Path) -> None:
        """checkpoint: a folder with safetensors in one folder per component."""
        from safetensors import safe_open

        self._tensors: list[tuple[str, str, tuple[int, ...], Path]] = []
        for file in sorted(checkpoint.glob("*/*.safetensors")):
            with safe_open(file, "pt") as stored:
                for key in stored.keys():  # noqa: SIM118 - it is not a mapping
                    self._tensors.append((file.parent.name, key, tuple(stored.get_slice(key).get_shape()), file))
        self._found: dict[int, dict[str, tuple[Any, ...]]] = {}

    def gap(self, offset: int, content: memoryview) -> Gap | None:
        """The gap at this offset, for the checkpoint's tensor with these bytes; None if it has no such tensor."""
        if len(content) not in self._found:
            self._found[len(content)] = dict(self._of_size(len(content)))
        found = self._found[len(content)].get(sha256(content))
        return Gap(offset, *found) if found else None

    def _of_size(self, nbytes: int) -> Iterator[tuple[str, tuple[Any, ...]]]:
        """(hash, tensor) of every tensor that takes so many bytes in some precision, plain and transposed."""
        from safetensors import safe_open

        for component, key, shape, file in self._tensors:
            for dtype in ("float16", "float32"):
                kind = getattr(torch, dtype)
                if torch.Size(shape).numel() * kind.itemsize != nbytes:
                    continue
                with safe_open(file, "pt") as stored:
                    tensor = stored.get_tensor(key)
                for transposed in (True, False) if len(shape) == 2 else (False,):
                    yield sha256(_bytes(tensor, kind, transposed)), (component, key, shape, dtype, transposed)


def take_out(path: Path, weighted: TensorIndex) -> tuple[bytes, list[Gap]]:
    """The rest of a file without the checkpoint's weights, and where they were."""
    rest, gaps, end = bytearray(), list[Gap](), 0
    with open(path, "rb") as file:
        for offset, nbytes in sorted(set(extents(path))):
            if nbytes < MIN_BYTES or offset < end:
                continue
            file.seek(offset)
            gap = weighted.gap(offset, memoryview(file.read(nbytes)))
            if gap is not None:
                file.seek(end)
                rest += file.read(offset - end)
                gaps.append(gap)
                end = offset + nbytes
        file.seek(end)
        rest += file.read()
    return bytes(rest), gaps


def extents(path: Path) -> Iterator[tuple[int, int]]:
    """(offset, bytes) of everything in a file that may be a weight: initializers, external data, safetensors."""
    if path.suffix == ".safetensors":
        import json

        with open(path, "rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(header_bytes))
        for name, entry in header.items():
            if name != "__metadata__":
                start, end = entry["data_offsets"]
                yield 8 + header_bytes + start, end - start
    elif path.suffix == ".onnx":
        content = memoryview(path.read_bytes())
        for _, graph in _fields(content, (0, len(content)), GRAPH):
            for _, tensor in _fields(content, graph, INITIALIZER):
                for _, (start, end) in _fields(content, tensor, RAW_DATA):
                    yield start, end - start
    elif path.name.endswith(".onnx.data"):
        import onnx

        for tensor in onnx.load(path.with_suffix(""), load_external_data=False).graph.initializer:
            place = {entry.key: entry.value for entry in tensor.external_data}
            if place:
                yield int(place.get("offset", 0)), int(place["length"])


def _fields(content: memoryview, extent: tuple[int, int], wanted: int) -> Iterator[tuple[int, tuple[int, int]]]:
    """(number, extent) of a message's fields with this number that are bytes or messages. Protocol Buffers' format."""

    def varint(at: int) -> tuple[int, int]:
        value = shift = 0
        while True:
            byte = content[at]
            value, shift, at = value | (byte & 0x7F) << shift, shift + 7, at + 1
            if byte < 0x80:
                return value, at

    at, end = extent
    while at < end:
        tag, at = varint(at)
        number, wire = tag >> 3, tag & 7
        if wire == 0:
            _, at = varint(at)
        elif wire == 2:
            length, at = varint(at)
            if number == wanted:
                yield number, (at, at + length)
            at += length
        else:
            at += {1: 8, 5: 4}[wire]


def put_back(files: Iterable[tuple[Path, int, bytes, Sequence[Gap]]], source: Source) -> None:
    """Writes files again: (path, bytes, rest, gaps) each. Weights are made on every core, the largest first.

    Raises OSError, and CheckpointError if the source lacks a weight.
    """
    work: list[tuple[int, int, Gap]] = []
    opened: list[int] = []
    try:
        for path, nbytes, content, gaps in files:
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
            opened.append(file)
            os.truncate(file, nbytes)
            rest, end = memoryview(content), 0
            for gap in gaps:
                _write(file, rest[: gap.offset - end], end)
                rest, gap_bytes = rest[gap.offset - end :], _gap_bytes(gap)
                end = gap.offset + gap_bytes
                work.append((gap_bytes, file, gap))
            _write(file, rest, end)

        def fill(entry: tuple[int, int, Gap]) -> None:
            _, file, gap = entry
            _write(file, gap.content(source.tensor(gap.component, gap.key, gap.shape)), gap.offset)

        with drawing_threads() as pool:
            for _ in pool.map(fill, sorted(work, key=lambda entry: -entry[0])):
                pass
    finally:
        for file in opened:
            os.close(file)


def _gap_bytes(gap: Gap) -> int:
    dtype: torch.dtype = getattr(torch, gap.dtype)
    return torch.Size(gap.shape).numel() * dtype.itemsize


def _bytes(tensor: Tensor, dtype: torch.dtype, transposed: bool) -> memoryview:
    stored = tensor.to(dtype)
    flat = (stored.t() if transposed else stored).contiguous().flatten().view(torch.uint8)
    return memoryview(flat.numpy())


def _write(file: int, content: memoryview, offset: int) -> None:
    while len(content):  # a system writes at most 2 GiB at a time
        written = os.pwrite(file, content, offset)
        content, offset = content[written:], offset + written
