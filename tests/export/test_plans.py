"""Real TensorRT-RTX plans, built here without a GPU: their contents, and every way in which a build can fail."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from export.building import plans
from export.building.plans import PlanJob, build_plans, estimate
from export.building.staging import open_staging
from export.checkpoint import Checkpoint
from export.forms import OnnxForm
from export.miniature import make_checkpoint
from export.miniature.presets import UNETS
from export.networks import networks
from export.profiles import Profile, profiles
from export.to_onnx import to_onnx
from export.to_plan import PlanSettings, to_plan
from export.truth.proof import layers_by_type
from realisid_trt.backends.tensorrt_flavours import FLAVOURS, Flavour
from realisid_trt.config import RealisIDConfig
from realisid_trt.errors import BackendError, BuildError
from realisid_trt.loop.rows import PictureRows, guidance_weights, plan_rows
from realisid_trt.manifest import Manifest
from tests.methods import built_method

pytest.importorskip("tensorrt_rtx")
ROOT = Path(__file__).resolve().parents[2]
HALF = PlanSettings("tensorrt-rtx", "fp16", ("sm_86", "sm_89", "sm_120"))
SHAPES = {"x": ((1, 4), (2, 4), (8, 4))}
Maker = Callable[..., Path]


def graph(path: Path, nodes: list[Any], weights: dict[str, Any], kind: int = TensorProto.FLOAT16) -> Path:
    """An ONNX file: x (rows, 4) → y."""
    initializers = [
        value if isinstance(value, onnx.TensorProto) else numpy_helper.from_array(value, name)
        for name, value in weights.items()
    ]
    x, y = (helper.make_tensor_value_info(name, kind, shape) for name, shape in (("x", ["rows", 4]), ("y", None)))
    model = helper.make_model(
        helper.make_graph(nodes, "g", [x], [y], initializers),
        opset_imports=[helper.make_opsetid("", 23)],
        ir_version=10,
    )
    onnx.save(model, str(path))
    return path


@pytest.fixture
def doubled(tmp_path: Path) -> Path:
    """y = 2x, in half precision."""
    two = np.full(4, 2, np.float16)
    return graph(tmp_path / "doubled.onnx", [helper.make_node("Mul", ["x", "two"], ["y"])], {"two": two})


def test_every_network_of_the_miniature_has_a_plan(engine_dir: Path) -> None:
    manifest = Manifest.read(engine_dir)
    manifest.check_files()
    [build_] = [found for found in manifest.builds.values() if found.backend == "tensorrt-rtx"]
    assert {"sm_86", "sm_89", "sm_120"} <= set(build_.architecture.split("+")) and build_.gpu is None
    assert build_.precision == "float16" and set(build_.wide) == {"vae_decoder"}
    assert build_.versions == {"tensorrt_rtx": FLAVOURS["tensorrt-rtx"].version}
    for name, network in manifest.networks(build_).items():
        entry = manifest.values["networks"][name]["builds"][build_.id]
        proof = entry["proof"]
        assert (engine_dir / network.file).read_bytes()[:4] == b"vtrt"
        assert entry["onnx"] in manifest.values["files"] and entry["peak_bytes"] > 2**20
        if name == "vae_decoder":
            assert proof["precision"] == "fp32" and network.inputs[0].dtype == "float32"
            continue
        floats = proof["outputs"] - proof["half"]
        assert proof["precision"] == "fp16" and proof["half"] > 0
        assert floats == sum(n for reason, n in proof["wider"].items() if "angles of a thousand" not in reason), name
        assert proof["weights_bytes"].get("FLOAT", 0) < 256 < proof["weights_bytes"]["FLOAT16"]
        if name.endswith(("branch", "coder")):
            assert proof["attentions"] > 0


def test_profiles_hold_what_the_runtime_asks_for() -> None:
    """No batch within the limits gives a network more rows than its plan takes."""
    names = ["unet_encoder", "unet_decoder", "local_branch", "global_branch", "local_condition", "unet_time", "x"]
    rng = np.random.default_rng(0)
    for per_row in (False, True):
        config = RealisIDConfig(branch_pooled_text="per_row" if per_row else "zeros")
        found = profiles(names, pictures=3, persons=4, side=(2, 4, 8), steps=30, config=config)
        assert found["unet_encoder"].most["rows"] == 6 and found["unet_decoder"].most["rows"] == 9
        assert found["local_branch"].most["rows"] == 12 * (3 if per_row else 2)
        assert found["unet_decoder"].best["rows"] == 3 and found["unet_encoder"].best["rows"] == 2
        assert found["unet_time"].best["timesteps"] == 60 and found["x"].most["rows"] == 1
        for _ in range(200):
            pictures, first = [], 0
            for _ in range(rng.integers(1, 4)):
                count = int(rng.integers(0, 5))
                scales = rng.choice([0.0, 1.0, 5.0, 7.5], 2)
                weights = guidance_weights(*map(float, scales), with_id=bool(rng.integers(2)))
                texts = int(rng.integers(6)), int(rng.integers(6))
                pictures.append(PictureRows(texts, tuple(range(first, first + count)), weights, (True, True)))
                first += count
            plan = plan_rows(pictures, config.table)
            assert len(plan.encoder) <= found["unet_encoder"].most["rows"]
            assert len(plan.decoder) <= found["unet_decoder"].most["rows"]
            assert len(plan.branches[0].rows) <= found["local_branch"].most["rows"]


def test_plans_without_identities_have_no_full_row() -> None:
    row = {"name": "openpose", "condition": "image", "tokens": "text", "pooled": "per_row"}
    config = RealisIDConfig.from_dict({"method": "controlnet", "branches": [row]})
    names = ["unet_encoder", "unet_decoder", "openpose_branch", "openpose_condition"]
    found = profiles(names, pictures=3, persons=4, side=(2, 4, 8), steps=30, config=config)
    assert [found[name].best["rows"] for name in names] == [2, 2, 2, 1]
    assert [found[name].most["rows"] for name in names] == [6, 6, 6, 3]


@pytest.mark.slow("controlnet")
def test_an_input_that_nothing_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A ControlNet without attention, as the published `-small` ones, reads no tokens. Graph and plan keep that input,
    so the runtime gives it like every other."""
    of, name = built_method("controlnet"), "depth_branch"
    manifest, checkpoint = Manifest.read(of.engine), Checkpoint.open(of.checkpoint)
    file = manifest.path / manifest.networks(manifest.build_for("onnxruntime", "cuda"))[name].file
    in_graph = onnx.load(file).graph
    unread = {each.name for each in in_graph.input} - {each for node in in_graph.node for each in node.input}
    assert unread == {"prompt_embeds"}

    network, sizes = networks(checkpoint)[name], profile_of(checkpoint, name)
    shapes = {port.name: found for port in network.inputs if (found := sizes.shapes(port)) is not None}
    assert "prompt_embeds" in shapes
    heard, logger = list[str](), type(FLAVOURS["tensorrt-rtx"].log.logger)
    monkeypatch.setattr(logger, "log", lambda logger, severity, line: heard.append(line))
    built = to_plan(file, tmp_path / "plan", name, shapes, HALF)
    assert built.capturable and built.proof.inputs == {port.name: "HALF" for port in network.inputs}
    assert built.proof.attentions == built.proof.fused == 0 and built.proof.half == built.proof.outputs > 0
    [said] = [line for line in heard if "RemoveDeadLayers" in line and "prompt_embeds" in line]
    assert "is not being removed" in said
    assert b"prompt_embeds" in (tmp_path / "plan").read_bytes()


