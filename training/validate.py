"""python -m training.validate: the loss of finished trainings on examples that they did not see, example by example.

All get the same noise, timesteps and drops, so that a difference of two is far more exact than either loss. Losses are
listed by the size of the smallest face, and with --noise-levels by the amount of noise.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from safetensors.torch import load_file
from tqdm import tqdm

from export.checkpoint import Checkpoint
from export.files import disk_errors, write_json
from realisid_trt.commands.command_line import Outcome, execute, run
from realisid_trt.errors import RequestError
from realisid_trt.files import file_sha256

from .diffusion import Diffusion
from .evaluation.tables import listed
from .processes import accelerator_of
from .result import ORIGIN, trained_for
from .stages import STAGES, Stage
from .statistics import Sample, estimate
from .store import Store

ALL = "all"
FACES = {"faces under 1/6": (0.0, 1 / 6), "of 1/6 to 1/4": (1 / 6, 1 / 4), "of 1/4 and more": (1 / 4, np.inf)}
Losses = dict[str, NDArray[np.float64]]
Chosen = NDArray[np.bool_]


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 1 failed, 2 bad usage."""
    given = _parser().parse_args(arguments)
    return run(lambda: _validate(given), given.json)


def _validate(given: argparse.Namespace) -> Outcome:
    for flag in ("examples", "draws", "noise_levels"):
        if getattr(given, flag) < 1:
            raise RequestError(f"--{flag.replace('_', '-')} is {getattr(given, flag)}, expected at least 1.")
    folders, store = [Path(folder) for folder in given.run], Store(given.data)
    origins = [_origin(folder) for folder in folders]
    base = {"base_model": given.base_model, "variant": given.variant}
    start, accelerator = _start(folders, origins, base), accelerator_of(cpu=given.cpu)
    count = min(given.examples, len(store))
    groups: dict[str, Chosen] = {}
    first: Losses = {}
    runs: dict[str, Any] = {}
    for folder, origin in zip(folders, origins, strict=True):
        checkpoint = _checkpoint(folder, base)
        stage = _trained(folder, origin, checkpoint or start, store.first(count), accelerator, new=checkpoint is None)
        if given.noise_levels > 1 and "timestep" not in stage.item(0, np.random.default_rng(given.seed)):
            raise RequestError(f"{folder}: {stage.name} trains without noise. Leave --noise-levels out.")
        found, timesteps = losses(stage, count, given.draws, given.seed, str(folder), accelerator.device)
        groups = groups or _groups(store, stage, timesteps, given.noise_levels)
        first = first or found
        if set(found) != set(first):
            raise RequestError(f"{folder} has the losses {', '.join(found)}, {folders[0]} {', '.join(first)}.")
        runs[str(folder)] = {
            "stage": origin["stage"],
            "steps": origin["steps"],
            "seen": origin["examples"] == store.description,
            "losses": {name: _estimates(found, chosen) for name, chosen in groups.items()},
        }
        if folder != folders[0]:
            minus = {name: found[name] - first[name] for name in found}
            runs[str(folder)]["minus the first"] = {name: _estimates(minus, chosen) for name, chosen in groups.items()}
    values = {
        "examples": count, "of": store.description, "draws": given.draws, "seed": given.seed,
        "groups": {name: int(chosen.any(1).sum()) for name, chosen in groups.items()}, "runs": runs,
    }  # fmt: skip
    if given.out is not None:
        with disk_errors(out := Path(given.out)):
            out.parent.mkdir(parents=True, exist_ok=True)
            write_json(out, values)
    return Outcome(values, _lines(values))


