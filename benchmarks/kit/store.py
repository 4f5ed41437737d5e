"""The store of a kit: its blobs, and the parts that are cut from them."""

from __future__ import annotations

import json
import lzma
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from export.files import disk_errors, exchange, write_json
from realisid_trt.errors import RequestError
from realisid_trt.files import file_sha256, sha256, whole_or_not

from .index import INDEX, Blob, File, Item, Piece, write

STORE, RECORDS = "store", "store.json"
PACKED = {".whl", ".png", ".jpg"}  # compressed already
PRESET = 1  # of xz: an engine's graphs and face models become 6 % larger than by preset 6, in a quarter of the time


class Store:
    """The blobs and items in KIT/store. Finished ones survive a stopped run. One process at a time."""

    def __init__(self, folder: Path) -> None:
        """folder: KIT, made if need be. Raises DiskError."""
        self.kit, self._folder = folder, folder / STORE
        with disk_errors(folder):
            self._folder.mkdir(parents=True, exist_ok=True)
        self.items: dict[str, Item] = {}
        try:
            records = json.loads((self._folder / RECORDS).read_text(encoding="utf-8"))
            self.items = {name: Item.from_dict(item) for name, item in records.items()}
        except (OSError, ValueError, KeyError, TypeError):
            pass  # nothing was made yet, or nothing that can be read

    def stands(self, name: str, key: str) -> bool:
        """Whether an item with this key is stored, and complete."""
        item = self.items.get(name)
        return item is not None and item.key == key and all(self._is_whole(blob) for blob in item.blobs)

    def _is_whole(self, name: str) -> bool:
        return any(path.is_file() and self._content_sha256(path) == name for path in self._paths(name))

    def _paths(self, name: str) -> tuple[Path, Path]:
        return self._folder / name, self._folder / f"{name}.xz"

    def _content_sha256(self, path: Path) -> str | None:
        """The SHA-256 of a stored content, when unpacked; None if it cannot be unpacked."""
        if path.suffix != ".xz":
            return file_sha256(path)
        try:
            return sha256(lzma.decompress(path.read_bytes()))
        except (lzma.LZMAError, EOFError):
            return None

    def add_file(self, path: Path, name: str) -> File:
        """A whole file, under this path of the item."""
        content = path.read_bytes()
        return File(name, len(content), sha256(content), self.add_blob(content, path.suffix not in PACKED))

    def add_blob(self, content: bytes, compress: bool = True) -> str:
        """Stores a content. Returns its name: its SHA-256."""
        name = sha256(content)
        if self._is_whole(name):
            return name
        plain, packed = self._paths(name)
        small = lzma.compress(content, preset=PRESET) if compress else content
        path, stored = (packed, small) if len(small) < len(content) else (plain, content)
        with disk_errors(self._folder), whole_or_not(path) as partial:
            partial.write_bytes(stored)
        return name

    def record(self, name: str, item: Item) -> None:
        """Records an item that is complete."""
        self.items[name] = item
        write_json(self._folder / RECORDS, {name: asdict(item) for name, item in self.items.items()})

    def cut(self, names: Sequence[str], part_bytes: int) -> list[Path]:
        """Lays these items out in parts of at most `part_bytes` bytes each, in this order. Returns the parts.

        Removes blobs that no item has any more. Raises RequestError for parts that are too small, DiskError.
        """
        items = {name: self.items[name] for name in names}
        blobs = dict.fromkeys(blob for item in items.values() for blob in item.blobs)
        room = part_bytes - self._index_bytes(items, part_bytes)
        if room <= 0:
            raise RequestError(
                f"--part-mib {part_bytes / 2**20:g} is too small: the index, which is in every part, fills it. Ask for "
                "larger parts."
            )
        pieces: dict[str, list[Piece]] = {name: [] for name in blobs}
        building = self.kit / ".parts"
        with disk_errors(self.kit):
            shutil.rmtree(building, ignore_errors=True)  # of a run that was killed
            building.mkdir()
            for name, piece, content in self._pieces(list(blobs), room):
                (building / piece.part).mkdir(parents=True, exist_ok=True)
                (building / piece.part / piece.file).write_bytes(content)
                pieces[name].append(piece)
            described = {name: self._described(name, pieces[name]) for name in blobs}
            parts = sorted(path.name for path in building.iterdir())
            for part in parts:
                write(building / part / INDEX, items, described)
                exchange(building / part, self.kit / part)
            building.rmdir()
            for path in self.kit.glob("part-*"):
                if path.name not in parts:
                    shutil.rmtree(path)
            self._sweep()
        return [self.kit / part for part in parts]

    def _described(self, name: str, pieces: Sequence[Piece]) -> Blob:
        plain, packed = self._paths(name)
        compressed = not plain.is_file()
        content_bytes = len(lzma.decompress(packed.read_bytes())) if compressed else plain.stat().st_size
        return Blob(content_bytes, compressed, tuple(pieces))

    def _pieces(self, names: Sequence[str], room: int) -> Iterator[tuple[str, Piece, bytes]]:
        """Each blob as it is stored, cut where a part is full."""
        number, free = 1, room
        for name in names:
            stored = next(path for path in self._paths(name) if path.is_file()).read_bytes()
            start = count = 0
            while start < len(stored) or not count:
                if not free:
                    number, free = number + 1, room
                content = stored[start : start + free]
                start, free, count = start + len(content), free - len(content), count + 1
                yield name, Piece(f"part-{number:02d}", f"{name[:16]}.{count}", len(content), sha256(content)), content

    def _index_bytes(self, items: Mapping[str, Item], part_bytes: int) -> int:
        """An upper bound of the index's bytes: each blob and each of its pieces takes less than 300 bytes."""
        names = {blob for item in items.values() for blob in item.blobs}
        stored = sum(path.stat().st_size for name in names for path in self._paths(name) if path.is_file())
        pieces = len(names) + 2 * stored // part_bytes + 2
        return len(json.dumps({name: asdict(item) for name, item in items.items()})) + 300 * (len(names) + pieces)

    def _sweep(self) -> None:
        """Removes blobs that belong to no item."""
        kept = {blob for item in self.items.values() for blob in item.blobs}
        for path in self._folder.iterdir():
            if path.name != RECORDS and path.name.removesuffix(".xz") not in kept:
                path.unlink()
