"""The build: resumable, atomic, verified, with errors that say what happened."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from export.build import build, main
from export.building.staging import Staging, open_staging
from export.files import check_space
from export.miniature import make_checkpoint
from export.options import Options
from realisid_trt import Engine
from realisid_trt.errors import BuildError, DiskError, ParityError
from realisid_trt.manifest import MANIFEST, Manifest

ROOT = Path(__file__).resolve().parents[2]


def change_weights(checkpoint: Path, component: str) -> None:
    """Scales one tensor of a component: another checkpoint with the same shapes."""
    [file] = (checkpoint / component).glob("*.safetensors")
    weights = load_file(file)
    name = min(key for key, value in weights.items() if value.ndim > 1)
    weights[name] = weights[name] * 1.25
    save_file(weights, file, metadata={"format": "pt"})


def manifest_of(engine: Path) -> dict[str, Any]:
    return json.loads((engine / MANIFEST).read_text())  # type: ignore[no-any-return]


def file_of(path: Path) -> tuple[int, int]:
    """The inode of a file and the time at which it was written."""
    return path.stat().st_ino, path.stat().st_mtime_ns


def test_the_same_build_again_builds_nothing(own: Options) -> None:
    assert own.out is not None
    assert build(own)["built"] == []  # takes the name of the copied checkpoint
    before = file_of(own.out / MANIFEST), manifest_of(own.out)
    said: list[str] = []
    result = build(own, said.append)
    assert result["complete"] and result["built"] == [] and len(result["reused"]) == 13 + 4
    assert any("nothing to do" in line for line in said)
    assert (file_of(own.out / MANIFEST), manifest_of(own.out)) == before
    assert sorted(path.name for path in own.out.parent.glob(".*")) == [".engine.lock"]


def test_only_what_is_stale_is_built_again(own: Options) -> None:
    assert own.checkpoint is not None and own.out is not None
    before = Manifest.read(own.out).values
    change_weights(own.checkpoint, "text_encoder_2")
    result = build(own)
    assert result["built"] == ["text_encoder_2:opset20-fp32"]
    after = Manifest.read(own.out).values
    changed = {name for name, listed in after["files"].items() if listed != before["files"][name]}
    assert changed == {"onnx/opset20-fp32/text_encoder_2.onnx"}
    assert result["verified"]["onnxruntime-opset20-fp32"]["ratio"] < 4


def test_another_configuration_is_another_manifest_and_nothing_more(
    own: Options, with_config: Callable[..., Path], engine_dir: Path
) -> None:
    """The tests' shortcut for configurations writes what the build writes."""
    assert own.checkpoint is not None and own.out is not None
    config = json.loads((own.checkpoint / "realisid_config.json").read_text())
    changes: dict[str, Any] = {"overlap": "priority", "relocate_mode": "area", "branch_pooled_text": "per_row"}
    changes["sampler"] = {"name": "ddim", "eta": 0}
    (own.checkpoint / "realisid_config.json").write_text(json.dumps(config | changes))
    scheduler_file = own.checkpoint / "scheduler" / "scheduler_config.json"
    scheduler = json.loads(scheduler_file.read_text())
    scheduler_file.write_text(json.dumps(scheduler | {"prediction_type": "v_prediction"}))
    assert build(dataclasses.replace(own, precision="fp16"))["built"] == []
    ours = manifest_of(with_config(engine_dir, scheduler={"prediction_type": "v_prediction"}, **changes))
    theirs = manifest_of(own.out)
    assert ours["realisid_config"] == theirs["realisid_config"] and ours["scheduler"] == theirs["scheduler"]
    for builds in (ours["builds"], *(network["builds"] for network in ours["networks"].values())):
        del builds["tensorrt-rtx-opset23-fp16"]  # not built again here: its profiles depend on branch_pooled_text
    assert {k for k in ours if ours[k] != theirs[k]} <= {"name", "seal", "verified", "files"}
    assert {name for name in ours["files"] if not name.startswith("plans/")} == theirs["files"].keys()