def test_plans_of_two_way_guidance_are_tuned_for_two_rows() -> None:
    """A request may give a scale of its own for the ID, so the most rows are three of each picture."""
    names = ["unet_encoder", "unet_decoder", "id_patch_branch", "id_patch_condition", "id_encoder"]
    tuned: dict[str, Any] = {"pictures": 3, "persons": 4, "side": (2, 4, 8), "steps": 50, "tokens": (77, 93, 141)}
    config = RealisIDConfig.from_dict({"method": "idpatch"})
    found = profiles(names, config=config, **tuned)
    assert [found[name].best["rows"] for name in names] == [2, 2, 2, 1, 1]
    assert [found[name].most["rows"] for name in names] == [9, 9, 9, 3, 1]
    for profile in found.values():
        assert [sizes["tokens"] for sizes in (profile.least, profile.best, profile.most)] == [77, 93, 141]
        assert profile.limits.tokens == (77, 141)
    three_way = RealisIDConfig.from_dict({"method": "idpatch", "id_guidance_scale": 3.0})
    assert profiles(names, config=three_way, **tuned)["unet_decoder"].best["rows"] == 3
    assert "tokens" not in profiles(names, config=config, **{**tuned, "tokens": None})["unet_encoder"].most


@pytest.mark.slow("controlnet")
def test_attentions_to_the_text_are_fused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a branch whose heads have SDXL's width, 64: those of the miniature are too narrow for fused kernels."""
    wide = {"block_out_channels": (16, 64, 128), "attention_head_dim": (1, 1, 2)}  # numbers of heads
    shape = UNETS["miniature"] | wide | {"transformer_layers_per_block": (1, 1, 1)}
    monkeypatch.setitem(UNETS, "miniature", shape)
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path / "checkpoint", method="controlnet"))
    name, form = "openpose_branch", OnnxForm(23, "fp16")
    network, sizes = networks(checkpoint)[name], profile_of(checkpoint, name)
    to_onnx(network, network.module(form.dtype), form, sizes.limits, tmp_path / "graph.onnx")
    shapes = {port.name: found for port in network.inputs if (found := sizes.shapes(port)) is not None}
    built = to_plan(tmp_path / "graph.onnx", tmp_path / "plan", name, shapes, HALF)
    # Two levels of two blocks, and the mid block; each attends to the picture and to the text.
    assert built.proof.fused == built.proof.attentions == 2 * (2 * 2 + 1)
    assert built.capturable and built.proof.half == built.proof.outputs


