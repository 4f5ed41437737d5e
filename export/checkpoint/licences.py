"""The licence lines of a checkpoint: under which terms each of its parts was published."""

from __future__ import annotations

from pathlib import Path

from realisid_trt.errors import CheckpointError

from .files import read_json

KEYS = ("part", "licence", "source")
LicenceLine = dict[str, str | None]  # part and source are names; licence is None where none was found


def read_licences(checkpoint: Path) -> list[LicenceLine]:
    """`licences` of model_index.json: one line a part. Empty where the checkpoint has none. Raises CheckpointError."""
    file = checkpoint / "model_index.json"
    lines = read_json(file, "it lists the checkpoint's parts and its base model").get("licences") or []
    if not isinstance(lines, list) or not all(map(_is_line, lines)):
        raise CheckpointError(
            f"{file}: licences is not a list of objects with the keys {', '.join(KEYS)}, each a text (licence may be "
            "null). Correct the file."
        )
    return lines


def _is_line(line: object) -> bool:
    if not isinstance(line, dict) or set(line) != set(KEYS):
        return False
    return all(isinstance(line[key], str) or (key == "licence" and line[key] is None) for key in KEYS)