CHANGED = {"vae": "vae_decoder", "text_encoder": "text_encoder", "text_encoder_2": "text_encoder_2"}
# When a build is killed: after it has made this number of the changed networks, and then this number of seconds.
MOMENTS = [(0, 0.0), (0, 3.0), (1, 0.0), (1, 0.5), (2, 0.0), (2, 0.5), (3, 0.0), (3, 0.5), (3, 1.5), (3, 3.0)]


@pytest.mark.long
def test_killed_at_any_moment(own: Options) -> None:
    """Ten kills, from before the first network to the exchange: after each, the engine is whole, the old or a new
    one. Finished parts stay, and resuming finishes the rest."""
    assert own.checkpoint is not None and own.out is not None
    command = [sys.executable, "-u", "-m", "export.build", "--checkpoint", str(own.checkpoint), "--out", str(own.out)]
    command += ["--backend", "onnxruntime"]
    records = own.out.with_name(f".{own.out.name}.building") / "build.json"

    def change() -> None:
        for component in CHANGED:
            change_weights(own.checkpoint, component)  # type: ignore[arg-type]

    def recorded() -> dict[str, Any]:
        made = {}
        with contextlib.suppress(FileNotFoundError):  # the folder goes when the engine is exchanged
            made = json.loads(records.read_text())
        return {name: made.get(f"{name}:opset20-fp32") for name in CHANGED.values()}

    def wait_for(networks: int, seconds: float) -> None:
        """Returns when the process has come so far, or has ended."""
        while process.poll() is None:
            if sum(now != before[name] for name, now in recorded().items()) >= networks:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(seconds)
                return
            time.sleep(0.02)

    finished, seen, resumed, kills = [manifest_of(own.out)["files"]], [], False, 0
    change()
    for networks, seconds in itertools.islice(itertools.cycle(random.Random(0).sample(MOMENTS, len(MOMENTS))), 30):
        before = recorded()
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        wait_for(networks, seconds)
        process.send_signal(signal.SIGKILL)
        printed, _ = process.communicate()
        kills += process.returncode != 0
        if process.returncode == 0:  # it had less to make than it was waited for
            finished.append(manifest_of(own.out)["files"])
            change()  # the next one has work again
        resumed |= any(f"{stand} of 13 networks are kept" in printed for stand in (11, 12))
        manifest = Manifest.read(own.out)
        manifest.check_files()
        seen.append(manifest.values["files"])
        if kills == len(MOMENTS) and resumed:
            break
    assert kills >= len(MOMENTS) and resumed
    build(own)
    finished.append(manifest_of(own.out)["files"])
    assert finished[-1] != finished[0] and all(files in finished for files in seen)
    assert not [p for p in own.out.parent.iterdir() if "building" in p.name or p.name.endswith(".old")]
    Engine.load(own.out).generate("a beach", num_inference_steps=1)


def test_two_builds_of_one_engine(own: Options) -> None:
    assert own.out is not None
    with open_staging(own.out), pytest.raises(BuildError, match="another build of .* is running"):
        build(own)


def test_an_altered_engine_is_not_built_upon(own: Options) -> None:
    assert own.out is not None
    file = own.out / "onnx/opset20-fp32/text_encoder.onnx"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with open_staging(own.out) as staging:
        assert staging._kept == {}


def test_a_network_that_computes_something_else(own: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    """One weight of the exported graph is wrong by a thousandth: the build fails, and the old engine is still there."""
    import onnx
    from onnx import numpy_helper

    from export.building import workers
    from export.forms import Limits, OnnxForm
    from export.to_onnx import to_onnx

    assert own.checkpoint is not None and own.out is not None

    def sabotage(network: Any, module: Any, form: Any, limits: Any, path: Path) -> None:
        to_onnx(network, module, form, limits, path)
        model = onnx.load(str(path))
        tensor = max(model.graph.initializer, key=lambda t: len(t.raw_data))
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * 1.001, tensor.name))
        onnx.save(model, str(path))

    monkeypatch.setattr(workers, "to_onnx", sabotage)
    folder = Staging(own.out).workspace("test")
    source, limits = (own.checkpoint, None, None), Limits.of_requests(1, 1, 8)
    job = workers.Job("test", "key", source, "text_encoder", OnnxForm(20, "fp32"), limits, 0)
    with pytest.raises(
        ParityError, match=r"text_encoder \(opset20-fp32\) output hidden_states has an error of .* times torch's in"
    ):
        workers.export_network(job, folder)
    Engine.load(own.out)


