"""python -m training.recipe: the miniature's training, one command per step.

    vae ─► vae-faces ─► base ─► id-encoder ─► branches ─► branches-together
    ─► branches-three ─► branches-three-again

Other steps: the judges, which begin with new weights, and the baselines of the branches, which begin as the
branches do.
A step takes the checkpoint of the one before it, makes its examples if they are missing, and leaves a checkpoint.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState

from export.checkpoint import Checkpoint
from export.miniature import make_checkpoint
from realisid_trt.commands.command_line import Outcome, execute, run
from realisid_trt.errors import RequestError

from .examples import WorldFaces, WorldScenes
from .log import read_log
from .loop import EVERY_STEP, Learner, TrainingOptions
from .processes import WAIT_IN_STEP, accelerator_of, main_first
from .sequence import batches
from .stages import STAGES
from .store import Examples, OnDemandStore, store_of
from .train import main as train

# losses by step of the recipe: the first ones of the shipped weights, all of the compared designs
LOSSES = Path(__file__).parent / "results" / "losses"
SHIPPED = "checkpoints/miniature"
START: dict[str, Any] = {
    "preset": "world", "prediction": "v_prediction", "face_margin": 1.5,
    # defaults of a request; no training reads them
    "guidance_scale": 3.0, "id_guidance_scale": 3.0, "sampler": "unipc", "num_inference_steps": 8,
    "subject_conditioning_ratio": 1.0,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Step:
    """One training. after: the step whose checkpoint it begins with, None the untrained one; data: a key of DATA."""

    name: str
    stage: str
    after: str | None
    data: str
    options: TrainingOptions
    new: bool = True


DATA: dict[str, Examples] = {
    "scenes": WorldScenes(pictures=80_000),
    "portraits": WorldScenes(pictures=60_000, persons=(1,), crop_px=64, first=1_000_000),
    "groups": WorldScenes(pictures=60_000, crop_px=64, first=2_000_000),
    "companies": WorldScenes(pictures=32_000, persons=(1, 3, 2, 3), crop_px=64, first=3_000_000),
    "faces": WorldFaces(pairs=16_000),
    "views": WorldFaces(pairs=16_000, first=50_000, views=2, photo_px=0, scene_px=48),
}
RECIPE: dict[str, Step] = {
    step.name: step
    for step in (
        Step(name="vae", stage="vae", after=None, data="scenes", options=TrainingOptions(steps=6500, save_steps=500)),
        Step(name="vae-faces", stage="vae-faces", after="vae", data="scenes", new=False,
             options=TrainingOptions(steps=4000, decay=0.7, save_steps=500)),
        Step(name="base", stage="text-to-image", after="vae-faces", data="scenes",
             options=TrainingOptions(steps=10_500, decay=0.4, save_steps=500)),
        Step(name="id-encoder", stage="id-encoder", after="base", data="faces",
             options=TrainingOptions(steps=1500, save_steps=250)),
        Step(name="recogniser", stage="recogniser", after=None, data="views",
             options=TrainingOptions(steps=1200, seed=1, save_steps=200)),
        Step(name="face-points", stage="face-points", after=None, data="scenes",
             options=TrainingOptions(steps=5000, seed=2, save_steps=500)),
        Step(name="attributes", stage="attributes", after=None, data="scenes",
             options=TrainingOptions(steps=4000, seed=3, save_steps=500)),
        Step(name="detector", stage="detector", after=None, data="scenes",
             options=TrainingOptions(steps=1500, seed=4, save_steps=250)),
        Step(name="branches", stage="branches", after="id-encoder", data="portraits",
             options=TrainingOptions(steps=12_000, learning_rate=1e-3, batch_size=32, save_steps=500)),
        # pictures of several people, all trained at once, merged as in inference
        Step(name="branches-together", stage="branches", after="branches", data="groups", new=False,
             options=TrainingOptions(steps=2200, decay=0.6, learning_rate=1e-3, batch_size=32, save_steps=200)),
        # half of the pictures show three people: a person should lose less identity in company
        Step(name="branches-three", stage="branches", after="branches-together", data="companies", new=False,
             options=TrainingOptions(steps=1400, decay=0.6, learning_rate=1e-3, batch_size=32, save_steps=200)),
        Step(name="branches-three-again", stage="branches", after="branches-three", data="companies", new=False,
             options=TrainingOptions(steps=900, decay=0.7, seed=1, learning_rate=1e-3, batch_size=32, save_steps=100)),
        # the full model and the designs that it is compared with: the same examples, seeds and steps
        *(Step(name=name, stage=stage, after="id-encoder", data="portraits",
               options=TrainingOptions(steps=4000, learning_rate=1e-3, batch_size=32, save_steps=250))
          for name, stage in (("branches-compared", "branches"), *((name, name) for name in (
              "branches-local-only", "branches-global-only", "branches-uncropped", "branches-boxed",
              "branches-five-keypoints")))),
    )
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 1 failed, 2 bad usage."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    cut = words.index("--") if "--" in words else len(words)  # argparse does not take "--" after an option
    given, more = _parser().parse_args(words[:cut]), words[cut + 1 :]
    step, out = RECIPE[given.step], Path(given.out)
    if given.check is None:
        command: list[str] = []

        def prepare() -> Outcome:
            # one of the processes that a launcher started makes the examples, the others find them
            PartialState(cpu="--cpu" in more, timeout=WAIT_IN_STEP)
            with main_first():
                command.extend(prepared(step, out, more))
            return Outcome({})

        return run(prepare, as_json=False) or train(command)
    return run(lambda: _check(step, given.check, given.checkpoint, out, given.tolerance), given.json)


def prepared(step: Step, out: Path, more: Sequence[str] = ()) -> list[str]:
    """Makes the inputs of a step. Returns the arguments of `python -m training.train`."""
    if step.after is None:
        start = out / "start"
        if not start.is_dir():
            make_checkpoint(start, **START)
    else:
        start = out / step.after / "checkpoint"
        if not start.is_dir():
            raise RequestError(f"{start} is missing. Make it: python -m training.recipe {step.after} --out {out}")
    store = store_of(DATA[step.data], out / step.data, progress=True)
    options = {field.name: getattr(step.options, field.name) for field in dataclasses.fields(TrainingOptions)}
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items() if value is not None]
    new = ["--new"] if step.new else []
    data = ["--checkpoint", str(start), "--data", str(store.path), "--out", str(out / step.name)]
    return [step.stage, *data, *new, "--half", *flags, *more]


def _check(step: Step, steps: int, checkpoint: str | None, out: Path, tolerance: float) -> Outcome:
    """Computes the first losses again, and compares them with those of the run that made the weights."""
    if steps < 1:
        raise RequestError(f"--check is {steps}, expected a number of steps from 1.")
    path = LOSSES / f"{step.name}.jsonl"
    if not path.is_file():
        raise RequestError(f"{path} is missing: no run of {step.name} is on record.")
    if checkpoint is None and not step.new:
        raise RequestError(
            f"{step.name} begins with the weights of {step.after}, which {SHIPPED} no longer has. Run that step, and "
            f"give --checkpoint {out / str(step.after) / 'checkpoint'}."
        )
    known = [line for line in read_log(path) if line["step"] <= min(steps, EVERY_STEP)]
    repeated = first_losses(step, Path(checkpoint or SHIPPED), len(known))
    worst = max(abs(new / old["loss"] - 1) for new, old in zip(repeated, known, strict=True))
    lines = [
        f"step {old['step']}: {old['loss']:.6f} then, {new:.6f} now" for new, old in zip(repeated, known, strict=True)
    ]
    right = worst <= tolerance
    lines.append(f"{step.name}: largest relative difference {worst:.2e}, allowed {tolerance:g}")
    return Outcome({"step": step.name, "worst": worst, "losses": repeated}, lines, 0 if right else 1)


def first_losses(step: Step, checkpoint: Path, steps: int) -> list[float]:
    """The losses of the first steps, of a run that keeps nothing, on examples made on demand.

    checkpoint: holds the parts that the step begins with. For a step that begins with new weights, this is the trained
    miniature, since later steps do not change earlier parts. For the others, it is the checkpoint of the step before.
    """
    kind = STAGES[step.stage]
    options = step.options.of(kind)
    accelerator = accelerator_of(options.precision, cpu=True)
    stage = kind(
        Checkpoint.open(checkpoint), OnDemandStore(DATA[step.data]), accelerator, new=step.new, seed=options.seed
    )
    learner = Learner(accelerator, stage, options)
    assert options.batch_size is not None
    rows = batches(stage, options.seed, 0, steps, options.batch_size)
    return [float(learner.learn(batch, number)["loss"]) for number, batch in enumerate(rows)]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m training.recipe",
        usage="%(prog)s STEP [options] [-- more flags for python -m training.train]",
        description="Do one step of the miniature's training, or check that its first losses come out again.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""examples:
  python -m training.recipe vae
  python -m training.recipe branches --check 50
  OMP_NUM_THREADS=1 ACCELERATE_USE_CPU=1 torchrun --standalone --nproc_per_node 2 -m training.recipe base -- --cpu""",
    )
    add = parser.add_argument
    add("step", choices=RECIPE, help="the step")
    add(
        "--out",
        default="out/training",
        metavar="DIR",
        help="where all steps and their examples are (default %(default)s)",
    )
    add(
        "--check",
        type=int,
        metavar="N",
        help="only compare the first N losses with those of the run that made the weights",
    )
    add("--checkpoint", metavar="CKPT", help=f"of --check: with the parts that the step reads (default {SHIPPED})")
    add("--tolerance", type=float, default=0.01, help="of --check, relative (default %(default)s)")
    add("--json", action="store_true", help="of --check: the last line of stdout is one JSON object")
    return parser


if __name__ == "__main__":
    sys.exit(execute(main))
