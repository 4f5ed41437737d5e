"""Files: written atomically, hashed once, and the folder of this project's cache."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from .errors import DiskError

FULL = (errno.ENOSPC, errno.EDQUOT)


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/realisid_trt, else ~/.cache/realisid_trt, else (no home: some containers) a temporary folder."""
    if given := os.environ.get("XDG_CACHE_HOME"):
        return Path(given) / "realisid_trt"
    try:
        return Path.home() / ".cache" / "realisid_trt"
    except RuntimeError:
        import tempfile  # seldom needed and slow to import

        return Path(tempfile.gettempdir()) / f"realisid_trt-{os.getuid()}"


@contextlib.contextmanager
def whole_or_not(path: Path) -> Iterator[Path]:
    """A temporary path: `with whole_or_not(path) as partial:` write `partial`. It replaces `path` if the block
    succeeds.

    Makes the folder if needed; `partial` lies beside `path` and has its ending.
    Raises DiskError for what the disk refuses.
    """
    if not path.name:
        raise DiskError(f"{str(path)!r} names no file. Give the path of one.")
    # unique among threads and among containers, in which every process may have the number 1
    partial = path.with_name(f".{path.stem}.{os.getpid()}-{os.urandom(4).hex()}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        mode = new_file_mode(partial)
        yield partial
        partial.chmod(mode)
        os.replace(partial, path)
    except OSError as error:
        advice = "Free some space" if error.errno in FULL else "Choose another place"
        raise DiskError(f"{path} could not be written ({error.strerror or error}). {advice}.") from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def new_file_mode(path: Path) -> int:
    """The permissions of a new file at `path`, as the umask and the folder give them. Leaves no file.

    safetensors writes files that only their owner may read, whatever the umask. Raises OSError.
    """
    path.touch(exist_ok=False)
    mode = stat.S_IMODE(path.stat().st_mode)
    path.unlink()
    return mode


def sha256(*parts: bytes | memoryview) -> str:
    """Hex digest of the concatenated parts."""
    import hashlib  # loads OpenSSL: a third of the import time of the rest of the package

    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def file_sha256(path: Path) -> str:
    """Hex digest of the file's content, read in pieces. Raises OSError."""
    import hashlib

    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class VerifiedFiles:
    """sha256 of files, remembered by path, size, mtime, ctime and inode: 13 GB are not read at every start.

    A context manager: on exit, new hashes are merged into the cache file. A cache file that cannot be read or written
    is ignored.
    """

    LIMIT = 4096  # entries

    def __init__(self) -> None:
        self._file = cache_folder() / "verified.json"
        self._known: dict[str, str] = {}
        self._learned: dict[str, str] = {}

    def __enter__(self) -> VerifiedFiles:
        self._known = self._read()
        return self

    def sha256(self, path: Path) -> str:
        """Hex digest of the file's content. Raises OSError."""
        key = _identity(path)
        if key not in self._known:
            self._known[key] = self._learned[key] = file_sha256(path)
        return self._known[key]

    def remember(self, path: Path, sha256: str) -> None:
        """Records the digest of a file that the caller has read already, under another name. Raises OSError."""
        key = _identity(path)
        self._known[key] = self._learned[key] = sha256

    def __exit__(self, *exception: object) -> None:
        if not self._learned:
            return
        changed = {key.split("|", 1)[0] for key in self._learned}
        kept = {key: value for key, value in self._read().items() if key.split("|", 1)[0] not in changed}
        entries = list((kept | self._learned).items())[-self.LIMIT :]
        with contextlib.suppress(OSError, DiskError):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with whole_or_not(self._file) as partial:
                partial.write_text(json.dumps(dict(entries)), encoding="utf-8")

    def _read(self) -> dict[str, str]:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            known = json.loads(self._file.read_text(encoding="utf-8"))
            return {str(key): str(value) for key, value in known.items()}
        return {}


def _identity(path: Path) -> str:
    """A key that changes when the file changes."""
    found = path.stat()
    return f"{path.resolve()}|{found.st_size}|{found.st_mtime_ns}|{found.st_ctime_ns}|{found.st_ino}"