def losses(
    stage: Stage, count: int, draws: int, seed: int, name: str, device: torch.device
) -> tuple[Losses, NDArray[np.int64]]:
    """Name → (count, draws) losses of the first `count` examples, each with that many noises, timesteps and drops.

    Also returns the (count, draws) timesteps, -1 for a stage that has none.
    """
    found: dict[str, list[float]] = {}
    timesteps = []
    with torch.inference_mode(), tqdm(total=count * draws, desc=name, file=sys.stderr) as bar:
        for place in range(count * draws):
            rng = np.random.Generator(np.random.Philox(key=[seed, place]))
            item = stage.item(place // draws, rng)
            batch = {key: part[None].to(device) for key, part in item.items()}
            for key, value in stage.validation_losses(batch).items():
                found.setdefault(key, []).append(float(value))
            timesteps.append(int(item.get("timestep", -1)))
            bar.update()
    arrays = {key: np.array(values).reshape(count, draws) for key, values in found.items()}
    return arrays, np.array(timesteps).reshape(count, draws)


def _origin(folder: Path) -> dict[str, Any]:
    """The origin of a run's weights. Raises RequestError if the run is not finished, or has no loss per example."""
    try:
        origin: dict[str, Any] = json.loads((folder / ORIGIN).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RequestError(
            f"{folder} holds no weights of a training ({error}). Finish it, or write those of its last state: "
            "python -m training.train … --no-further."
        ) from error
    where = folder / "checkpoint" if (folder / "checkpoint").is_dir() else folder / "weights"
    for name, key in origin["written"].items():
        file = next(iter(sorted(where.glob(f"{name}/*.safetensors"))), where / f"{name}.safetensors")
        if not file.is_file() or file_sha256(file) != key:
            raise RequestError(
                f"{file} is missing, or not what this training wrote. Write it again from the last state: python -m "
                "training.train … --no-further."
            )
    if not STAGES[origin["stage"]].whole_batch:
        raise RequestError(
            f"{folder}: {origin['stage']} compares examples with each other, so no example has a loss of its own."
        )
    return origin


def _checkpoint(folder: Path, base: Mapping[str, Any]) -> Checkpoint | None:
    """The checkpoint that a run left; None if its weights are not part of a checkpoint."""
    path = folder / "checkpoint"
    return Checkpoint.open(path, **base) if path.is_dir() else None


def _start(folders: Sequence[Path], origins: Sequence[Mapping[str, Any]], base: Mapping[str, Any]) -> Checkpoint:
    """A checkpoint that one of the runs left, for the parts that other runs read and did not train."""
    start = next((found for folder in folders if (found := _checkpoint(folder, base))), None)
    if start is None:
        raise RequestError(f"none of {', '.join(map(str, folders))} left a checkpoint. Add the --run of one that did.")
    for other, origin in zip(folders, origins, strict=True):
        trained = set(STAGES[origin["stage"]].writes) | set(origin["written"])
        read = {name: key for name, key in origin["weights"].items() if name not in trained}
        if wrong := [name for name, key in read.items() if start.weights_key(name) != key]:
            raise RequestError(f"{other} was trained on another {', '.join(wrong)} than {start.path} holds.")
        asked, config = origin["config"] or {}, trained_for(start)
        if wrong := sorted(key for key, value in asked.items() if config.get(key) != value):
            raise RequestError(f"{other} was trained for another {', '.join(wrong)} than {start.path} says.")
    return start


def _trained(
    folder: Path, origin: Mapping[str, Any], start: Checkpoint, store: Store, accelerator: Accelerator, new: bool
) -> Stage:
    """The stage of a run with the weights that it left: those of `start`, or with `new` those beside it."""
    stage = STAGES[origin["stage"]](start, store, accelerator, new=new, seed=0)
    if new:
        for name, module in stage.trained().items():
            module.load_state_dict(load_file(folder / "weights" / f"{name}.safetensors"))
    for module in (stage, *stage.frozen):
        module.to(accelerator.device)
    return stage.eval()


def _groups(store: Store, stage: Stage, timesteps: NDArray[np.int64], levels: int) -> dict[str, Chosen]:
    """Name → mask (count, draws): all, by size of face, and each of these by level of noise; without empty groups."""
    count, draws = timesteps.shape
    sizes = {ALL: np.full(count, True), **_by_face(store, count)}
    groups = {name: np.repeat(chosen[:, None], draws, 1) for name, chosen in sizes.items()}
    if levels > 1:
        ends = np.linspace(0, len(Diffusion(stage.checkpoint).alphas), levels + 1).round().astype(int)
        groups |= {
            f"{name}, t {low} to {high - 1}": chosen & (timesteps >= low) & (timesteps < high)
            for name, chosen in groups.items()
            for low, high in itertools.pairwise(ends)
        }
    return {name: chosen for name, chosen in groups.items() if chosen.any()}


def _by_face(store: Store, count: int) -> dict[str, Chosen]:
    """Name of a size → (count,) whether an example's smallest face has it, over the picture's side."""
    if "boxes" not in store.arrays:
        return {}
    boxes = np.asarray(store["boxes"][:count], np.float64)
    there = np.arange(boxes.shape[1]) < np.asarray(store["num_persons"][:count])[:, None]
    sides = np.maximum(boxes[..., 2] - boxes[..., 0], boxes[..., 3] - boxes[..., 1]) / min(store["rgb"].shape[1:3])
    least = np.where(there, sides, np.inf).min(1)
    return {name: (least >= low) & (least < high) for name, (low, high) in FACES.items()}


def _estimates(found: Losses, chosen: Chosen) -> dict[str, list[float | None] | None]:
    """Means with their 95 % intervals, over examples."""
    names = chosen.nonzero()[0]
    return {key: listed(estimate(Sample(values[chosen], names, names))) for key, values in found.items()}


def _lines(values: Mapping[str, Any]) -> list[str]:
    lines = []
    for run_name, trained in values["runs"].items():
        seen = ", on the examples that it was trained on" if trained["seen"] else ""
        lines += ["", f"{run_name}: {trained['stage']}, {trained['steps']} steps{seen}"]
        for title, groups in (("", trained["losses"]), (", minus the first", trained.get("minus the first", {}))):
            for group, means in groups.items():
                said = ", ".join(f"{key} {_said(value)}" for key, value in means.items())
                lines.append(f"  {group} ({values['groups'][group]}){title}: {said}")
    return lines


def _said(value: Sequence[float] | None) -> str:
    if value is None:
        return ""
    mean, low, high = value
    return f"{mean:.5f}" if low is None else f"{mean:.5f} [{low:.5f}, {high:.5f}]"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m training.validate",
        description="The losses of finished trainings on examples that they did not see.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""examples:
  python -m training.validate --run runs/mine --data held-out
  python -m training.validate --run runs/mine --run runs/other --data held-out --noise-levels 5 --out losses.json""",
    )
    add = parser.add_argument
    add("--run", action="append", required=True, metavar="RUN", help="folder of a finished training; may be repeated: "
        "then the differences from the first are listed too")  # fmt: skip
    add("--data", required=True, metavar="DIR", help="examples, as training.prepare makes them")
    add("--base-model", metavar="MODEL", help="as given to the trainings")
    add("--variant", help="as given to the trainings")
    add("--examples", type=int, default=1000, help="number of examples, from the first on (default %(default)s)")
    add("--draws", type=int, default=4, help="draws of noise and timestep per example (default %(default)s)")
    add("--noise-levels", type=int, default=1, metavar="N", help="list losses by that many ranges of the timestep "
        "(default %(default)s)")  # fmt: skip
    add("--seed", type=int, default=0, help="of noise, timesteps and drops (default %(default)s)")
    add("--out", metavar="FILE", help="JSON file to write")
    add("--cpu", action="store_true", help="on the CPU, even where there is a GPU")
    add("--json", action="store_true", help="the last line of stdout is one JSON object")
    return parser


if __name__ == "__main__":
    sys.exit(execute(main))
