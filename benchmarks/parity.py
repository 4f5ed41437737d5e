"""python -m benchmarks.parity: whether an engine of ID-Patch computes what the published repository computes.

The command runs your own clone of the published repository in float32, from fixed latents, and keeps what its UNet and
ControlNet read: tokens, pooled text, condition. The engine makes the same picture twice: by itself, out of prompt,
embeddings, noses and drawing; and fed with the tokens, pooled text and condition of the published pipeline. Embeddings
are random: the way from a photo to them is checked by `export.adopt`. Two persons stand in the picture.

An engine in float32 passes if nothing differs by more than 1e-3 (relative RMS). One in half precision passes if nothing
differs by more than 4 times what the published pipeline itself differs in that precision.

--json prints one object as the last line of stdout:

  schema, date (UTC), commit (or null), versions, command
  engine      name, seal, backend, precision
  published   its commit, or null
  persons, steps, tokens (of the UNet, in every step of the published pipeline)
  rows        [{"name", "rms": of the engine, "rms_torch": of the published pipeline in the engine's precision, or null,
              "bound", "passed"}]
  problems    [sentences: other timesteps, other numbers of tokens]
  passed

Exit status: 0 the same, 1 not, 2 bad usage.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from realisid_trt import Engine
from realisid_trt.branches import Branch
from realisid_trt.commands.command_line import Outcome, execute, run
from realisid_trt.commands.flags import flags_of
from realisid_trt.config import RealisIDConfig
from realisid_trt.errors import CheckpointError, RequestError
from realisid_trt.files import sha256
from realisid_trt.machine import available_cores
from realisid_trt.manifest import Manifest
from realisid_trt.persons.bodies import body_drawing

from .measure import commit, now, relative_rms, versions
from .options import Options
from .published import run_published
from .reading import LATENTS, Picture, Reading, run_engine
from .scene import Scene

BOUND = 1e-3  # float32
TIMES_TORCH = 4.0  # half precision: so many times the error of the published pipeline in the same
GRID_PX = 8  # of the noses: bfloat16, in which the published code rounds them, holds such numbers up to 2048
PROMPT, NEGATIVE_PROMPT = "two friends raise a glass, golden hour", "blurry, worst quality, text, watermark"
FED = f"{LATENTS}, fed with the published tokens, pooled text and condition"
# A standing person: COCO's joints about the nose, in shoulder widths.
STANDING = np.array([
    (0, 0), (0.12, -0.1), (-0.12, -0.1), (0.28, 0), (-0.28, 0), (0.5, 0.6), (-0.5, 0.6), (0.65, 1.4), (-0.65, 1.4),
    (0.6, 2.1), (-0.6, 2.1), (0.3, 2.2), (-0.3, 2.2), (0.32, 3.3), (-0.32, 3.3), (0.33, 4.4), (-0.33, 4.4),
])  # fmt: skip
SHOULDERS = 0.16  # shoulder width over the shorter side of the picture


@dataclass(frozen=True, kw_only=True)
class ParityOptions:
    """The options of a comparison. The command line takes its defaults from here.

    published:  clone of the published repository.
    engine:     engine directory. backend, device: as in Engine.load.
    weights:    folder of id-patch.bin and ControlNetModel/; None: models/ID-Patch in the clone.
    base:       base model, as from_pretrained takes it; None: that of the checkpoint from which the engine was built.
    checkpoint: that one, if it has moved. variant: of the base's weight files; None: without --base, that of the build.
    steps, persons, seed: of the picture. height, width: px, None takes the model's size.
    """

    published: Path
    engine: Path
    weights: Path | None = None
    base: str | None = None
    checkpoint: Path | None = None
    variant: str | None = None
    backend: str = "auto"
    device: str | None = None
    steps: int = 4
    persons: int = 2
    height: int | None = None
    width: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class Row:
    """One compared quantity. rms: relative RMS error of the engine; rms_torch: of the published pipeline in the
    engine's precision, None for float32."""

    name: str
    rms: float
    rms_torch: float | None
    bound: float
    passed: bool


