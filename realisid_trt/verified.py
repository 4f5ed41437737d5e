"""Hashes of large files, remembered so that 13 GB are not read at every start."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from pathlib import Path


def cache_folder() -> Path:
    """Where this project keeps what it can make again: $XDG_CACHE_HOME/realisid_trt or ~/.cache/realisid_trt."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "realisid_trt"


class VerifiedFiles:
    """sha256 of files, remembered by path, size, mtime, ctime and inode.

    A context manager: what was learned is written on leaving, and a cache that cannot be read or written is no error.
    """

    def __init__(self) -> None:
        self._file = cache_folder() / "verified.json"
        self._known: dict[str, str] = {}
        self._learned: dict[str, str] = {}

    def __enter__(self) -> VerifiedFiles:
        with contextlib.suppress(OSError, ValueError):
            known = json.loads(self._file.read_text(encoding="utf-8"))
            self._known = {str(key): str(value) for key, value in known.items()}
        return self

    def sha256(self, path: Path) -> str:
        """Hex digest of the file's content. Raises OSError."""
        stat = path.stat()
        key = f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}|{stat.st_ctime_ns}|{stat.st_ino}"
        if key not in self._known:
            self._known[key] = self._learned[key] = file_sha256(path)
        return self._known[key]

    def __exit__(self, *exception: object) -> None:
        if not self._learned:
            return
        paths = {key.split("|", 1)[0] for key in self._learned}
        kept = {key: value for key, value in self._known.items() if key.split("|", 1)[0] not in paths}
        kept.update(self._learned)
        with contextlib.suppress(OSError):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=self._file.parent, delete=False, encoding="utf-8") as file:
                json.dump(dict(list(kept.items())[-4096:]), file)
            os.replace(file.name, self._file)


def file_sha256(path: Path) -> str:
    """Hex digest of the file's content, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
