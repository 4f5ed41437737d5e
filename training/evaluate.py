"""python -m training.evaluate: the tables, over an engine.

Pictures and what the judges say of them are kept in --cache, row by row: a run that was stopped goes on where it stood.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from export.checkpoint import Checkpoint
from export.files import disk_errors, write_json
from realisid_trt.command_line import Outcome, run
from realisid_trt.errors import RequestError
from realisid_trt.files import sha256, whole_or_not
from realisid_trt.manifest import Manifest

from .evaluation.cases import Case, Casting
from .evaluation.contenders import Contender, EngineContender, Truth, load_engine
from .evaluation.experiments import EXPERIMENTS, Row
from .evaluation.measures import Judgement, Judges
from .evaluation.report import markdown, write_report
from .evaluation.sampler import Sampler
from .evaluation.tables import Judged, between, table

JUDGES_FOLDER = Path(__file__).parent / "judges" / "weights"
RESULTS = Path(__file__).parent / "results"


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 1 failed, 2 bad usage."""
    given = _parser().parse_args(arguments)
    return run(lambda: _evaluate(given), given.json)


def _evaluate(given: argparse.Namespace) -> Outcome:
    if given.pictures < 1 or given.batch < 1:
        raise RequestError(f"--pictures is {given.pictures}, --batch {given.batch}; expected at least 1 of each.")
    checkpoint = Checkpoint.open(given.checkpoint)
    built = Manifest.read(given.engine).values["checkpoint"]
    if other := sorted(name for name in checkpoint.components if built.get(name) != checkpoint.weights_key(name)):
        raise RequestError(
            f"{given.engine} was built from another checkpoint than {given.checkpoint}: {', '.join(other)}."
        )
    side = checkpoint.sample_size * checkpoint.vae_scale_factor
    casting = Casting(size_px=side, crop_px=checkpoint.image_size, margin=checkpoint.config.face_margin)
    judges = Judges(Path(given.judges), casting)
    names = given.experiment or list(EXPERIMENTS)
    out, lines, judged = Path(given.out), list[str](), dict[str, Judged]()
    on_gpu, made, tables = _on_gpu(given), _made(given, checkpoint), dict[str, Any]()
    for name in names:
        able = {}
        for row_name, row in EXPERIMENTS[name].rows.items():
            if why := _cannot(row, given, on_gpu):
                lines.append(f"{name}: {row_name} is left out, {why}.")
            else:
                able[row_name] = row
        if len(able) < 2:
            continue
        cases = EXPERIMENTS[name].cases(casting, given.pictures * EXPERIMENTS[name].times)
        rows = {
            row_name: _row(given, checkpoint, judges, cases, f"{name}: {row_name}", row)
            for row_name, row in able.items()
        }
        judged[name], tables[name] = rows, table(EXPERIMENTS[name], rows, len(cases))
        lines += ["", *markdown(tables[name])]
        _write(out, name, {**tables[name], "made": made})
    for name, found in between(judged).items():
        tables[name] = found
        _write(out, name, {**found, "made": made})
    if tables:
        with disk_errors(out):
            write_report(out)
    return Outcome({"tables": tables}, lines)


def _write(out: Path, name: str, values: dict[str, Any]) -> None:
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / f"{name}.json", values)


def _cannot(row: Row, given: argparse.Namespace, on_gpu: bool) -> str:
    """Why nobody can make this row's pictures here; empty if somebody can."""
    if row.maker not in ("engine", "truth", "ceiling") and not _weights(given.runs, row.maker).is_file():
        return f"{_weights(given.runs, row.maker)} is missing"
    return "no GPU runs the engine, so it is what the others are" if row.device is not None and not on_gpu else ""


def _on_gpu(given: argparse.Namespace) -> bool:
    """Whether the engine runs on a GPU here. Raises what `Engine.load` does."""
    with load_engine(Path(given.engine), given.backend, given.device, {}) as engine:
        return engine.backend.device.startswith("cuda")


def _made(given: argparse.Namespace, checkpoint: Checkpoint) -> dict[str, Any]:
    """How the pictures of the tables came about: without it a figure says little."""
    config = checkpoint.config
    return {
        "steps": given.steps or config.num_inference_steps,
        "guidance_scale": config.guidance_scale,
        "id_guidance_scale": config.id_guidance_scale,
        "subject_conditioning_ratio": config.subject_conditioning_ratio,
        "backend": given.backend,
        "device": given.device,
        "weights": {name: checkpoint.weights_key(name)[:16] for name in checkpoint.components},
        "versions": {
            package.metadata["Name"]: package.version
            for name in ("onnxruntime", "onnxruntime-gpu", "tensorrt", "torch", "numpy")
            for package in importlib.metadata.distributions(name=name)
        },
    }


