"""python -m benchmarks.backends: the backends that open an engine on the GPU, and their pictures beside the CPU's.

Each backend that opens makes the pictures that the engine's float32 networks make on the CPU: of 0, 1 and 2 persons,
from the same noise, in as many steps as a request takes.

--json prints one object as the last line of stdout: {"schema", "date", "command", "versions", "engine", "steps",
"backends": {NAME: {"left_out": the reason} or {"device", "precision", "pictures": [{"persons",
"latents_relative_rms": of the difference of the final latents, "levels_mean", "levels_max": of the pictures'
difference, in 1/255}], "failed": the error after it opened, or null}}}.

Exit status: 0 done, also if none opens; 1 a backend that opened failed, or made a picture that differs more than its
precision explains; 2 bad usage.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from realisid_trt import Engine
from realisid_trt.backends import KNOWN
from realisid_trt.commands.command_line import Outcome, execute, run
from realisid_trt.errors import RealisIDError
from realisid_trt.manifest import Manifest

from .measure import now, relative_rms, versions
from .options import Options, has_persons
from .same import SAME
from .scene import Scene

PERSONS = (0, 1, 2)


def compare(options: Options, command: Sequence[str] = ()) -> dict[str, Any]:
    """The comparison, as JSON values. Raises the errors of the CPU's engine."""
    scene = Scene.of(options, Manifest.read(options.engine))
    backends: dict[str, Any] = {}
    with Engine.load(options.engine, backend="onnxruntime", device="cpu") as engine:
        expected = _pictures(engine, options, scene)
    for name in KNOWN:
        try:
            engine = Engine.load(options.engine, backend=name, device="cuda")
        except (RealisIDError, ImportError, OSError) as error:  # a package may lack its libraries
            backends[name] = {"left_out": str(error)}
            continue
        backends[name] = {"device": engine.backend.device, "precision": engine.backend.precision}
        with engine:
            backends[name] |= _compared(engine, options, scene, expected)
    return {
        "schema": 1,
        "date": now(),
        "command": shlex.join(["python", "-m", "benchmarks.backends", *command]),
        "versions": versions(),
        "engine": str(options.engine),
        "steps": scene.steps,
        "backends": backends,
    }


def _compared(engine: Engine, options: Options, scene: Scene, expected: list[tuple[Any, Any]]) -> dict[str, Any]:
    """The differences of an open backend's pictures from the CPU's."""
    try:
        pictures = _pictures(engine, options, scene)
    except RealisIDError as error:
        return {"pictures": [], "failed": f"{type(error).__name__}: {error}"}
    figures = [
        {"persons": persons, **_difference(*pair)}
        for persons, pair in zip(_counts(scene), zip(pictures, expected, strict=True), strict=True)
    ]
    worst, precision = max(figure["latents_relative_rms"] for figure in figures), engine.backend.precision
    bound = SAME[precision] / (1 if precision == "float32" else 2)  # SAME allows for two in half precision
    if worst <= bound:
        return {"pictures": figures, "failed": None}
    problem = (
        f"its pictures are not the CPU's: the final latents differ by {worst:.1e} (relative RMS), and {precision} "
        f"explains at most {bound:.1e}. Report this as a bug, with the GPU."
    )
    return {"pictures": figures, "failed": problem}


def _pictures(engine: Engine, options: Options, scene: Scene) -> list[tuple[Any, Any]]:
    """Latents and picture (H, W, 3) in [0, 1], by number of persons."""
    made = (engine.generate(options.prompt, output="np", **scene.given(count, scene.steps)) for count in _counts(scene))
    return [(result.latents, result.images[0]) for result in made]


def _counts(scene: Scene) -> tuple[int, ...]:
    return PERSONS if has_persons(scene.config) else (0,)


def _difference(ours: tuple[Any, Any], theirs: tuple[Any, Any]) -> dict[str, float]:
    levels = np.abs(ours[1] - theirs[1]) * 255
    return {
        "latents_relative_rms": relative_rms(ours[0], theirs[0]),
        "levels_mean": float(levels.mean()),
        "levels_max": float(levels.max()),
    }


def table(result: dict[str, Any]) -> list[str]:
    """The result, as text for people."""
    lines = []
    for name, found in result["backends"].items():
        if "left_out" in found:
            lines.append(f"{name}: does not open: {found['left_out']}")
            continue
        lines.append(f"{name} on {found['device']}, {found['precision']}, beside float32 on the CPU:")
        for figure in found["pictures"]:
            lines.append(
                f"  {figure['persons']} persons: latents {figure['latents_relative_rms']:.1e} relative RMS, picture "
                f"{figure['levels_mean']:.2f} of 255 levels, at most {figure['levels_max']:.1f}"
            )
        if found["failed"]:
            lines.append(f"  FAILED: {found['failed']}")
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.backends",
        description="Open an engine on the GPU with every backend, and compare the pictures with the CPU's in float32.",
        epilog="example:\n  python -m benchmarks.backends --engine engines/miniature-fp16",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--engine", type=Path, required=True, metavar="DIR", help="engine directory")
    parser.add_argument("--steps", type=int, help="denoising steps (default: the engine's)")
    parser.add_argument("--json", action="store_true", help="the last line of stdout is one JSON object")
    given = parser.parse_args(arguments)

    def command() -> Outcome:
        options = Options(engine=given.engine, steps=given.steps)
        options.check()
        result = compare(options, arguments)
        return Outcome(result, table(result), int(any(found.get("failed") for found in result["backends"].values())))

    return run(command, given.json)


if __name__ == "__main__":
    sys.exit(execute(main))
