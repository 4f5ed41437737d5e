"""The parity gate holds a network to the same bound in every precision and with every way to run it."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper

from export.checkpoint import Checkpoint
from export.forms import Limits, OnnxForm
from export.networks import Network, networks
from export.to_onnx import to_onnx
from export.truth.verify import DRAWS, parity_shapes, rms_of, verify
from export.truth.verify_engine import Scene, verify_engine
from export.truth.verify_plans import limits_of, through_backend, verify_plans
from export.truth.widen import widened
from realisid_trt import Control, Engine, Request
from realisid_trt.backends import open_backend
from realisid_trt.branches import BODY_STYLES, FACE_STYLES
from realisid_trt.config import RealisIDConfig
from realisid_trt.errors import CheckpointError, ParityError
from realisid_trt.loop.controls import branches_of, drawings, settings
from realisid_trt.loop.samplers import NoiseSchedule, table_of
from realisid_trt.manifest import MANIFEST, Manifest
from realisid_trt.persons.boxes import Grid
from realisid_trt.persons.people import People
from tests.export.test_bisect import feed_of, file_of
from tests.realisid_trt.truth import checkpoint_with
from training.residuals import DESIGNS

BF16, LIMITS = OnnxForm(23, "bf16"), Limits.of_requests(2, 2, 8)
SINGLE, BUILD = OnnxForm(20, "fp32"), "onnxruntime-opset20-fp32"


@pytest.fixture(scope="module")
def checkpoint(checkpoint_dir: Path) -> Checkpoint:
    return Checkpoint.open(checkpoint_dir)


@pytest.fixture(scope="module")
def known(checkpoint: Checkpoint) -> dict[str, Network]:
    return networks(checkpoint)


# text_encoder: GELU's 1.702, a number of the code, is rounded in the graph. unet_time: casts between precisions.
@pytest.mark.parametrize("name", ["text_encoder", "unet_time"])
def test_bfloat16_is_verified_widened(known: dict[str, Network], name: str, tmp_path: Path) -> None:
    """CPU kernels do not know bfloat16: the graph runs in float32, with the same weights."""
    module, file = known[name].module(BF16.dtype), tmp_path / "network.onnx"
    to_onnx(known[name], module, BF16, LIMITS, file)
    kept = [(tensor, tensor.clone()) for tensor in (*module.parameters(), *module.buffers())]
    parity = verify(known[name], module, file, BF16, LIMITS)
    assert parity.widened and parity.ratio < 4 and parity.rms < 1e-6
    assert all(tensor.dtype == before.dtype and torch.equal(tensor, before) for tensor, before in kept)

    narrow = {tensor.name: tensor for tensor in onnx.load(str(file)).graph.initializer}
    with widened(file) as twin:
        graph = onnx.load(str(twin)).graph
    assert [path.name for path in tmp_path.iterdir()] == ["network.onnx"]
    types = {value.type.tensor_type.elem_type for value in (*graph.input, *graph.output, *graph.value_info)}
    assert TensorProto.FLOAT in types and not types & {TensorProto.BFLOAT16, TensorProto.FLOAT16}
    for tensor in graph.initializer:
        was, values = narrow[tensor.name], numpy_helper.to_array(tensor)
        assert tensor.data_type == (TensorProto.FLOAT if was.data_type == TensorProto.BFLOAT16 else was.data_type)
        assert np.array_equal(values, numpy_helper.to_array(was).astype(values.dtype))

    model = onnx.load(str(file))
    tensor = max(model.graph.initializer, key=lambda t: len(t.raw_data))
    values = numpy_helper.to_array(tensor)
    tensor.CopyFrom(numpy_helper.from_array((values.astype(np.float32) * 2).astype(values.dtype), tensor.name))
    onnx.save(model, str(file))
    with pytest.raises(ParityError, match=r"\(opset23-bf16, widened to float32\) output .* --bisect to find"):
        verify(known[name], module, file, BF16, LIMITS)


def test_a_heavy_network_is_tried_once_and_widened(
    known: dict[str, Network], engine_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half precision takes a CPU hours over SDXL's local branch; its graph runs in float32, on the same weights."""
    form, network = OnnxForm(23, "fp16"), known["id_encoder"]
    file = engine_dir / "onnx" / form.name / "id_encoder.onnx"
    monkeypatch.setattr("export.truth.verify.HEAVY_FLOPS", 1e6)
    parity = verify(network, network.module(form.dtype), file, form, LIMITS)
    assert parity.widened and len(parity.shapes) == 1 and parity.ratio < 4 and parity.rms < 1e-6
    monkeypatch.setattr("export.truth.verify.HEAVY_FLOPS", 1e9)
    parity = verify(network, network.module(form.dtype), file, form, LIMITS)
    assert not parity.widened and len(parity.shapes) == 2 and parity.rms > 1e-5


