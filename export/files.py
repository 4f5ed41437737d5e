"""Folders that are published atomically, and the errors of full disks."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import re
import shlex
import shutil
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

from realisid_trt.errors import DiskError, RealisIDError, RealisIDWarning
from realisid_trt.files import FULL, whole_or_not

REFUSALS = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENOENT, errno.EEXIST, errno.EBUSY, errno.EXDEV),
)
WEEK_SECONDS = 7 * 24 * 3600


def target_folder(path: str | os.PathLike[str]) -> Path:
    """The folder that `path` means: absolute, links followed. Raises DiskError if it could not be exchanged later."""
    folder = Path(os.path.realpath(path))
    if os.path.ismount(folder):
        raise DiskError(f"{path} is a mount point, which cannot be exchanged. Choose a folder inside it.")
    _check_renames(folder)
    return folder


def exchange(new: Path, old: Path) -> None:
    """Puts `new` in the place of `old`, then removes the previous folder.

    At any moment one of the two is complete, at `old`; or at `old`.old, on a system that cannot swap two names in one
    step. A previous folder that cannot be removed, because a network file system keeps it open, stays; a warning names
    it. Raises DiskError if nothing was exchanged.
    """
    previous = None
    with disk_errors(old.parent):
        if not old.exists():
            os.rename(new, old)
        elif _swap(new, old):
            previous = new
        else:
            previous = old.with_name(old.name + ".old")
            shutil.rmtree(previous, ignore_errors=True)
            os.rename(old, previous)
            os.rename(new, old)
        sync(old.parent)
    if previous is not None:
        try:
            shutil.rmtree(previous)
        except FileNotFoundError:  # another process removes it too, as abandoned
            shutil.rmtree(previous, ignore_errors=True)
        except OSError as error:
            warnings.warn(
                f"{old} is published, but the previous folder could not be removed completely "
                f"({error.strerror or error}). "
                f"Remove {previous} when no other program uses it.",
                RealisIDWarning,
                stacklevel=2,
            )


def _swap(a: Path, b: Path) -> bool:
    """Exchanges two names in one step, where the system can (Linux renameat2). Returns whether it did."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    at_cwd, exchange_flag = -100, 2
    return bool(renameat2(at_cwd, os.fsencode(a), at_cwd, os.fsencode(b), exchange_flag) == 0)


def _check_renames(folder: Path) -> None:
    """Raises DiskError if a folder lies in a layer of a container's image: overlayfs does not rename such a folder.

    It is renamed and renamed back. Readers look under the temporary name for an engine whose publishing was
    interrupted.
    """
    if not os.path.isdir(folder) or _file_system(folder) != "overlay":
        return
    aside = folder.with_name(folder.name + ".old")
    if aside.exists():
        return
    try:
        os.rename(folder, aside)
    except OSError as error:
        if error.errno != errno.EXDEV:
            return  # it is reported at the publication
        quoted, copy = shlex.quote(str(folder)), shlex.quote(f"{folder}.copy")
        raise DiskError(
            f"{folder} lies in a layer of the container's image (overlayfs), where a folder cannot be exchanged. "
            "Choose another --out or a mounted volume; or copy it out of the layer, and run the same command again: "
            f"cp -a {quoted} {copy} && rm -r {quoted} && mv {copy} {quoted}"
        ) from None
    os.rename(aside, folder)


def _file_system(path: Path) -> str:
    """The type of the file system that holds `path`, such as "ext4"; "" where the system does not say."""
    found, longest = "", -1
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape").splitlines():
            fields, _, described = line.partition(" - ")
            place = re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), fields.split(" ")[4])
            if path.is_relative_to(place) and len(place) >= longest:  # a later mount covers an earlier one
                found, longest = described.split(" ")[0], len(place)
    return found


def sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A temporary folder: `with whole_folder(out) as partial:` fill `partial`. It replaces `out` if the block succeeds.

    Removes leftovers of killed runs beside `out`: 13 GB at full size. Raises DiskError.
    """
    with disk_errors(out.parent):
        out.parent.mkdir(parents=True, exist_ok=True)
        for leftover in list(out.parent.iterdir()):
            if leftover.name.startswith(f".{out.name}.") and leftover.name.endswith(".part"):
                _remove_abandoned(leftover)
        partial, descriptor = _make_locked(out)
    try:
        yield partial
        exchange(partial, out)
    finally:
        os.close(descriptor)
        shutil.rmtree(partial, ignore_errors=True)


def _make_locked(out: Path) -> tuple[Path, int]:
    """A new folder beside `out`, and the descriptor that locks it.

    A lock is valid in every container; a process number is not.
    """
    import fcntl

    while True:
        folder = out.with_name(f".{out.name}.{os.getpid()}-{os.urandom(4).hex()}.part")
        folder.mkdir()
        try:
            descriptor = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:  # another process removed it as abandoned, before it was locked
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # another process is removing it as abandoned
            os.close(descriptor)
            continue
        except OSError:  # a network file system without locks on folders: `_remove_abandoned` waits a week
            return folder, descriptor
        if _is_at(folder, descriptor):
            return folder, descriptor
        os.close(descriptor)


def _is_at(folder: Path, descriptor: int) -> bool:
    """Whether an opened folder is still at its path."""
    try:
        return os.path.samestat(os.stat(folder), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _remove_abandoned(folder: Path) -> None:
    """Removes a folder that no process has locked, and locks it meanwhile.

    On a file system without locks it removes a folder that is more than a week old.
    """
    import fcntl

    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        abandoned = _is_at(folder, descriptor)
    except BlockingIOError:
        abandoned = False
    except OSError:
        abandoned = time.time() - os.fstat(descriptor).st_mtime > WEEK_SECONDS
    try:
        if abandoned:
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def locked(path: Path, busy: RealisIDError) -> Iterator[None]:
    """A context that holds the lock of the file `path`. Raises `busy` while another process holds it.

    The empty file stays.
    """
    try:
        import fcntl
    except ImportError:  # no advisory locks on this system: the caller must avoid two processes at once
        yield
        return
    with disk_errors(path.parent):
        file = open(path, "w")  # noqa: SIM115 - it must outlive this block's errors
    os.register_at_fork(after_in_child=file.close)  # a fork that outlives this process does not keep the lock
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise busy from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP):  # a network file system without locks
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
