"""python -m training.evaluate: the evaluation tables of an engine, and the figures behind each table.

Pictures are kept in --cache, a hundred to a file: a stopped run continues where it stopped.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from export.checkpoint import Checkpoint
from export.files import disk_errors, write_json
from realisid_trt.commands.command_line import Outcome, execute, reporter, run
from realisid_trt.errors import RequestError

from .evaluation.cases import Casting
from .evaluation.experiments import EXPERIMENTS, STEPS
from .evaluation.figures import write_figures
from .evaluation.measures import Judges
from .evaluation.picture_cache import EvaluationOptions, PictureCache
from .evaluation.report import markdown, write_report
from .evaluation.tables import BETWEEN, Judged, between, levels, table

JUDGES_FOLDER = Path(__file__).parent / "judges" / "weights"
LEAST_PICTURES = 2  # the covariance of features needs two


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 1 failed, 2 bad usage."""
    given = _parser().parse_args(arguments)
    return run(lambda: _evaluate(given), given.json)


def _evaluate(given: argparse.Namespace) -> Outcome:
    for flag, least in (("pictures", LEAST_PICTURES), ("batch", 1), ("steps", 1)):
        value = getattr(given, flag)
        if value < least:
            raise RequestError(f"--{flag} is {value}, expected at least {least}.")
    c, out = Checkpoint.open(given.checkpoint), Path(given.out)
    casting = Casting(
        size_px=c.sample_size * c.vae_scale_factor, grid_px=c.config.box_snap or c.vae_scale_factor,
        crop_px=c.image_size, margin=c.config.face_margin,
    )  # fmt: skip
    options = EvaluationOptions(
        engine=Path(given.engine), checkpoint=c, backend=given.backend, device=given.device, steps=given.steps,
        batch=given.batch, runs=Path(given.runs), cache=Path(given.cache),
    )  # fmt: skip
    picture_cache = PictureCache(options, casting)
    judges = Judges(Path(given.judges), casting, picture_cache.torch_device)
    plan = _plan(picture_cache, given.experiment, reporter(given.json))
    judged, tables = dict[str, Judged](), dict[str, Any]()
    for name, left_out in plan.items():
        experiment = EXPERIMENTS[name]
        cases = experiment.cases(casting, given.pictures * experiment.times)
        pictures = {
            title: picture_cache.pictures(cases, row, f"{name}: {title}")
            for title, row in experiment.rows.items()
            if title not in left_out
        }
        judged[name] = {title: judges.judge(cases, made) for title, made in pictures.items()}
        others = judges.features(np.stack([casting.retake(case).rgb for case in cases]))
        tables[name] = table(experiment, judged[name], len(cases), others) | {"left_out": left_out}
        if experiment.alike:
            tables[name]["levels"] = levels(pictures, experiment.against)
        _write(out, name, tables[name] | {"made": picture_cache.made})
        with disk_errors(out):
            write_figures(out / f"{name}.npz", judged[name])
    found = between(judged)
    for name in BETWEEN:  # the file of an earlier run does not belong to these tables
        if name in found:
            tables[name] = found[name]
            _write(out, name, found[name] | {"made": picture_cache.made})
        elif any(part in judged for part in BETWEEN[name][1:]):
            (out / f"{name}.json").unlink(missing_ok=True)
    with disk_errors(out):
        write_report(out)
    lines = [line for name in judged for line in ("", *markdown(tables[name]))]
    return Outcome({"tables": tables}, [*lines, "", f"{out / 'README.md'}: all tables, with plots"])


def _plan(picture_cache: PictureCache, names: Sequence[str] | None, report: Any) -> dict[str, dict[str, str]]:
    """Experiment → its rows that cannot be made here, with the reason."""
    plan = {}
    for name in names or EXPERIMENTS:
        plan[name] = {title: why for title, row in EXPERIMENTS[name].rows.items() if (why := picture_cache.cannot(row))}
        for title, why in plan[name].items():
            report(f"{name}: {title} is left out, {why}.")
    return plan


def _write(out: Path, name: str, values: dict[str, Any]) -> None:
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / f"{name}.json", values)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m training.evaluate",
        description="The paper's evaluation in small: identity, location, pose and expression, text, harmony.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""examples:
  python -m training.evaluate --engine engines/miniature --checkpoint checkpoints/miniature
  python -m training.evaluate --engine engines/mine --checkpoint CKPT --experiment delay --pictures 80
CKPT: a checkpoint trained on the drawn world, as the judges were.""",
    )
    add = parser.add_argument
    add("--engine", required=True, metavar="DIR", help="the engine that makes the pictures")
    add(
        "--checkpoint",
        required=True,
        metavar="CKPT",
        help="checkpoint of the engine; gives the VAE and the baselines' base",
    )
    add("--judges", default=str(JUDGES_FOLDER), metavar="DIR", help="weights of the judges (default: ours)")
    add("--runs", default="out/training", metavar="DIR", help="folder of the baselines' runs (default %(default)s)")
    add("--experiment", action="append", choices=EXPERIMENTS, help="only this experiment; may be repeated")
    add("--pictures", type=int, default=400, help="pictures per row (default %(default)s)")
    add("--steps", type=int, default=STEPS, help="denoising steps of rows that name none (default %(default)s)")
    add("--batch", type=int, default=4, help="pictures that the engine makes at once (default %(default)s)")
    add("--backend", default="auto", help="of the engine (default %(default)s)")
    add("--device", help="of the engine: cpu, cuda, cuda:1 (default: a GPU if it was built for one that is here)")
    add("--cache", default="out/evaluation", metavar="DIR", help="folder of finished pictures (default %(default)s)")
    add("--out", default="out/tables", metavar="DIR", help="tables, page and plots (default %(default)s)")
    add("--json", action="store_true", help="the last line of stdout is one JSON object")
    return parser


if __name__ == "__main__":
    sys.exit(execute(main))
