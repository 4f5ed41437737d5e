"""The index of a kit: items, files, blobs, pieces. The same JSON file lies in every part."""

from __future__ import annotations

import json
import lzma
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from realisid_trt.errors import RequestError
from realisid_trt.files import sha256

SCHEMA = 1
INDEX = "index.json"


class KitError(RequestError):
    """A kit that is missing, incomplete or damaged."""


@dataclass(frozen=True)
class File:
    """One file of an item.

    blob: the blob with its content; or with the rest of it, when the weights are taken out.
    gaps: the blob with the places of the weights (weightless.py), or None.
    """

    path: str
    bytes: int
    sha256: str
    blob: str
    gaps: str | None = None


@dataclass(frozen=True)
class Item:
    """One item of a kit. key: hash over all that it was made from. files: in any order."""

    key: str
    files: tuple[File, ...]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Item:
        return cls(values["key"], tuple(File(**file) for file in values["files"]))

    @property
    def blobs(self) -> list[str]:
        return list(dict.fromkeys(name for file in self.files for name in (file.blob, file.gaps) if name))


@dataclass(frozen=True)
class Piece:
    part: str
    file: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Blob:
    """A content, in pieces. bytes: of the content, when unpacked. compressed: by xz."""

    bytes: int
    compressed: bool
    pieces: tuple[Piece, ...]


class Kit:
    """A kit as it lies on a machine: the index, and those parts that were copied. Use `Kit.open`."""

    def __init__(
        self, folder: Path, items: Mapping[str, Item], blobs: Mapping[str, Blob], foreign_parts: Collection[str] = ()
    ) -> None:
        """foreign_parts: parts that are there and belong to another preparation."""
        self.folder, self.items, self.blobs, self._foreign_parts = folder, items, blobs, foreign_parts

    @property
    def key(self) -> str:
        """Hash over what all its items were made from."""
        return sha256(json.dumps({name: item.key for name, item in sorted(self.items.items())}).encode())

    @classmethod
    def open(cls, folder: Path) -> Kit:
        """The kit in a folder; the first part's index counts. Raises KitError without a part or a readable index."""
        indexes = {path.parent.name: path.read_bytes() for path in sorted(folder.glob(f"part-*/{INDEX}"))}
        advice = f"Carry at least one part of it; it is made by: python -m benchmarks.gpu --prepare {folder}"
        if not indexes:
            raise KitError(f"{folder} holds no part of a kit (part-01/{INDEX}, …). {advice}")
        first, index = next(iter(indexes.items()))
        try:
            values = json.loads(index)
            if values["schema"] != SCHEMA:
                raise KitError(f"{folder} is a kit of schema {values['schema']!r}, expected {SCHEMA}. {advice}")
            blobs = {
                name: Blob(blob["bytes"], blob["compressed"], tuple(Piece(**piece) for piece in blob["pieces"]))
                for name, blob in values["blobs"].items()
            }
            items = {name: Item.from_dict(item) for name, item in values["items"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            problem = f"{type(error).__name__}: {error}"
            raise KitError(f"{folder / first / INDEX} cannot be read ({problem}). Carry {first} again.") from error
        return cls(folder, items, blobs, [part for part, content in indexes.items() if content != index])

    def missing(self, item: str) -> str | None:
        """Why an item is not available, or None."""
        if item not in self.items:
            return f"{self.folder} was prepared without {item}"
        absent: dict[str, str] = {}
        for piece in (piece for name in self.items[item].blobs for piece in self.blobs[name].pieces):
            if piece.part in self._foreign_parts:
                absent[piece.part] = "is of another preparation than the first"
            elif not (self.folder / piece.part / piece.file).is_file():
                absent[piece.part] = "is not here"
        if not absent:
            return None
        reasons = ", ".join(f"{part} {reason}" for part, reason in sorted(absent.items()))
        return f"{self.folder} lacks parts that hold {item}: {reasons}"

    def content(self, name: str) -> bytes:
        """A blob, its pieces joined and verified. Raises KitError."""
        blob, joined = self.blobs[name], bytearray()
        for piece in blob.pieces:
            path = self.folder / piece.part / piece.file
            try:
                content = path.read_bytes()
            except OSError as error:
                raise KitError(f"{path} cannot be read ({error.strerror}). Carry {piece.part} again.") from error
            if sha256(content) != piece.sha256:
                raise KitError(f"{path} is damaged: its sha256 is not the index's. Carry {piece.part} again.")
            joined += content
        return lzma.decompress(joined) if blob.compressed else bytes(joined)


def write(path: Path, items: Mapping[str, Item], blobs: Mapping[str, Blob]) -> None:
    values = {
        "schema": SCHEMA,
        "items": {name: asdict(item) for name, item in items.items()},
        "blobs": {name: asdict(blob) for name, blob in blobs.items()},
    }
    path.write_text(json.dumps(values) + "\n", encoding="utf-8")
