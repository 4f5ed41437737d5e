"""The contents of a folder, byte for byte."""

from __future__ import annotations

from pathlib import Path

from realisid_trt.files import file_sha256


def digests(folder: Path) -> dict[str, str]:
    """Path inside the folder → sha256 of the file."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): file_sha256(file) for file in files}