def test_a_runner_is_asked_within_its_limits(known: dict[str, Network]) -> None:
    limits = Limits(rows=(1, 1), timesteps=(1, 2), side=(2, 2))
    shapes = parity_shapes(limits)
    assert all(unit["rows"] == 1 and unit["timesteps"] <= 2 and unit["height"] == 2 for unit in shapes)
    module, asked = known["local_time"].module(torch.float32), []

    def run(feed: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        asked.append(feed["timestep"].shape)
        with torch.no_grad():
            return [(module(*map(torch.from_numpy, feed.values())) * error).numpy()]

    error = 1.0
    assert verify(known["local_time"], module, run, SINGLE, limits).ratio == 1 and asked == [(1,), (2,)]
    error = 1.001
    with pytest.raises(ParityError, match="local_time .* has an error of 1.00e-03 .* the plan does not: try another"):
        verify(known["local_time"], module, run, SINGLE, limits)


class NearTies(torch.nn.Module):
    """Exact where the timestep is a whole number; one rounding beside it, errs by a thousand times the rounding."""

    def forward(self, timestep: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        return timestep + 1000 * torch.frac(timestep + 0.5)


def test_what_torch_errs_is_the_worst_of_several_draws(known: dict[str, Network]) -> None:
    """A lucky draw of torch's rounding errors is not a bound for another order of the same sums."""
    limits, asked = Limits(rows=(1, 1), timesteps=(1, 2), side=(2, 2)), 0

    class Counted(NearTies):
        def forward(self, timestep: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
            nonlocal asked
            asked += timestep.dtype == torch.float32
            return super().forward(timestep, *others)

    def run(feed: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        moved = torch.from_numpy(feed["timestep"]) * (1 - torch.finfo(torch.float32).eps)
        return [(NearTies()(moved) * error).numpy()]

    error = 1.0
    parity = verify(known["local_time"], Counted(), run, SINGLE, limits)
    assert 0.3 < parity.ratio < 4 and parity.rms_torch > 1e-5 and 1 < parity.draws <= 1 + DRAWS
    assert 2 < asked <= 2 * (1 + DRAWS)  # the first draw of each of the two shapes, and those it took
    error = 1.01
    with pytest.raises(ParityError, match=r"has an error of 9\.\d+e-03 .* times torch's in"):
        verify(known["local_time"], Counted(), run, SINGLE, limits)


def test_every_network_through_a_backend(engine_dir: Path, checkpoint: Checkpoint) -> None:
    """The check of plans on a GPU, done here with the backend and the networks of the CPU."""
    manifest = Manifest.read(engine_dir)
    parities = verify_plans(engine_dir, checkpoint, BUILD)
    assert list(parities) == list(manifest.values["networks"])
    for name, parity in parities.items():
        described = manifest.values["networks"][name]["builds"][BUILD]["parity"]
        assert parity.ratio == pytest.approx(described["ratio"], rel=0.5), name


def test_a_backend_that_computes_something_else(
    engine_dir: Path, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = Manifest.read(engine_dir)
    with_text = ["text_encoder", "text_encoder_2"]
    backend = open_backend("onnxruntime", manifest, "cpu:1", with_text)
    run = backend.run
    monkeypatch.setattr(backend, "run", lambda name, fed: {k: v * 1.001 for k, v in run(name, fed).items()})
    with pytest.raises(ParityError, match="text_encoder .* --bisect"):
        verify_plans(engine_dir, checkpoint, BUILD, backend)
    with pytest.raises(ParityError, match="No node differs"):  # the pieces are run by a backend of their own
        verify_plans(engine_dir, checkpoint, BUILD, backend, bisect=True)


def test_a_piece_of_a_network_through_a_backend(engine_dir: Path, known: dict[str, Network]) -> None:
    from export.truth.bisect import _Graph, plain

    manifest = Manifest.read(engine_dir)
    file, feed = file_of(engine_dir, "local_branch", SINGLE), feed_of(known["local_branch"], SINGLE)
    value = next(n for n in onnx.load(str(file)).graph.node if n.op_type == "Conv").output[0]
    with _Graph(file).marked([value]) as marked:
        [ours] = through_backend(manifest, manifest.builds[BUILD], "local_branch", "cpu:1")(marked, feed).values()
        assert np.abs(ours - plain(marked, feed)[value]).max() < 1e-5


def test_what_a_plan_takes_is_read_from_the_manifest(engine_dir: Path) -> None:
    manifest = Manifest.read(engine_dir)
    limits = {name: limits_of(network) for name, network in manifest.networks(manifest.builds[BUILD]).items()}
    assert limits["unet_encoder"] == limits["vae_decoder"] and limits["unet_encoder"].side == (2, 16)
    assert limits["unet_time"].timesteps[1] >= 1000 and limits["id_encoder"].rows[0] == 1


def test_builds_that_cannot_run_here_are_named(engine_dir: Path, checkpoint: Checkpoint) -> None:
    if torch.cuda.is_available():
        pytest.skip("here they can")
    said: list[str] = []
    assert verify_engine(engine_dir, checkpoint, said.append, whole=False) == {}
    others = set(Manifest.read(engine_dir).builds) - {BUILD}
    assert {line.split(" was not compared with the reference: ")[0] for line in said} == others and len(others) == 2


def test_the_engine_s_figures(engine_dir: Path) -> None:
    """One step's guided noise_pred errs more than its rows: the weights of Eq. (8) are 6.5, 2.5 and 5."""
    figures: dict[str, Any] = json.loads((engine_dir / MANIFEST).read_text())["verified"][BUILD]
    assert figures["steps"] == 4 and figures["ratio"] <= 4 and figures["ratio_noise_pred"] <= 4
    assert 1e-7 < figures["rms_torch_noise_pred"] < 1e-5 and 1e-7 < figures["rms_torch"] < 1e-5


@pytest.mark.slow
def test_the_half_reference_errs_like_half_precision(checkpoint: Checkpoint, engine_dir: Path) -> None:
    """bfloat16 has three bits less than float16, so it errs eight times as much."""
    manifest = Manifest.read(engine_dir)
    scene, scale = Scene.of(manifest), table_of("ddim", NoiseSchedule.of(manifest), 1).matrix[0, 0, 0]
    with Engine.load(engine_dir, "onnxruntime", "cpu") as engine:
        shown = scene.drawings(engine)
    truth, half, brain = (scene.by_reference(checkpoint, p, shown).single for p in ("float64", "float16", "bfloat16"))
    noise = rms_of(truth - scale * scene.noise)
    half_error, brain_error = rms_of(half - truth) / noise, rms_of(brain - truth) / noise
    assert 5e-4 < half_error < 1e-2 and 4 < brain_error / half_error < 16


# -- other tables ------------------------------------------------------------------------------------------------------

ROW = {"name": "local", "tokens": "id", "pooled": "per_row", "condition": "pose", "per": "person"}
WHERE = {"name": "global", "tokens": "id", "pooled": "zeros", "condition": "location"}
# Rows for the networks of the test's engine: "local" takes three channels, "global" one, and both read the ID.
TABLES: dict[str, list[dict[str, Any]]] = {
    **{name: design.rows("zeros") for name, design in DESIGNS.items() if name != "five-keypoints"},
    "faces of another style, in the last tenth": [{**ROW, "style": "mediapipe-face", "merge": "mean", "start": 0.9}],
    "bodies in boxes": [{**ROW, "style": "openpose-xinsir", "writes": "box"}, {**WHERE, "writes": "box"}],
    "bodies that may be absent": [{**ROW, "style": "openpose-mmpose", "optional": True, "scale": 0}, WHERE],
}


@pytest.mark.parametrize(
    "table", [pytest.param(name, marks=[] if name == "uncropped" else pytest.mark.slow) for name in TABLES]
)
def test_an_engine_of_another_table_is_compared(
    table: str, engine_dir: Path, checkpoint_dir: Path, with_config: Callable[..., Path]
) -> None:
    """In the single step every branch acts, whatever its window and scale, and nobody's drawing is empty."""
    rows = RealisIDConfig.from_dict({"branches": TABLES[table]}).table
    folder = with_config(engine_dir, branches=[dataclasses.asdict(row) for row in rows])
    checkpoint = checkpoint_with(checkpoint_dir, branches=rows, branch_pooled_text=None)
    figures = verify_engine(folder, checkpoint)[BUILD]
    assert 0 < figures["ratio"] <= 4 and 0 < figures["ratio_noise_pred"] <= 4
    scene = Scene.of(Manifest.read(folder))
    with Engine.load(folder, "onnxruntime", "cpu") as engine:
        shown = scene.drawings(engine)
    assert list(shown) == [row.name for row in rows]
    assert all(drawing.any() for each in shown.values() for drawing in each)


def possible_rows() -> Iterator[RealisIDConfig]:
    """A table of one row, for every way to show something that a config accepts."""
    keys = {
        "view": ("face", "picture"), "writes": ("box", "everywhere"), "condition": ("pose", "location", "image"),
        "style": (None, *FACE_STYLES, *BODY_STYLES), "per": ("person", "picture"), "channels": (1, 3),
    }  # fmt: skip
    for values in itertools.product(*keys.values()):
        row = {"name": "x", "tokens": "text", "pooled": "zeros", **dict(zip(keys, values, strict=True))}
        try:
            yield RealisIDConfig.from_dict({"method": "controlnet", "branches": [row]})
        except CheckpointError:
            continue


def test_every_row_that_a_config_accepts_is_shown_something(engine_dir: Path) -> None:
    """In its own number of channels, at the size of its view; by what the comparison gives, and without it."""
    manifest, seen = Manifest.read(engine_dir), set()
    model = manifest.model
    grid = Grid(64, 128, model.vae_scale_factor, model.levels, model.vae_scale_factor)
    for config in possible_rows():
        [row] = config.table
        values = {**manifest.values, "realisid_config": config.resolved().to_dict()}
        scene = Scene.of(Manifest(manifest.path, values))
        pictures = {name: Control(picture[:, :64]) for name, picture in scene.pictures.items()}
        assert len(scene.persons) == 2 * (row.per == "person") and len(pictures) == (row.per == "picture")
        people = People(None, None, model, config)  # type: ignore[arg-type] # no photo is read, nothing encoded
        given = settings(Request("x", scene.persons, controls=pictures).check(), config.table, grid)
        seen_people = people.see_all(scene.persons, grid, branches_of(config.table, given))
        shown = drawings(config.table, given, seen_people, grid)["x"]
        size = (model.default_size,) * 2 if row.view == "face" else (64, 128)
        assert [drawing.shape for drawing in shown] == [(row.channels, *size)] * (2 if row.per == "person" else 1), row
        seen.add((row.view, row.condition, row.style, row.channels, row.per))
    assert len(seen) == 2 * (3 + 2 * 5 + 1 + 3)  # faces; poses in the picture; masks; images


@pytest.mark.parametrize(("persons", "shown"), [(0, 0), (1, 1), (8, 2)])
def test_an_engine_for_nobody_is_compared_with_nobody(engine_dir: Path, persons: int, shown: int) -> None:
    manifest = Manifest.read(engine_dir)
    values = {**manifest.values, "built_for": {**manifest.values["built_for"], "persons": persons}}
    assert len(Scene.of(Manifest(manifest.path, values)).persons) == shown