def profile_of(checkpoint: Checkpoint, name: str) -> Profile:
    """Of one network, for batches of up to four pictures."""
    return profiles([name], pictures=4, persons=0, side=(2, 8, 16), steps=30, config=checkpoint.config)[name]


def test_a_graph_that_is_secretly_float32(tmp_path: Path, doubled: Path) -> None:
    two = np.full(4, 2, np.float32)
    multiply = helper.make_node("Mul", ["x", "two"], ["y"], name="multiply")
    secret = graph(tmp_path / "secret.onnx", [multiply], {"two": two}, TensorProto.FLOAT)
    with pytest.raises(
        BuildError, match=r"unet_decoder should be fp16, but 4 of its tensors .*x \(input, float, -1×4\)"
    ):
        to_plan(secret, tmp_path / "plan", "unet_decoder", SHAPES, HALF)
    assert to_plan(secret, tmp_path / "plan", "vae_decoder", SHAPES, HALF).proof.wider  # which is on the list
    with pytest.raises(BuildError, match=r"unet_time should be fp16, .*x \(input, float"):  # only two inputs of it are
        to_plan(secret, tmp_path / "plan", "unet_time", SHAPES, HALF)
    with pytest.raises(BuildError, match=r"unet_decoder should be bf16, .*x \(input, half"):
        to_plan(doubled, tmp_path / "plan", "unet_decoder", SHAPES, dataclasses.replace(HALF, precision="bf16"))
    found = to_plan(doubled, tmp_path / "plan", "unet_decoder", SHAPES, HALF).proof
    assert found.half == found.outputs and not found.wider
    # Between two casts: no input or output of the graph shows it.
    nodes = [
        helper.make_node("Cast", ["x"], ["wide"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["wide", "two"], ["product"], name="hidden"),
        helper.make_node("Cast", ["product"], ["y"], to=TensorProto.FLOAT16),
    ]
    hidden = graph(tmp_path / "hidden.onnx", nodes, {"two": two})
    with pytest.raises(BuildError, match=r"4 of its tensors are not, such as node_of_wide \(cast"):
        to_plan(hidden, tmp_path / "plan", "unet_decoder", SHAPES, HALF)


def test_what_the_inspector_says() -> None:
    """The wordings of different releases. A tensor with an unknown wording is not counted as half."""
    layers = [
        {"Name": "conv", "Outputs": [{"Name": "a", "Format/Datatype": "Row major linear FP16 format"}]},
        {"Name": "attention", "Outputs": [{"Name": "b", "Format": "Half", "Dimensions": [2, 4]}]},
        {"Name": "mixed", "Outputs": [{"Name": "c", "Format": "Half"}, {"Name": "d", "Format": "Float"}]},
        {"Name": "bf", "Outputs": [{"Name": "e", "Format/Datatype": "BFloat16"}]},
        {"Name": "shape", "Outputs": [{"Name": "f", "Format/Datatype": "Int64"}]},
        "a bare name",
    ]
    assert layers_by_type(json.dumps({"Layers": layers})) == {"HALF": 2, "FLOAT": 1, "BF16": 1, "other": 2}


def test_a_type_that_an_architecture_does_not_have(tmp_path: Path) -> None:
    scale = np.array(0.05, np.float16)
    zero = helper.make_tensor("zero", TensorProto.FLOAT8E4M3FN, [], b"\0", raw=True)
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["d"]),
        helper.make_node("MatMul", ["d", "w"], ["y"]),
    ]
    weights = {"scale": scale, "zero": zero, "w": np.ones((4, 4), np.float16)}
    fp8 = graph(tmp_path / "fp8.onnx", nodes, weights)
    with pytest.raises(BuildError, match=r"built no plan: .*sm86.*fp8_e4m3"):
        to_plan(fp8, tmp_path / "plan", "unet_decoder", SHAPES, HALF)
    assert not (tmp_path / "plan").exists()


