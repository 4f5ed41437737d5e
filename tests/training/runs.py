"""The command of a training in the tests, and the examples that its stage needs."""

from __future__ import annotations

from pathlib import Path

from training.residuals import DESIGNS

DATA = {
    "vae": "scenes", "vae-faces": "scenes", "id-encoder": "faces", "text-to-image": "scenes", "branches": "groups",
    "recogniser": "faces",
    "face-points": "scenes", "attributes": "scenes", "detector": "scenes",
    **{f"branches-{design}": "portraits" for design in DESIGNS if design != "realisid"},
}  # fmt: skip


def command(stage: str, start: Path, data: Path, out: Path, *more: str) -> list[str]:
    return [
        stage, "--checkpoint", str(start), "--data", str(data / DATA[stage]), "--out", str(out), "--new", "--cpu",
        "--batch-size", "8", "--threads", "1", "--warmup-steps", "2", "--learning-rate", "1e-3", *more,
    ]  # fmt: skip
