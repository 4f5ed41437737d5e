"""log.jsonl: the losses of a training's steps, and their plot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from export.files import disk_errors
from realisid_trt.files import whole_or_not


class Log:
    """log.jsonl: one JSON object per line. Lines after the step from which a run continues are dropped."""

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        lines = read_log(path) if path.is_file() else []
        kept = "".join(json.dumps(line) + "\n" for line in lines if line["step"] <= step)
        with whole_or_not(path) as partial:
            partial.write_text(kept, encoding="utf-8")

    def add(self, values: dict[str, Any]) -> None:
        with disk_errors(self.path.parent), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log.jsonl; a last line that a kill cut off is left out."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return found


def draw_losses(log: Path, out: Path, title: str) -> None:
    """Every column of a log.jsonl over the steps, as a PNG. Raises DiskError."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = read_log(log)
    names = [name for name in lines[-1] if name not in ("step", "examples_per_s")] if lines else []
    if not names:
        return
    figure, axes = pyplot.subplots(1, len(names), figsize=(4.6 * len(names), 3.4), squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        points = [(line["step"], line[name]) for line in lines if name in line]
        axis.plot(*zip(*points, strict=True), linewidth=1)
        axis.set_xlabel("step")
        axis.set_title(name)
        axis.grid(alpha=0.3)
    figure.suptitle(title)
    figure.tight_layout()
    try:
        with disk_errors(out.parent), whole_or_not(out) as partial:
            figure.savefig(partial, dpi=100, format="png")
    finally:
        pyplot.close(figure)
