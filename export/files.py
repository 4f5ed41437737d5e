"""Folders that appear whole or not at all, and disks that are full."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from realisid_trt.errors import DiskError, RealisIDError
from realisid_trt.files import FULL, whole_or_not

REFUSALS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENOENT, errno.EEXIST, errno.EBUSY)


def target_folder(path: str | os.PathLike[str]) -> Path:
    """The folder that `path` means: absolute, links followed. Raises DiskError if it could not be exchanged later."""
    folder = Path(os.path.realpath(path))
    if os.path.ismount(folder):
        raise DiskError(f"{path} is a mount point, which cannot be exchanged. Choose a folder inside it.")
    return folder


def exchange(new: Path, old: Path) -> None:
    """`new` becomes `old`; what was there is removed afterwards. One of the two is whole at its place at any moment."""
    with disk_errors(old.parent):
        if not old.exists():
            os.rename(new, old)
        elif _swap(new, old):
            shutil.rmtree(new)
        else:
            previous = old.with_name(old.name + ".old")
            shutil.rmtree(previous, ignore_errors=True)
            os.rename(old, previous)
            os.rename(new, old)
            shutil.rmtree(previous)
        sync(old.parent)


def _swap(a: Path, b: Path) -> bool:
    """Exchanges two names in one step where the system can (Linux renameat2)."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    at_cwd, exchange_flag = -100, 2
    return bool(renameat2(at_cwd, os.fsencode(a), at_cwd, os.fsencode(b), exchange_flag) == 0)


def sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sweep(out: Path) -> None:
    """Deletes what killed runs left beside `out`, as `.NAME.PID.part`: 13 GB at full size."""
    for leftover in out.parent.glob(f".{out.name}.*.part"):
        owner = leftover.name.split(".")[-2]
        if owner.isdigit() and not Path("/proc", owner).exists() and Path("/proc").exists():
            shutil.rmtree(leftover, ignore_errors=True)


@contextlib.contextmanager
def locked(path: Path, busy: RealisIDError) -> Iterator[None]:
    """Raises `busy` while another process holds the lock that the file `path` stands for. The empty file stays."""
    try:
        import fcntl
    except ImportError:  # no advisory locks on this system: two processes at once are the caller's to avoid
        yield
        return
    with disk_errors(path.parent):
        file = open(path, "w")  # noqa: SIM115 - it must outlive this block's errors
    os.register_at_fork(after_in_child=file.close)  # a fork that outlives this process keeps no lock
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise busy from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP):  # a network's file system without locks
                raise
        yield


def write_json(path: Path, value: object) -> None:
    """Writes a JSON file, whole or not at all."""
    with whole_or_not(path) as partial:
        partial.write_text(json.dumps(value, indent=1), encoding="utf-8")
        sync(partial)


@contextlib.contextmanager
def disk_errors(folder: Path, refusals: bool = True) -> Iterator[None]:
    """Turns a full disk, and paths that cannot be written (`refusals`), into a DiskError that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise DiskError(f"the disk of {folder} is full. Free some space and run the same command again.") from error
        if refusals and error.errno in REFUSALS:
            raise DiskError(f"{folder} cannot be written ({error.strerror}). Choose another --out.") from error
        raise


def check_space(folder: Path, needed_bytes: int, what: str = "the build") -> None:
    """Raises DiskError if the disk that holds `folder` has less than `needed_bytes` free."""
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise DiskError(
            f"{what} needs about {needed_bytes / 1e9:.1f} GB and {folder} has {free / 1e9:.1f} GB free. "
            "Free some space, or choose --out on another disk."
        )
