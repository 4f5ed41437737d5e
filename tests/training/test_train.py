"""The training loop: a run that was killed equals one that was not, every stage learns."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from export.checkpoint import Checkpoint
from realisid_trt import Sampler
from realisid_trt.errors import RequestError
from tests.training.runs import command
from training.examples import WorldScenes
from training.judges import JUDGES, load_judge
from training.log import read_log
from training.loop import Learner, TrainingOptions
from training.processes import accelerator_of
from training.result import origin_of
from training.sequence import _order
from training.stages import STAGES, Stage
from training.store import Store, store_of
from training.train import main, memory_errors


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {f"{f.parent.name}/{k}": v for f in sorted(folder.rglob("*.safetensors")) for k, v in load_file(f).items()}


@pytest.mark.parametrize(
    "stage", [pytest.param(stage, marks=[] if stage == "branches" else pytest.mark.slow) for stage in STAGES]
)
def test_every_stage_learns_and_leaves_its_part(stage: str, start: Path, data: Path, tmp_path: Path) -> None:
    """Its last losses are lower than those of the same examples and noise without learning."""
    out, unlearned = tmp_path / "run", tmp_path / "unlearned"
    assert main(command(stage, start, data, out, "--steps", "10", "--half")) == 0
    AcceleratorState._reset_state(reset_partial_state=True)
    assert main([*command(stage, start, data, unlearned, "--steps", "10", "--half"), "--learning-rate", "1e-30"]) == 0
    learned, null = ([line["loss"] for line in read_log(run / "log.jsonl")] for run in (out, unlearned))
    assert len(learned) == 10 and learned[0] == null[0] and np.mean(learned[-4:]) < np.mean(null[-4:])
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    if stage in JUDGES:
        load_judge(stage, out / "weights")
        return
    if stage.startswith("branches-"):
        assert (out / "weights" / f"{stage.removeprefix('branches-')}.safetensors").is_file()
        return
    trained = {
        "vae": {"vae"}, "vae-faces": {"vae"}, "id-encoder": {"image_encoder"},
        "text-to-image": {"unet", "text_encoder", "text_encoder_2"},
        "branches": {"controlnet_local", "controlnet_global", "id_projection"},
    }[stage]  # fmt: skip
    Checkpoint.open(out / "checkpoint").check_weights()
    texts = [file.read_text() for file in (out / "checkpoint").rglob("*.json")]
    assert not any(str(start.parent) in text or str(out) in text for text in texts)  # no path of this machine
    before, after = weights(start), weights(out / "checkpoint")
    assert before.keys() == after.keys()
    for key, value in after.items():
        if key.split("/")[0] in trained:
            assert value.dtype == torch.float16 and value.isfinite().all()
        else:
            assert torch.equal(value, before[key]), key


@pytest.mark.slow
def test_a_killed_run_goes_on_as_if_nothing_had_happened(start: Path, data: Path, tmp_path: Path) -> None:
    """The weights are the same bytes: all random values depend on the seed and the place in the sequence alone."""
    once, twice = tmp_path / "once", tmp_path / "twice"
    assert main(command("branches", start, data, once, "--steps", "8", "--save-steps", "100")) == 0
    process = subprocess.Popen(
        [sys.executable, "-m", "training.train",
         *command("branches", start, data, twice, "--steps", "8", "--save-steps", "3")],
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    log = twice / "log.jsonl"
    while process.poll() is None and (not log.exists() or len(read_log(log)) < 5):
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert not (twice / "checkpoint").exists()
    assert (twice / "state").is_dir()
    assert main(command("branches", start, data, twice, "--steps", "8", "--save-steps", "3")) == 0
    assert [line["step"] for line in read_log(log)] == list(range(1, 9))
    first, second = ([{**line, "examples_per_s": 0} for line in read_log(run / "log.jsonl")] for run in (once, twice))
    assert first == second
    one, other = weights(once / "checkpoint"), weights(twice / "checkpoint")
    assert all(torch.equal(value, other[key]) for key, value in one.items())


def test_a_state_that_is_damaged_says_so(
    start: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = command("face-points", start, data, tmp_path / "run", "--decay", "0")
    assert main([*told, "--steps", "1"]) == 0
    for name in ("model.safetensors", "optimizer.bin", "custom_checkpoint_0.pkl"):
        file = tmp_path / "run" / "state" / name
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
        assert main([*told, "--steps", "2"]) == 1
        assert "state cannot be read" in capsys.readouterr().err
        file.write_bytes(whole)
    assert main([*told, "--steps", "2"]) == 0


def test_a_folder_that_trains_something_else_is_left_alone(
    start: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert main(command("vae", start, data, out, "--steps", "2")) == 0
    capsys.readouterr()
    assert main(command("vae", start, data, out, "--steps", "2", "--seed", "1")) == 2
    assert "seed was 0 and is now 1. Choose another --out." in capsys.readouterr().err
    assert main(command("face-points", start, data, out, "--steps", "2")) == 2
    assert "stage was 'vae' and is now 'face-points'" in capsys.readouterr().err
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("mine")
    assert main(command("vae", start, data, tmp_path / "full", "--steps", "2")) == 2
    assert "is not a training" in capsys.readouterr().err
    assert main(command("branches", start, data / "x", tmp_path / "other", "--steps", "2")) == 2
    assert "holds no examples" in capsys.readouterr().err
    faces = command("vae", start, data, tmp_path / "other", "--steps", "2")
    faces[faces.index(str(data / "scenes"))] = str(data / "faces")
    assert main(faces) == 2
    assert "no rgb: these examples are for another stage" in capsys.readouterr().err


def stopped(step: int, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Makes every training end with an error instead of this step, counted from 0."""
    learn = Learner.learn

    def until(self: Learner, batch: dict[str, torch.Tensor], number: int) -> dict[str, torch.Tensor]:
        if number == step:
            raise error
        return learn(self, batch, number)

    monkeypatch.setattr(Learner, "learn", until)