def compare(options: ParityOptions, command: Sequence[str] = ()) -> dict[str, Any]:
    """The comparison, as JSON values. Raises RequestError, CheckpointError, and the errors of the engine."""
    manifest = Manifest.read(options.engine)
    branch = branch_of(manifest.config)
    picture = picture_of(options, manifest, branch)
    weights = options.weights or options.published / "models" / "ID-Patch"
    base, variant = _base(options, manifest)
    with Engine.load(options.engine, options.backend, options.device, networks=()) as engine:
        device, precision = engine.backend.device, engine.backend.precision
    published = {
        each: _published(options.published, weights, base, variant, device, each, picture)
        for each in dict.fromkeys(("float32", precision))
    }
    truth, plain = published["float32"], published.get(precision) if precision != "float32" else None
    with Engine.load(options.engine, options.backend, options.device, cuda_graph=False) as engine:
        own = run_engine(engine, picture, branch)
        fed = run_engine(engine, picture, branch, truth.arrays)
        opened = f"{engine.backend.name} on {engine.backend.device}"
    rows, problems = judge(truth, plain, own, fed), differences(truth, own)
    return {
        "schema": 1,
        "date": now(),
        "commit": commit(),
        "versions": versions(),
        "command": shlex.join(["python", "-m", "benchmarks.parity", *command]),
        "engine": {
            "name": manifest.path.name,
            "seal": sha256(json.dumps(manifest.values["seal"], sort_keys=True).encode()),
            "backend": opened,
            "precision": precision,
        },
        "published": commit(options.published),
        "persons": options.persons,
        "steps": options.steps,
        "tokens": truth.tokens,
        "rows": [asdict(row) for row in rows],
        "problems": problems,
        "passed": not problems and all(row.passed for row in rows),
    }


def picture_of(options: ParityOptions, manifest: Manifest, branch: Branch) -> Picture:
    """The picture of the options: standing persons in a row. Raises RequestError."""
    most = manifest.values["built_for"]["persons"]
    for name, value, least in (("persons", options.persons, 1), ("steps", options.steps, 1), ("seed", options.seed, 0)):
        if value < least:
            raise RequestError(f"--{name} is {value}, expected at least {least}.")
    if options.persons > most:
        raise RequestError(f"--persons is {options.persons}, and this engine was built for {most}.")
    size = {"height": options.height, "width": options.width}
    scene = Scene.of(Options(engine=options.engine, steps=options.steps, seed=options.seed, **size), manifest)
    people, config = scene.persons(options.persons), manifest.config
    noses = GRID_PX * np.rint(np.array([person.at for person in people], np.float64) / GRID_PX)
    bodies = [nose + STANDING * SHOULDERS * min(scene.height, scene.width) for nose in noses]
    drawing = body_drawing(bodies, scene.height, scene.width, branch.style or "")
    assert config.patch_px is not None
    ratio = config.subject_conditioning_ratio
    return Picture(
        prompt=PROMPT,
        negative_prompt=NEGATIVE_PROMPT,
        embeddings=np.array([person.embedding for person in people], np.float32),
        noses=noses,
        drawing=np.rint(drawing * 255).astype(np.uint8).transpose(1, 2, 0),
        latents=scene.latents,
        steps=scene.steps,
        guidance_scale=config.guidance_scale,
        scale=branch.scale,
        ratio=1.0 if ratio is None else ratio,
        patch_px=config.patch_px,
    )


def judge(truth: Reading, plain: Reading | None, own: Reading, fed: Reading) -> list[Row]:
    """Every quantity of the published pipeline in float32, beside the engine's.

    plain: the published pipeline in the engine's half precision, None for float32. own, fed: the engine, by itself and
           fed. A quantity that the engine or `plain` lacks, or has in another shape, did not pass.
    """

    def row(name: str, mine: Reading, label: str) -> Row:
        rms = error_of(mine.arrays.get(name), truth.arrays[name])
        rms_torch = None if plain is None else error_of(plain.arrays.get(name), truth.arrays[name])
        bound = BOUND if rms_torch is None else TIMES_TORCH * rms_torch
        return Row(label, rms, rms_torch, bound, math.isfinite(bound) and rms <= bound)

    names = sorted(truth.arrays, key=lambda name: (name == LATENTS, name))
    return [*(row(name, own, name) for name in names), row(LATENTS, fed, FED)]


def error_of(array: Any, exact: Any) -> float:
    """Relative RMS; infinite for an array that is missing, of another shape, or not finite."""
    if array is None or array.shape != exact.shape:
        return math.inf
    error = relative_rms(array, exact)
    return error if math.isfinite(error) else math.inf


def differences(truth: Reading, own: Reading) -> list[str]:
    """What the two sides do in other steps, in sentences."""
    found = []
    if truth.timesteps != own.timesteps:
        found.append(
            f"the published pipeline takes the timesteps {_listed(truth.timesteps)}, the engine "
            f"{_listed(own.timesteps)}. Their schedules differ: give the base model from which the engine was built."
        )
    if truth.tokens != own.tokens:
        found.append(
            f"the UNet of the published pipeline reads {_listed(truth.tokens)} tokens step by step, that of the engine "
            f"{_listed(own.tokens)}."
        )
    return found


