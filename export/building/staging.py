"""The staging folder of a build: artifacts are made beside the engine directory, and exchanged with it when complete.

A build killed at any moment leaves the old engine or the new one, never a part. Finished artifacts stay in the staging
folder, and the next run uses them. It also uses artifacts of the old engine that are up to date: each artifact has a
key, a hash over everything that went into it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from realisid_trt.errors import BuildError, EngineError
from realisid_trt.files import VerifiedFiles, file_sha256, new_file_mode
from realisid_trt.manifest import MANIFEST, Manifest

from ..files import disk_errors, exchange, locked, sync, write_json

RECORDS, WORK = "build.json", ".work"


@dataclass(frozen=True)
class Artifact:
    """Files of the engine that are made together, and facts about them for the manifest.

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
    """The folder `.NAME.building` beside `NAME`. Use `open_staging`.

    out: the engine directory, from `target_folder`.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self.folder = out.with_name(f".{out.name}.building")
        self.artifacts: dict[str, Artifact] = {}
        self.current: dict[str, Any] = {}  # manifest of the present engine, if that is complete
        self._kept: dict[str, Artifact] = {}  # its artifacts

    def find(self, name: str, key: str) -> Artifact | None:
        """The artifact, if the staging folder or the old engine has it, complete and with this key."""
        if (artifact := self.artifacts.get(name)) and artifact.key == key and self._is_whole(self.folder, artifact):
            return artifact
        if (artifact := self._kept.get(name)) and artifact.key == key and self._is_whole(self.out, artifact):
            for file in artifact.files:
                target = self.folder / file
                target.parent.mkdir(parents=True, exist_ok=True)
                target.unlink(missing_ok=True)
                _link(self.out / file, target)
            with VerifiedFiles() as verified:  # a new link changes the ctime of both
                for file, listed in artifact.files.items():
                    for folder in (self.folder, self.out):
                        verified.remember(folder / file, listed["sha256"])
            self._record(name, artifact)
            return artifact
        return None

    def workspace(self, name: str) -> Path:
        """An empty folder to make an artifact in. The next build discards leftovers of a killed one."""
        workspace = self.folder / WORK / name
        with disk_errors(self.folder):
            shutil.rmtree(workspace, ignore_errors=True)
            workspace.mkdir(parents=True)
        return workspace

    def add(self, name: str, key: str, workspace: Path, info: dict[str, Any] | None = None) -> Artifact:
        """Moves every file of `workspace` to its place and remembers it."""
        files = {}
        with disk_errors(self.folder):
            mode = new_file_mode(workspace / ".mode")
            for source in sorted(path for path in workspace.rglob("*") if path.is_file()):
                file = source.relative_to(workspace).as_posix()
                source.chmod(mode)
                sync(source)
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
        with VerifiedFiles() as verified:
            return all(
                (folder / file).is_file() and verified.sha256(folder / file) == listed["sha256"]
                for file, listed in artifact.files.items()
            )

    def stands(self, manifest: Mapping[str, Any], verifiable: Collection[str]) -> bool:
        """Whether the present engine is what this manifest describes; then the staging folder is removed.

        verifiable: builds that this machine can compare with the reference. Those of the present engine must have been
                    compared.
        """
        derived = ("seal", "verified")
        same = all(self.current.get(key) == value for key, value in manifest.items() if key not in derived)
        same = same and set(verifiable) <= set(self.current.get("verified", ()))
        if same and self.current:
            shutil.rmtree(self.folder)
        return same and bool(self.current)

    def publish(self, manifest: dict[str, Any], names: list[str]) -> None:
        """Puts the folder in the place of the engine directory, with this manifest and without superfluous files."""
        self.prune(names)
        with disk_errors(self.folder):
            write_json(self.folder / MANIFEST, manifest)
            for folder in {self.folder, *(path.parent for path in self.folder.rglob("*"))}:
                sync(folder)
        exchange(self.folder, self.out)

    def prune(self, names: list[str]) -> None:
        """Removes the records of artifacts other than `names`, and files that belong to none of `names`."""
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
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / MANIFEST).is_file())):
        raise BuildError(f"{out} exists and is not an engine directory. Choose another --out, or move it away.")
    staging = Staging(out)
    with disk_errors(out.parent):
        staging.folder.mkdir(exist_ok=True)
    busy = BuildError(f"another build of {out} is running. Wait for it, or choose another --out.")
    with locked(out.with_name(f".{out.name}.lock"), busy):
        _recover(out)
        shutil.rmtree(staging.folder / WORK, ignore_errors=True)  # of a build that was killed
        staging.artifacts = _read_records(staging.folder)
        with contextlib.suppress(EngineError):  # an altered engine is not reused
            manifest = Manifest.read(out)
            manifest.check_files()
            staging.current, staging._kept = dict(manifest.values), _read_records(out)
        try:
            with disk_errors(out.parent, refusals=False):
                yield staging
        finally:
            with contextlib.suppress(OSError):  # it was published, or it holds results for the next build
                staging.folder.rmdir()


def _read_records(folder: Path) -> dict[str, Artifact]:
    try:
        records = json.loads((folder / RECORDS).read_text(encoding="utf-8"))
        return {name: Artifact(**record) for name, record in records.items()}
    except (OSError, ValueError, TypeError):
        return {}


def _recover(out: Path) -> None:
    """Mends a build that was killed between its two renames, or before it removed the old engine."""
    previous = out.with_name(out.name + ".old")
    if (previous / MANIFEST).is_file():
        if not out.exists():
            os.rename(previous, out)
        elif (out / MANIFEST).is_file():
            shutil.rmtree(previous)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copy2(source, target)
