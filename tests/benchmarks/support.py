"""What the tests of the latency command share."""

from __future__ import annotations

from pathlib import Path

STEPS = 2  # the first without the ID: α is 0.7


def arguments(engine_dir: Path, checkpoint_dir: Path, *more: str) -> list[str]:
    folders = ["--engine", str(engine_dir), "--checkpoint", str(checkpoint_dir)]
    return [*folders, "--steps", str(STEPS), "--runs", "1", "--warmup", "0", "--threads", "1", *more]
