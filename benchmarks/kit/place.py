"""Puts items of a kit in their places, verified and atomically."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from export.files import check_space, disk_errors, locked, whole_folder
from realisid_trt.errors import RequestError
from realisid_trt.files import VerifiedFiles
from realisid_trt.machine import available_cores

from .index import File, Kit, KitError


def place(kit: Kit, item: str, folder: Path) -> int:
    """Writes an item's files into a folder, atomically. Returns their bytes; 0 if they are there already.

    Raises KitError if a part of it is missing or damaged, RequestError if the folder holds something else or another
    process is placing it, DiskError.
    """
    if problem := kit.missing(item):
        raise KitError(f"{problem}. Carry every part of a kit that was prepared with it.")
    files = kit.items[item].files
    with disk_errors(folder.parent):
        folder.parent.mkdir(parents=True, exist_ok=True)
    busy = RequestError(f"another process is making {folder}. Wait for it, or choose another --out.")
    with locked(folder.with_name(f".{folder.name}.lock"), busy):
        if folder.exists():
            if _wrong(files, folder):
                raise RequestError(f"{folder} exists and is not the {item} of {kit.folder}. Move it away.")
            return 0
        total = sum(file.bytes for file in files)
        check_space(folder.parent, total, f"{item} of the kit")
        with whole_folder(folder) as partial, disk_errors(folder.parent):
            write(kit, files, partial)
        with VerifiedFiles() as verified:  # `Engine.load` then need not read 13 GB again
            for file in files:
                verified.remember(folder / file.path, file.sha256)
    return total


def place_beside(kit: Kit, item: str, folder: Path) -> None:
    """Writes an item's files into a folder that may hold other files too. Raises KitError, DiskError."""
    if problem := kit.missing(item):
        raise KitError(f"{problem}. Carry every part of a kit that was prepared with it.")
    with disk_errors(folder):
        write(kit, kit.items[item].files, folder)


def write(kit: Kit, files: tuple[File, ...], folder: Path) -> None:
    """Writes files and verifies them. Raises KitError, OSError."""
    by_source: dict[str, list[Any]] = {}
    for file in files:
        path = folder / file.path
        path.parent.mkdir(parents=True, exist_ok=True)
        if file.gaps is None:
            path.write_bytes(kit.content(file.blob))
        else:
            described = json.loads(kit.content(file.gaps))
            entry = path, file.bytes, kit.content(file.blob), described["gaps"]
            by_source.setdefault(json.dumps(described["source"]), []).append(entry)
    for source, entries in by_source.items():
        from .weightless import Gap, put_back, source_of  # imports torch, which files without gaps do not need

        put_back(
            ((path, nbytes, rest, [Gap.from_list(gap) for gap in gaps]) for path, nbytes, rest, gaps in entries),
            source_of(json.loads(source)),
        )
    if wrong := _wrong(files, folder):
        raise KitError(
            f"{', '.join(wrong)}: the restored content has another sha256 than the index states. The weights are drawn "
            "differently here, or the source tree is not the one that the kit was made from. Prepare it again."
        )


def _wrong(files: tuple[File, ...], folder: Path) -> list[str]:
    """Paths of files that differ from the index. Files are read on every core; equal ones are recorded as verified."""
    with VerifiedFiles() as verified, ThreadPoolExecutor(available_cores()) as pool:

        def right(file: File) -> bool:
            path = folder / file.path
            return path.is_file() and path.stat().st_size == file.bytes and verified.sha256(path) == file.sha256

        return [file.path for file, good in zip(files, pool.map(right, files), strict=True) if not good]