def _row(
    given: argparse.Namespace, checkpoint: Checkpoint, judges: Judges, cases: list[Case], name: str, row: Row
) -> Judgement:
    """What the judges say of one row's pictures; both are made only once."""
    said = {"maker": row.maker, "options": dict(row.options), "config": dict(row.config), "steps": given.steps,
            "cases": [_digest(case) for case in cases]}  # fmt: skip
    if row.maker == "engine":
        said["backend"], said["device"] = given.backend, row.device or given.device
        said["engine"] = sha256((Path(given.engine) / "manifest.json").read_bytes())
    else:
        said["weights"] = {part: checkpoint.weights_key(part) for part in checkpoint.components}
        if row.maker not in ("truth", "ceiling"):
            said["design"] = sha256(_weights(given.runs, row.maker).read_bytes())
    path = Path(given.cache) / f"{sha256(json.dumps(said, sort_keys=True).encode())[:24]}.npy"
    if not path.is_file():
        with disk_errors(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
            with _contender(given, checkpoint, row) as contender:
                made = contender.make(cases, name)
            with whole_or_not(path) as partial, partial.open("wb") as file:
                np.save(file, made)
    return judges.judge(cases, np.load(path))


@contextmanager
def _contender(given: argparse.Namespace, checkpoint: Checkpoint, row: Row) -> Iterator[Contender]:
    if row.maker == "truth":
        yield Truth()
    elif row.maker == "ceiling":
        yield Truth(checkpoint)
    elif row.maker == "engine":
        with load_engine(Path(given.engine), given.backend, row.device or given.device, row.config) as engine:
            yield EngineContender(engine, given.steps, given.batch, row.options)
    else:
        yield Sampler.of_run(checkpoint, _weights(given.runs, row.maker), steps=given.steps, **row.options)


def _digest(case: Case) -> str:
    """Of all that a picture hangs on, and of the truth that it is compared with."""
    arrays = (case.picture.rgb, case.picture.landmarks, case.picture.boxes, *case.crops)
    said = f"{case.seed} {case.identities} {case.scene.caption}".encode()
    return sha256(said + b"".join(np.ascontiguousarray(array).tobytes() for array in arrays))


def _weights(runs: str, design: str) -> Path:
    return Path(runs) / f"branches-{design}" / "weights" / f"{design}.safetensors"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m training.evaluate",
        description="The paper's evaluation in small: identity, location, pose and expression, text, harmony.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""examples:
  python -m training.evaluate --engine engines/miniature --checkpoint checkpoints/miniature
  python -m training.evaluate --engine engines/mine --checkpoint checkpoints/mine --experiment delay --pictures 80""",
    )
    add = parser.add_argument
    add("--engine", required=True, metavar="DIR", help="the engine that makes the pictures")
    add(
        "--checkpoint",
        required=True,
        metavar="CKPT",
        help="what it was built from: the VAE, the baselines' base",
    )
    add("--judges", default=str(JUDGES_FOLDER), metavar="DIR", help="their weights (default: ours)")
    add("--runs", default="out/training", metavar="DIR", help="where the baselines' runs are (default %(default)s)")
    add("--experiment", action="append", choices=EXPERIMENTS, help="only this one; may be repeated")
    add("--pictures", type=int, default=400, help="per row (default %(default)s)")
    add("--steps", type=int, help="of the sampler (default: the checkpoint's)")
    add("--batch", type=int, default=4, help="pictures that the engine makes at once (default %(default)s)")
    add("--backend", default="auto", help="of the engine (default %(default)s)")
    add("--device", help="of the engine: cpu, cuda, cuda:1 (default: a GPU if it was built for one that is here)")
    add("--cache", default="out/evaluation", metavar="DIR", help="pictures already made (default %(default)s)")
    add("--out", default=str(RESULTS), metavar="DIR", help="tables as JSON (default: training/results)")
    add("--json", action="store_true", help="the last line of stdout is one JSON object")
    return parser


if __name__ == "__main__":
    sys.exit(main())
