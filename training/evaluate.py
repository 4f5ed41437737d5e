"""python -m training.evaluate: the tables, over an engine.

Pictures and what the judges say of them are kept in --cache, row by row: a run that was stopped goes on where it stood.
"""

from __future__ import annotations

import argparse
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
from .evaluation.experiments import CEILING, EXPERIMENTS, Experiment, Row
from .evaluation.measures import Judgement, Judges
from .evaluation.sampler import Sampler
from .evaluation.statistics import Estimate, difference, estimate, frechet, frechet_difference, ratio

MEASURES = ("similarity", "rank1", "iou", "landmarks", "mouth", "brow", "harmony", "neck", "shirt", "place", "text")
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
    lines: list[str] = []
    tables = {}
    for name in names:
        cases = EXPERIMENTS[name].cases(casting, given.pictures * EXPERIMENTS[name].times)
        rows: dict[str, Judgement] = {}
        for row_name, row in EXPERIMENTS[name].rows.items():
            if row.maker not in ("engine", "truth", "ceiling") and not _weights(given.runs, row.maker).is_file():
                lines.append(f"{name}: {row_name} is left out, {_weights(given.runs, row.maker)} is missing.")
                continue
            rows[row_name] = _row(given, checkpoint, judges, cases, f"{name}: {row_name}", row)
        tables[name] = summary(EXPERIMENTS[name], rows, len(cases))
        with disk_errors(Path(given.out)):
            Path(given.out).mkdir(parents=True, exist_ok=True)
            write_json(Path(given.out) / f"{name}.json", tables[name])
        lines += ["", *markdown(tables[name])]
    return Outcome({"tables": tables}, lines)


def _row(
    given: argparse.Namespace, checkpoint: Checkpoint, judges: Judges, cases: list[Case], name: str, row: Row
) -> Judgement:
    """What the judges say of one row's pictures; both are made only once."""
    said = {"maker": row.maker, "options": dict(row.options), "config": dict(row.config), "steps": given.steps,
            "cases": [_digest(case) for case in cases]}  # fmt: skip
    if row.maker == "engine":
        said["backend"] = given.backend
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
        with load_engine(Path(given.engine), given.backend, row.config) as engine:
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


def summary(experiment: Experiment, rows: dict[str, Judgement], pictures: int) -> dict[str, Any]:
    """Means with 95 % intervals, the paired difference of every row with the one that it is compared with."""
    told: dict[str, Any] = {}
    base, ceiling = rows.get(experiment.against), rows.get(CEILING)
    for name, row in rows.items():
        people = row.values["identity"]
        means = {measure: _list(estimate(row.values[measure], people)) for measure in MEASURES}
        told[name] = {"means": means, "persons": len(people)}
        if ceiling is not None:
            told[name]["rank1 over the ceiling's"] = _list(
                ratio(row.values["rank1"], ceiling.values["rank1"], people)
            )  # fmt: skip
            told[name]["similarity over the ceiling's"] = _list(
                ratio(row.values["similarity"], ceiling.values["similarity"], people)
            )  # fmt: skip
            if row is not ceiling:
                told[name]["frechet"] = frechet(row.features, ceiling.features)
        if base is not None and row is not base:
            told[name]["minus " + experiment.against] = {
                measure: _list(difference(row.values[measure], base.values[measure], people)) for measure in MEASURES
            }
            if ceiling is not None and row is not ceiling:
                gain = frechet_difference(row.features, base.features, ceiling.features)
                told[name]["minus " + experiment.against]["frechet"] = _list(gain)
    return {"title": experiment.title, "pictures": pictures, "rows": told}


def markdown(table: dict[str, Any]) -> list[str]:
    """A table for people: means, and what stands in brackets is the half width of the 95 % interval."""
    heads = [
        "",
        "identity (cosine)",
        "rank 1 of 9",
        "of ceiling",
        "box IoU",
        "landmark error",
        "harmony",
        "text",
    ]
    lines = [f"**{table['title']}**, {table['pictures']} pictures", "", "| " + " | ".join(heads) + " |",
             "|" + "---|" * len(heads)]  # fmt: skip
    for name, row in table["rows"].items():
        means = row["means"]
        of_ceiling = row.get("rank1 over the ceiling's")
        cells = [
            means["similarity"],
            means["rank1"],
            of_ceiling,
            means["iou"],
            means["landmarks"],
            means["harmony"],
            means["text"],
        ]
        lines.append(f"| {name} | " + " | ".join("" if cell is None else _cell(cell) for cell in cells) + " |")
    return lines


def _list(found: Estimate) -> list[float] | None:
    values = (found.mean, found.low, found.high)
    return None if not np.isfinite(values).all() else [round(value, 5) for value in values]


def _cell(values: Sequence[float]) -> str:
    mean, low, high = values
    return f"{mean:.3f} (±{(high - low) / 2:.3f})"


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
    add("--cache", default="out/evaluation", metavar="DIR", help="pictures already made (default %(default)s)")
    add("--out", default=str(RESULTS), metavar="DIR", help="tables as JSON (default: training/results)")
    add("--json", action="store_true", help="the last line of stdout is one JSON object")
    return parser


if __name__ == "__main__":
    sys.exit(main())
