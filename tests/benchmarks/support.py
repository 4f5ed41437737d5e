"""Helpers that the tests of the benchmarks share."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from realisid_trt.manifest import MANIFEST, seal

STEPS = 2  # the first without the ID: α is 0.7


def arguments(engine_dir: Path, checkpoint_dir: Path, *more: str) -> list[str]:
    folders = ["--engine", str(engine_dir), "--checkpoint", str(checkpoint_dir)]
    return [*folders, "--steps", str(STEPS), "--runs", "1", "--warmup", "0", "--threads", "1", *more]


def for_onnxruntime(engine_dir: Path, out: Path) -> Path:
    """The same engine without its plans, as `export.build --backend onnxruntime` makes it."""
    shutil.copytree(engine_dir, out, copy_function=os.link, ignore=shutil.ignore_patterns(".*"))
    values = json.loads((out / MANIFEST).read_text(encoding="utf-8"))
    values["builds"] = {name: build for name, build in values["builds"].items() if build["backend"] == "onnxruntime"}
    for network in values["networks"].values():
        for name in [name for name in network["builds"] if name not in values["builds"]]:
            del values["files"][network["builds"].pop(name)["file"]]
    values["seal"] = seal(values)
    (out / MANIFEST).unlink()  # a link to the original
    (out / MANIFEST).write_text(json.dumps(values), encoding="utf-8")
    return out