@pytest.mark.slow
def test_an_engine_that_computes_something_else(own: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every network is right and the runtime is wrong: the whole engine is compared too, before it is published."""
    assert own.checkpoint is not None and own.out is not None
    monkeypatch.setattr("realisid_trt.loop.planning.guidance_weights", lambda t, i, on: (-6.5, 2.51, 4.99))
    change_weights(own.checkpoint, "text_encoder_2")
    before = manifest_of(own.out)
    with pytest.raises(ParityError, match="the whole engine, .* has an error of .* the reference in float32 has"):
        build(own)
    assert manifest_of(own.out) == before


@pytest.mark.slow
def test_one_network_at_a_time(own: Options, tmp_path: Path) -> None:
    assert own.checkpoint is not None
    fresh = Options(checkpoint=own.checkpoint, out=tmp_path / "fresh", only=("text_encoder",), backends=own.backends)
    said: list[str] = []
    result = build(fresh, said.append)
    assert not result["complete"] and len(result["missing"]) == 12 and not (tmp_path / "fresh").exists()
    assert any("12 networks are still missing" in line for line in said)
    assert build(fresh)["built"] == []  # it is in the staging folder


def test_an_out_that_is_something_else(own: Options, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "alice.jpg").write_text("mine")
    with pytest.raises(BuildError, match="photos exists and is not an engine directory. Choose another --out"):
        build(dataclasses.replace(own, out=tmp_path / "photos"))
    assert (tmp_path / "photos" / "alice.jpg").read_text() == "mine"
    (tmp_path / "file").write_text("mine")
    with pytest.raises(DiskError, match="cannot be written"):
        build(dataclasses.replace(own, out=tmp_path / "file" / "engine"))


def test_too_little_disk(own: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(".")
    monkeypatch.setattr("export.files.shutil.disk_usage", lambda path: usage._replace(free=10**6))
    with pytest.raises(DiskError, match=r"the build needs about \d+\.\d GB and .* has 0\.0 GB free. Free some space"):
        build(dataclasses.replace(own, out=tmp_path / "new" / "engine"))
    assert [path.name for path in (tmp_path / "new").iterdir()] == [".engine.lock"]
    check_space(Path("/nowhere/at/all"), 0)


def test_a_full_disk_while_writing(own: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    assert own.checkpoint is not None and own.out is not None
    change_weights(own.checkpoint, "text_encoder_2")
    monkeypatch.setattr("export.building.staging.os.replace", full)
    with pytest.raises(DiskError, match="Free some space"):
        build(own)
    monkeypatch.undo()
    Manifest.read(own.out).check_files()


def test_a_full_disk_in_a_worker(own: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    from export import to_onnx
    from export.building import workers
    from export.forms import Limits, OnnxForm

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    assert own.checkpoint is not None
    monkeypatch.setattr(to_onnx, "_strip", full)
    source, limits = (own.checkpoint, None, None), Limits.of_requests(1, 1, 8)
    job = workers.Job("test", "key", source, "unet_time", OnnxForm(20, "fp32"), limits, 0)
    with pytest.raises(DiskError, match="is full. Free some space and run the same command again"):
        workers.export_network(job, tmp_path)


@pytest.mark.slow
def test_out_through_a_link_and_onto_a_mount_point(
    own: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert own.checkpoint is not None and own.out is not None
    (tmp_path / "current").symlink_to(own.out)
    change_weights(own.checkpoint, "text_encoder_2")
    build(dataclasses.replace(own, out=tmp_path / "current"))
    assert (tmp_path / "current").is_symlink() and Manifest.read(tmp_path / "current").path.samefile(own.out)
    monkeypatch.setattr("export.files.os.path.ismount", lambda path: True)
    with pytest.raises(DiskError, match="is a mount point, which cannot be exchanged. Choose a folder inside it"):
        build(own)


def stale(own: Options) -> set[str]:
    """The networks that a build would export now."""
    from export.building.planning import onnx_jobs
    from export.checkpoint import Checkpoint
    from export.forms import targets_of
    from export.networks import networks

    assert own.checkpoint is not None and own.out is not None
    checkpoint = Checkpoint.open(own.checkpoint)
    with open_staging(own.out) as staging:
        _, jobs = onnx_jobs(staging, checkpoint, networks(checkpoint), targets_of("onnxruntime", "fp32"), own)
    return {job.network for job in jobs}


def test_networks_are_stale_when_another_component_changes_their_shapes(own: Options) -> None:
    assert own.checkpoint is not None and stale(own) == set()
    file = own.checkpoint / "unet" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"sample_size": 2 * config["sample_size"]}))
    assert {"local_condition", "local_branch"} <= stale(own)  # the canvas is the UNet's
    file.write_text(json.dumps(config))
    assert stale(own) == set()
    assert stale(dataclasses.replace(own, batch=8)) == set(manifest_of(own.out)["networks"])
    shutil.rmtree(own.checkpoint)
    make_checkpoint(own.checkpoint, seed=0, projection="resampler", id_tokens=16)
    assert stale(own) == {"id_encoder", "local_branch", "global_branch"}  # their tokens are the projection's


def test_fp16_is_for_a_gpu_and_float32_stands_beside_it(own: Options) -> None:
    said: list[str] = []
    assert build(dataclasses.replace(own, precision="fp16"), said.append)["built"] == []  # engine_dir is built this way
    assert any("runs float32: its networks are built too; those in float16 are for a GPU" in line for line in said)
    manifest = manifest_of(own.out)  # type: ignore[arg-type]
    single, half = manifest["builds"]["onnxruntime-opset20-fp32"], manifest["builds"]["onnxruntime-opset23-fp16"]
    assert (single["device"], single["precision"], single["wide"]) == ("cpu", "float32", {})
    assert (half["device"], half["precision"], list(half["wide"])) == ("cuda", "float16", ["vae_decoder"])
    for name, network in manifest["networks"].items():
        entries = network["builds"]
        file = entries["onnxruntime-opset23-fp16"]["file"]
        assert file == f"onnx/opset23-{'fp32' if name == 'vae_decoder' else 'fp16'}/{name}.onnx"
        assert entries["onnxruntime-opset23-fp16"]["parity"]["ratio"] <= 4
        types = {port["dtype"] for port in entries["onnxruntime-opset23-fp16"]["outputs"]}
        assert types == {"float32" if name == "vae_decoder" else "float16"}
    kernels = manifest["kernels"]["files"]
    assert [name.split(".")[1] for name in kernels] == [
        "sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "compute_120",
    ]  # fmt: skip
    assert {f"kernels/{name}" for name in kernels} <= set(manifest["files"])


@pytest.mark.slow
def test_bf16_is_not_for_onnx_runtime(own: Options) -> None:
    said: list[str] = []
    build(dataclasses.replace(own, precision="bf16"), said.append)
    assert "ONNX Runtime has no bfloat16 convolutions: --bf16 changes nothing for it." in said
    assert list(manifest_of(own.out)["builds"]) == ["onnxruntime-opset20-fp32"]  # type: ignore[arg-type]


def test_the_command(own: Options, capsys: pytest.CaptureFixture[str]) -> None:
    own_backend = ["--backend", "onnxruntime"]
    assert main(["--checkpoint", str(own.checkpoint), "--out", str(own.out), "--json", *own_backend]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["complete"]
    assert main(["--checkpoint", str(own.checkpoint), "--out", str(own.out), "--jobs", "0", *own_backend]) == 2
    assert "--jobs is 0, expected at least 1" in capsys.readouterr().err
    assert main(["--checkpoint", "nowhere", "--out", str(own.out), *own_backend]) == 1
    for arguments in (["--jobs", "many"], ["--fp16", "--bf16"], ["--speed"]):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 2
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0 and "examples:" in capsys.readouterr().out


def test_no_path_of_the_building_machine_in_the_engine(engine_dir: Path) -> None:
    """An engine is given to others: nothing in it says where it was built."""
    for file in engine_dir.rglob("*"):
        if file.is_file():
            content = file.read_bytes()
            assert str(ROOT).encode() not in content and str(Path.home()).encode() + b"/" not in content, file
