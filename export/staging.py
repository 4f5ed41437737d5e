"""A build in the making: artifacts are made beside the engine directory and exchanged with it when all are there.

A build killed at any moment leaves the old engine or the new one, never half. What it had finished is kept in the
staging folder and used by the next run, as is whatever of the old engine is still what it would be built as: each
artifact has a key, a hash over everything that went into it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from realisid_trt.errors import BuildError, DiskError, EngineError
from realisid_trt.manifest import MANIFEST, Manifest
from realisid_trt.verified import file_sha256

RECORDS, WORK = "build.json", ".work"


@dataclass(frozen=True)
class Artifact:
    """Files of the engine that are made together, and what was learned while making them.

    key:   hash over everything that went in.
    files: path inside the engine directory → {"bytes", "sha256"}.
    info:  for the manifest; JSON values.
    """

    key: str
    files: dict[str, dict[str, Any]]
    info: dict[str, Any] = field(default_factory=dict)


def content_key(*parts: object) -> str:
    """sha256 over JSON values: the key of an artifact."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


class Staging:
    """The folder `.NAME.building` beside `NAME`. Use `open_staging`."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.folder = out.with_name(f".{out.name}.building")
        self.artifacts: dict[str, Artifact] = {}
        self.current: dict[str, Any] = {}  # manifest of the engine that is there now, if it is whole
        self._kept: dict[str, Artifact] = {}  # its artifacts

    def find(self, name: str, key: str) -> Artifact | None:
        """The artifact, if it stands in the staging folder or in the old engine, whole and with this key."""
        if (artifact := self.artifacts.get(name)) and artifact.key == key and self._is_whole(self.folder, artifact):
            return artifact
        if (artifact := self._kept.get(name)) and artifact.key == key and self._is_whole(self.out, artifact):
            for file in artifact.files:
                target = self.folder / file
                target.parent.mkdir(parents=True, exist_ok=True)
                target.unlink(missing_ok=True)
                _link(self.out / file, target)
            self._record(name, artifact)
            return artifact
        return None

    def workspace(self, name: str) -> Path:
        """An empty folder to make an artifact in. What a killed build leaves in one is thrown away by the next."""
        workspace = self.folder / WORK / name
        with disk_errors(self.folder):
            shutil.rmtree(workspace, ignore_errors=True)
            workspace.mkdir(parents=True)
        return workspace

    def add(self, name: str, key: str, workspace: Path, info: dict[str, Any] | None = None) -> Artifact:
        """Moves every file of `workspace` to its place and remembers it."""
        files = {}
        with disk_errors(self.folder):
            for source in sorted(path for path in workspace.rglob("*") if path.is_file()):
                file = source.relative_to(workspace).as_posix()
                source.chmod(0o644)  # safetensors writes files that only their owner may read
                _sync(source)
                files[file] = {"bytes": source.stat().st_size, "sha256": file_sha256(source)}
                (self.folder / file).parent.mkdir(parents=True, exist_ok=True)
                os.replace(source, self.folder / file)
            shutil.rmtree(workspace)
            artifact = Artifact(key, files, info or {})
            self._record(name, artifact)
        return artifact

    def _record(self, name: str, artifact: Artifact) -> None:
        self.artifacts[name] = artifact
        write_json(self.folder / RECORDS, {name: asdict(artifact) for name, artifact in self.artifacts.items()})

    def _is_whole(self, folder: Path, artifact: Artifact) -> bool:
        return all(
            (folder / file).is_file()
            and (folder / file).stat().st_size == listed["bytes"]
            and file_sha256(folder / file) == listed["sha256"]
            for file, listed in artifact.files.items()
        )

    def stands(self, manifest: Mapping[str, Any]) -> bool:
        """Whether the engine that is there now is what this manifest describes; then the staging folder is removed."""
        derived = ("seal", "verified")
        same = all(self.current.get(key) == value for key, value in manifest.items() if key not in derived)
        if same and self.current:
            shutil.rmtree(self.folder)
        return same and bool(self.current)

    def publish(self, manifest: dict[str, Any], names: list[str]) -> None:
        """Writes the manifest, drops what no longer belongs, and exchanges the folder with the engine directory."""
        self.prune(names)
        with disk_errors(self.folder):
            write_json(self.folder / MANIFEST, manifest)
            for folder in {self.folder, *(path.parent for path in self.folder.rglob("*"))}:
                _sync(folder)
        exchange(self.folder, self.out)

    def prune(self, names: list[str]) -> None:
        """Removes artifacts other than `names`, and files that belong to none."""
        self.artifacts = {name: self.artifacts[name] for name in names}
        write_json(self.folder / RECORDS, {name: asdict(artifact) for name, artifact in self.artifacts.items()})
        belonging = {self.folder / file for artifact in self.artifacts.values() for file in artifact.files}
        belonging |= {self.folder / RECORDS, self.folder / MANIFEST}
        for path in sorted(self.folder.rglob("*"), reverse=True):
            if path.is_dir():
                with contextlib.suppress(OSError):
                    path.rmdir()
            elif path not in belonging:
                path.unlink()


@contextlib.contextmanager
def open_staging(out: Path) -> Iterator[Staging]:
    """The staging folder of an engine directory, locked against a second build. Raises BuildError."""
    with disk_errors(out.parent):
        out.parent.mkdir(parents=True, exist_ok=True)
    _recover(out)
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / MANIFEST).is_file())):
        raise BuildError(f"{out} exists and is no engine directory. Choose another --out, or move it away.")
    staging = Staging(out)
    with disk_errors(out.parent):
        staging.folder.mkdir(exist_ok=True)
    with _lock(out.with_name(f".{out.name}.lock"), out):
        shutil.rmtree(staging.folder / WORK, ignore_errors=True)  # of a build that was killed
        staging.artifacts = _read_records(staging.folder)
        with contextlib.suppress(EngineError):  # an engine that was altered is not built upon
            manifest = Manifest.read(out)
            manifest.check_files()
            staging.current, staging._kept = dict(manifest.values), _read_records(out)
        with disk_errors(out.parent, refusals=False):
            yield staging


def _read_records(folder: Path) -> dict[str, Artifact]:
    try:
        records = json.loads((folder / RECORDS).read_text(encoding="utf-8"))
        return {name: Artifact(**record) for name, record in records.items()}
    except (OSError, ValueError, TypeError):
        return {}


@contextlib.contextmanager
def _lock(path: Path, out: Path) -> Iterator[None]:
    try:
        import fcntl
    except ImportError:  # no advisory locks on this system: two builds of one engine are the caller's to avoid
        yield
        return
    with disk_errors(path.parent):
        file = open(path, "w")  # noqa: SIM115 - it must outlive this block's errors
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise BuildError(f"another build of {out} is running. Wait for it, or choose another --out.") from None
        yield


def exchange(new: Path, old: Path) -> None:
    """`new` becomes `old`; what was there is removed afterwards. One of the two is whole at its place at any moment."""
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
    _sync(old.parent)


def _swap(a: Path, b: Path) -> bool:
    """Exchanges two names in one step where the system can (Linux renameat2)."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    at_cwd, exchange_flag = -100, 2
    return bool(renameat2(at_cwd, os.fsencode(a.absolute()), at_cwd, os.fsencode(b.absolute()), exchange_flag) == 0)