def test_turing_multiplies_no_float32_matrices(tmp_path: Path) -> None:
    """This is why sm_75 is not built for by default: the VAE is float32."""
    multiply = helper.make_node("MatMul", ["x", "w"], ["y"])
    product = graph(tmp_path / "g.onnx", [multiply], {"w": np.ones((4, 4), np.float32)}, TensorProto.FLOAT)
    to_plan(product, tmp_path / "plan", "vae_decoder", SHAPES, HALF)
    turing = dataclasses.replace(HALF, architectures=("sm_75",))
    with pytest.raises(BuildError, match=r"built no plan: .*Turing \(SM75\): FP32 GEMM is not supported"):
        to_plan(product, tmp_path / "plan", "vae_decoder", SHAPES, turing)


def test_an_architecture_that_it_does_not_know(doubled: Path, tmp_path: Path) -> None:
    settings = dataclasses.replace(HALF, architectures=("sm_90",))
    with pytest.raises(BackendError, match="does not build for sm_90. Known: sm_75, .*--backend tensorrt, on that GPU"):
        to_plan(doubled, tmp_path / "plan", "unet_decoder", SHAPES, settings)


def test_a_broken_graph(tmp_path: Path) -> None:
    """The mixed types of diffusers' own half-precision forward, which are exported without an error."""
    concat = helper.make_node("Concat", ["x", "w"], ["y"], axis=0, name="mixed")
    broken = graph(tmp_path / "broken.onnx", [concat], {"w": np.ones((1, 4), np.float32)})
    with pytest.raises(BuildError, match=r"(?s)cannot read the graph: .*of the same type.* \(node mixed, Concat\)"):
        to_plan(broken, tmp_path / "plan", "unet_decoder", SHAPES, HALF)
    (tmp_path / "nonsense.onnx").write_bytes(b"nonsense")
    with pytest.raises(BuildError, match="cannot read the graph: .+"):
        to_plan(tmp_path / "nonsense.onnx", tmp_path / "plan", "unet_decoder", SHAPES, HALF)


def test_a_profile_that_cannot_be(doubled: Path, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="profile was refused|built no plan: .*profile"):
        to_plan(doubled, tmp_path / "plan", "unet_decoder", {"x": ((4, 4), (2, 4), (8, 4))}, HALF)