@pytest.mark.slow
def test_what_a_stopped_run_has_learned_can_be_looked_at(
    start: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """--no-further writes the checkpoint of the last state, with its number of steps; the run goes on as before."""
    run, short = tmp_path / "run", tmp_path / "short"
    told = command("branches", start, data, run, "--steps", "8", "--save-steps", "3", "--decay", "0")
    assert main([*told, "--no-further"]) == 2
    assert "holds no saved state" in capsys.readouterr().err and not run.exists()
    with monkeypatch.context() as patched:
        stopped(4, patched, KeyboardInterrupt())
        assert main(told) == 1
    assert (run / "loss.png").is_file() and not (run / "checkpoint").exists()
    assert main([*command("branches", start, data, run, "--decay", "0"), "--no-further"]) == 0
    assert main(command("branches", start, data, short, "--steps", "3", "--decay", "0")) == 0
    seen, same = weights(run / "checkpoint"), weights(short / "checkpoint")
    assert all(torch.equal(value, same[key]) for key, value in seen.items())
    assert json.loads((run / "run.json").read_text())["steps"] == 8
    parts = ("controlnet_local", "controlnet_global", "id_projection")
    files = {name: next((run / "checkpoint" / name).glob("*.safetensors")) for name in parts}
    origin = origin_of(run, files)
    assert origin is not None and origin["steps"] == 3 and origin["seed"] == 0
    assert main(told) == 0
    assert [line["step"] for line in read_log(run / "log.jsonl")] == list(range(1, 9))
    origin = origin_of(run, files)
    assert origin is not None and origin["steps"] == 8
    assert origin_of(run, {name: next((start / name).glob("*.safetensors")) for name in parts}) is None


def test_a_gpu_without_memory_says_what_needs_less(
    start: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The folder can then take a smaller training."""
    told = command("branches", start, data, tmp_path / "run", "--steps", "2")
    with monkeypatch.context() as patched:
        stopped(0, patched, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."))
        assert main(told) == 2
    said = capsys.readouterr().err
    assert "Tried to allocate 2.00 GiB. Try --checkpointing, --accumulate 2, a smaller --batch-size, --ema 0" in said
    for stage, batch in (("branches", 1), ("id-encoder", 8)):  # its batch cannot be worked through in parts
        options = TrainingOptions(batch_size=batch)
        with pytest.raises(RequestError, match="Try --checkpointing, a smaller"):  # noqa: SIM117
            with memory_errors(options, STAGES[stage], checkpointing=False):
                raise torch.OutOfMemoryError("CUDA out of memory.")
    assert main([*told, "--batch-size", "4"]) == 0


def test_a_disk_that_is_full(
    start: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The previous state is whole, and the run goes on from it."""
    run = tmp_path / "run"
    told = command("face-points", start, data, run, "--steps", "4", "--save-steps", "2")
    with monkeypatch.context() as patched:
        patched.setattr("export.files.shutil.disk_usage", lambda folder: SimpleNamespace(free=10_000))
        assert main(told) == 1
        assert "the state of this training needs about" in capsys.readouterr().err
    save = torch.save
    with monkeypatch.context() as patched:
        full = Path("/dev/full") if Path("/dev/full").exists() else None  # Linux has it

        def filled(value: object, file: object, **more: object) -> None:
            save(value, full if full and (run / "state").exists() else file, **more)

        patched.setattr(torch, "save", filled)
        assert main(told) == (1 if full else 0)
        assert not full or "could not be written" in capsys.readouterr().err
    os.rename(run / "state", run / "state.old")  # as a kill between two renames leaves it
    assert main(told) == 0
    assert [line["step"] for line in read_log(run / "log.jsonl")] == [1, 2, 3, 4]


def test_without_an_average_the_last_weights_are_written(start: Path, data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for steps in ("2", "3"):
        assert main(command("face-points", start, data, run, "--steps", steps, "--ema", "0", "--decay", "0")) == 0
    state = load_file(run / "state" / "model.safetensors")
    written = load_file(run / "weights" / "face-points.safetensors")
    assert len(state) == len(written)
    for key, value in state.items():
        assert torch.equal(value.half(), written[key.partition(".")[2]]), key


@pytest.mark.slow
def test_a_batch_in_parts_is_the_same_step(start: Path, data: Path, tmp_path: Path) -> None:
    """Gradients add up, activations are computed again: the same losses up to rounding."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    more = ("--steps", "4", "--precision", "no")
    assert main(command("branches", start, data, whole, *more)) == 0
    assert main(command("branches", start, data, parts, *more, "--accumulate", "4", "--checkpointing")) == 0
    one, other = (read_log(run / "log.jsonl") for run in (whole, parts))
    assert [line["loss"] for line in other] == pytest.approx([line["loss"] for line in one], rel=1e-4)


def kept_bytes(stage: Stage, batch: dict[str, torch.Tensor]) -> int:
    """The bytes that a forward pass keeps for the backward one."""
    kept = 0

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        kept += tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        stage(batch)
    return kept


def test_activations_that_are_computed_again_are_not_kept(start: Path, data: Path) -> None:
    """This holds for the frozen UNet too, through which the gradients of the branches pass."""
    stage = STAGES["branches"](
        Checkpoint.open(start), Store(data / "groups"), accelerator_of(cpu=True), new=True, seed=0
    )
    batch = {name: part[None] for name, part in stage.item(0, np.random.default_rng(0)).items()}
    before = kept_bytes(stage, batch)
    stage.save_memory()
    assert all(network.is_gradient_checkpointing for network in (*stage.branches.children(), stage.frozen[0]))
    assert kept_bytes(stage, batch) < before / 2  # the rest includes weights
    judge = STAGES["face-points"](
        Checkpoint.open(start), Store(data / "scenes"), accelerator_of(cpu=True), new=True, seed=0
    )
    with pytest.raises(RequestError, match="leave --checkpointing out"):
        judge.save_memory()


def test_every_epoch_has_its_own_order() -> None:
    orders = [_order(3, epoch, 50).tolist() for epoch in (0, 1, 2, 1025)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4 and _order(4, 0, 50).tolist() != orders[0]


@pytest.mark.parametrize(
    "flags, said",
    [
        (("--batch-size", "0"), "batch-size is 0, expected at least 1"),
        (("--learning-rate", "0"), "expected a number above 0"),
        (("--steps", "-1"), "steps is -1"),
        (("--seed", str(2**32)), "seed is 4294967296, expected less than 4294967296"),
        (("--ema", "1.5"), "expected a number from 0 to 1"),
        (("--accumulate", "3"), "batch-size 8 is not divisible by 1 processes × 3 parts"),
    ],
)
def test_numbers_that_cannot_be_meant_are_refused_at_once(
    flags: tuple[str, str], said: str, start: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command("branches", start, data, tmp_path / "run", *flags)) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_a_contrast_is_not_worked_through_in_parts(
    start: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command("id-encoder", start, data, tmp_path / "run", "--accumulate", "2")) == 2
    assert "id-encoder compares the examples of a batch with each other" in capsys.readouterr().err


def test_examples_for_another_checkpoint_are_refused(
    start: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, examples, said in (
        ("mute", WorldScenes(pictures=3, persons=(1,)), "ID crops are 0 px, the checkpoint's 64 px"),
        ("large", WorldScenes(pictures=3, persons=(1,), size_px=256, grid_px=8, crop_px=64), "pictures are 256 px"),
        (
            "wide",
            WorldScenes(pictures=3, persons=(1,), crop_px=64, margin=1.0),
            "1.0 face squares, the checkpoint's 1.5",
        ),
        (
            "far",
            WorldScenes(pictures=3, persons=(1,), crop_px=64, face=(1 / 12, 1 / 11)),
            "3 faces are smaller than 16 px",
        ),
    ):
        store_of(examples, tmp_path / name)
        arguments = command("branches", start, data, tmp_path / "run")
        arguments[arguments.index(str(data / "groups"))] = str(tmp_path / name)
        assert main(arguments) == 2
        assert said in capsys.readouterr().err
    # nothing was trained, so the folder is still free for the right examples
    assert main(command("branches", start, data, tmp_path / "run", "--steps", "1")) == 0


def with_config(start: Path, out: Path, **changes: object) -> Path:
    """A copy of a checkpoint with other choices, and with a model card."""
    shutil.copytree(start, out)
    path = out / "realisid_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    (out / "README.md").write_text("Of other weights.")
    return out


def test_people_are_summed_where_they_meet_or_not_trained(
    start: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A training supports only the overlap "sum"; pictures of one person can be trained with any."""
    other = with_config(start, tmp_path / "start", overlap="average")
    arguments = command("branches", other, data, tmp_path / "run", "--steps", "1")
    assert main(arguments) == 2
    assert "the checkpoint's overlap is 'average'" in capsys.readouterr().err
    arguments[arguments.index(str(data / "groups"))] = str(data / "portraits")
    assert main(arguments) == 0


def test_a_run_goes_on_when_requests_shall_ask_for_something_else(
    start: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """λ, α, sampler and number of steps are of a request: no loss reads them. The old model card is not taken along."""
    out = tmp_path / "run"
    assert main(command("branches", start, data, out, "--steps", "1")) == 0
    changes: dict[str, object] = {"num_inference_steps": 9, "sampler": "euler-a", "steps": "fixed"}
    asked = with_config(start, tmp_path / "asked", id_guidance_scale=7.0, **changes)
    assert main(command("branches", asked, data, out, "--steps", "2")) == 0
    config = Checkpoint.open(out / "checkpoint").config
    assert config.fixed_steps == 9 and config.sampler == Sampler("euler-a")
    assert not (out / "checkpoint" / "README.md").exists()
    moved = with_config(start, tmp_path / "moved", relocate_mode="area")
    assert main(command("branches", moved, data, out, "--steps", "3")) == 2
    assert "config" in capsys.readouterr().err


def test_a_run_may_be_prolonged(start: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert main(command("face-points", start, data, out, "--steps", "3")) == 0
    assert main(command("face-points", start, data, out, "--steps", "5")) == 0
    assert [line["step"] for line in read_log(out / "log.jsonl")] == [1, 2, 3, 4, 5]


def test_a_loss_that_is_no_number_ends_the_run(
    start: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command("vae", start, data, tmp_path / "run", "--steps", "60", "--learning-rate", "1e30")) == 1
    assert "smaller --learning-rate" in capsys.readouterr().err
    assert not (tmp_path / "run" / "checkpoint").exists()


def test_weights_that_are_no_numbers_are_not_saved(
    start: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """At the last step, the loss is finite and its gradient is not."""
    monkeypatch.setattr(Accelerator, "clip_grad_norm_", lambda *given: torch.tensor(float("inf")))
    assert main(command("vae", start, data, tmp_path / "run", "--steps", "1")) == 1
    assert "the gradient at step 1 is inf" in capsys.readouterr().err
    assert not (tmp_path / "run" / "state").exists()


def test_the_learning_rate_rises_stays_and_falls() -> None:
    options = TrainingOptions(steps=1000, warmup_steps=10, decay=0.5)
    rates = [options.rate(step, 1.0) for step in range(1000)]
    assert rates[0] == pytest.approx(0.1) and rates[9:500] == [1.0] * 491
    assert all(a > b for a, b in zip(rates[500:], rates[501:], strict=False)) and 0.02 < rates[-1] < 0.025