def table(result: Mapping[str, Any]) -> list[str]:
    """The result, as text for people."""
    engine = result["engine"]
    half = any(row["rms_torch"] is not None for row in result["rows"])
    width = max(len(row["name"]) for row in result["rows"])
    lines = [
        f"{engine['name']} ({engine['backend']}, {engine['precision']}) beside the published ID-Patch in float32: "
        f"{result['persons']} person{'' if result['persons'] == 1 else 's'}, {result['steps']} steps",
        f"{'relative RMS':<{width}}  {'engine':>9}" + (f"  {'torch':>9}" if half else "") + f"  {'at most':>9}",
    ]
    for row in result["rows"]:
        torch = f"  {row['rms_torch']:>9.1e}" if half else ""
        verdict = "pass" if row["passed"] else "FAIL"
        lines.append(f"{row['name']:<{width}}  {row['rms']:>9.1e}{torch}  {row['bound']:>9.1e}  {verdict}")
    lines += [f"FAIL: {problem}" for problem in result["problems"]]
    return [
        *lines,
        "the engine is the published model" if result["passed"] else "the engine is NOT the published model",
    ]


def branch_of(config: RealisIDConfig) -> Branch:
    """The one branch of an engine of ID-Patch. Raises RequestError for another engine."""
    shown = [branch for branch in config.table if branch.condition == "id_patches"]
    if (
        len(config.table) != 1
        or not shown
        or config.unet_tokens != "text_and_id"
        or config.id_guidance_scale is not None
    ):
        names = ", ".join(branch.name for branch in config.table)
        raise RequestError(
            f"this engine is not ID-Patch as published (its branches: {names}). Expected one branch that is shown ID "
            "patches, a UNet that reads the text and the IDs, and two-way guidance. Build one: python -m export.adopt "
            "idpatch …"
        )
    return shown[0]


def _base(options: ParityOptions, manifest: Manifest) -> tuple[str, str | None]:
    """The base model, as from_pretrained takes it, and its variant. Raises RequestError if it is not known."""
    if options.base is not None:
        return options.base, options.variant
    from export.building.origins import recall
    from export.checkpoint import Checkpoint

    origin: dict[str, Any] = recall(manifest.values)
    if options.checkpoint is not None:
        origin["path"] = options.checkpoint
    if options.variant is not None:
        origin["variant"] = options.variant
    if "path" not in origin:
        raise RequestError(
            f"the checkpoint of {manifest.path} is not known on this machine, so its base model is not either. Give "
            "--base DIR, or --checkpoint CKPT."
        )
    try:
        checkpoint = Checkpoint.open(**origin)
    except CheckpointError as error:
        raise RequestError(f"the base model is not known: {error} Or give --base DIR.") from error
    return str(checkpoint.base or checkpoint.path), origin.get("variant")


def _published(
    clone: Path, weights: Path, base: str, variant: str | None, device: str, precision: str, picture: Picture
) -> Reading:
    from .torch_device import beside, settings

    with settings(available_cores(), precision):
        return run_published(clone, weights, base, variant, str(beside(device)), precision, picture)


def _listed(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def parser() -> argparse.ArgumentParser:
    line = argparse.ArgumentParser(
        prog="python -m benchmarks.parity",
        description="Compare an engine of ID-Patch with the published repository, number by number.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""The clone's code runs in this process. On a GPU the published pipeline needs about 22 GB in float32.
examples:
  python -m benchmarks.parity --published ID-Patch --engine engines/idpatch
  python -m benchmarks.parity --published ID-Patch --engine engines/idpatch --weights WEIGHTS --base SDXL""",
    )
    words = {
        "published": "clone of the published repository",
        "engine": "engine directory",
        "weights": "folder of id-patch.bin and ControlNetModel/ (default: models/ID-Patch in the clone)",
        "base": "base model (default: that of the engine's checkpoint)",
        "checkpoint": "the folder the engine was built from, if that has moved",
        "variant": "of the base's weight files, such as fp16 (without --base, that of the build)",
        "backend": "default %(default)s",
        "device": "default: as the engine is loaded",
        "steps": "denoising steps, default %(default)s",
        "persons": "default %(default)s",
        "height": "of the picture (default: the model's)",
        "width": "of the picture (default: the model's)",
        "seed": "default %(default)s",
    }
    flags = flags_of(
        ParityOptions, words,
        published={"metavar": "CLONE"}, engine={"metavar": "DIR"}, weights={"metavar": "DIR"},
        base={"metavar": "DIR|ID"}, checkpoint={"metavar": "DIR"}, height={"metavar": "PX"}, width={"metavar": "PX"},
    )  # fmt: skip
    for flag, arguments in flags:
        line.add_argument(flag, **arguments)
    line.add_argument("--json", action="store_true", help="the last line of stdout is one JSON object")
    return line


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    given: dict[str, Any] = vars(parser().parse_args(arguments))
    as_json = given.pop("json")

    def command() -> Outcome:
        result = compare(ParityOptions(**given), arguments)
        return Outcome(result, table(result), int(not result["passed"]))

    return run(command, as_json)


if __name__ == "__main__":
    sys.exit(execute(main))