def test_a_cancelled_build(doubled: Path, tmp_path: Path) -> None:
    told: list[tuple[float, str]] = []

    def stop(share: float, phase: str) -> bool:
        told.append((share, phase))
        return len(told) < 3

    with pytest.raises(BuildError, match="built no plan: .*Build canceled by user"):
        to_plan(doubled, tmp_path / "plan", "unet_decoder", SHAPES, HALF, stop)
    told.clear()
    to_plan(doubled, tmp_path / "plan", "unet_decoder", SHAPES, HALF, lambda *now: told.append(now) or True)
    shares = [share for share, _ in told]
    assert shares == sorted(shares) and 0.8 < shares[-1] <= 1 and len({phase for _, phase in told}) > 3


def test_a_missing_and_an_old_library(doubled: Path, tmp_path: Path) -> None:
    missing = Flavour("tensorrt", "tensorrt_that_is_not_here", (10, 13), (12, 0), portable=False)
    with pytest.raises(BackendError, match=r"needs the package tensorrt_that_is_not_here .* pip install 'realisid_trt"):
        _ = missing.module
    old = Flavour("tensorrt-rtx", "tensorrt_rtx", (99, 0), (100, 0), portable=True)
    with pytest.raises(
        BackendError, match=r"tensorrt_rtx 1\.\S+ is installed; .* works with versions from 99\.0 up to"
    ):
        _ = old.module


def job(name: str, onnx_file: Path, size: int = 1) -> PlanJob:
    return PlanJob(name, f"key of {name}", name, onnx_file, Path("plans") / f"{name}.plan", SHAPES, HALF, size, {})


def test_a_process_that_dies_takes_nothing_with_it(doubled: Path, tmp_path: Path) -> None:
    """Killed by the system, as it does when memory runs out: a typed error, and everything else is built and kept."""
    jobs = [job("unet_decoder", doubled, 3), job("unet_encoder", doubled, 2), job("local_time", tmp_path / "none", 1)]

    def kill_the_first() -> None:
        while not (children := [p for p in plans.multiprocessing.active_children() if p.pid]):
            time.sleep(0.005)
        os.kill(children[0].pid or 0, signal.SIGKILL)

    threading.Thread(target=kill_the_first).start()
    with open_staging(tmp_path / "engine") as staging:
        with pytest.raises(BuildError) as caught:
            build_plans(staging, jobs, progress=False)
        text = str(caught.value)
        assert text.startswith("2 plans could not be built. unet_decoder: the process that built its tensorrt-rtx plan")
        assert "died (signal 9)" in text and "GiB are needed" in text and "local_time: " in text
        assert list(staging.artifacts) == ["unet_encoder"]
        made = build_plans(staging, jobs[:1], progress=False)
        assert made["unet_decoder"].info["proof"]["half"] > 0


def test_ctrl_c(doubled: Path, tmp_path: Path) -> None:
    """The builder is told to stop, and its process ends with the command."""
    program = f"""
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from export.building.staging import open_staging
from export.building.plans import build_plans
from tests.export.test_plans import job
if __name__ == "__main__":
    with open_staging(Path({str(tmp_path / "engine")!r})) as staging:
        print("ready", flush=True)
        build_plans(staging, [job(f"n{{i}}", Path({str(doubled)!r})) for i in range(200)], progress=False)
"""
    (tmp_path / "program.py").write_text(program)
    command = [sys.executable, str(tmp_path / "program.py")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    time.sleep(1.5)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert "KeyboardInterrupt" in errors and process.returncode != 0
    with open_staging(tmp_path / "engine"):  # no process holds it any more
        pass


def test_what_it_will_take_is_estimated() -> None:
    """Within what was measured for SDXL's networks (export.md of the study: 2.3 to 2.5 GiB, peaks of 7.9 to 8.5)."""
    encoder, decoder = 2 * 1_236_071_040, 2 * 1_324_096_644
    peak, disk = estimate([encoder, decoder])
    assert 8.5 <= peak / 2**30 < 12
    assert 4.82 < disk / 2**30 < 5.5