def _recover(out: Path) -> None:
    """Undoes a build that was killed between its two renames."""
    previous = out.with_name(out.name + ".old")
    if (previous / MANIFEST).is_file():
        if not out.exists():
            os.rename(previous, out)
        elif (out / MANIFEST).is_file():
            shutil.rmtree(previous)


def write_json(path: Path, value: object) -> None:
    """Writes a JSON file, whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(value, indent=1), encoding="utf-8")
    _sync(partial)
    os.replace(partial, path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copy2(source, target)


_REFUSALS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENOENT, errno.EEXIST)


@contextlib.contextmanager
def disk_errors(folder: Path, refusals: bool = True) -> Iterator[None]:
    """Turns a full disk, and paths that cannot be written (`refusals`), into a DiskError that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskError(
                f"the disk of {folder} is full. Free some space and run the same command again: it goes on from there."
            ) from error
        if refusals and error.errno in _REFUSALS:
            raise DiskError(f"{folder} cannot be written ({error.strerror}). Choose another --out.") from error
        raise


def check_space(folder: Path, needed_bytes: int) -> None:
    """Raises DiskError if the disk that holds `folder` has less than `needed_bytes` free."""
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise DiskError(
            f"the build needs about {needed_bytes / 1e9:.1f} GB and {folder} has {free / 1e9:.1f} GB free. "
            "Free some space, or choose --out on another disk."
        )
