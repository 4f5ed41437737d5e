"""The engines that take part, and the ones that are left out with a reason."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.contenders import backends_of, loop_parts, open_engines
from benchmarks.diffusers_pipeline import can_run
from benchmarks.options import Options
from realisid_trt import Engine
from realisid_trt.branches import Branch
from realisid_trt.config import RealisIDConfig
from realisid_trt.errors import BackendError, RequestError
from realisid_trt.manifest import Manifest


class Abacus:
    """A manifest that lists, before its other builds, one for a backend that does not exist."""

    def __init__(self, manifest: Manifest) -> None:
        first = next(iter(manifest.builds.values()))
        unknown = type(first)(**{**vars(first), "id": "abacus-1", "backend": "abacus"})
        self.builds = {"abacus-1": unknown, **manifest.builds}


def options(engine_dir: Path, *backend: str, baseline: str = "none") -> Options:
    return Options(engine=engine_dir, backend=backend, baseline=(baseline,))


def test_their_names(engine_dir: Path) -> None:
    manifest: Any = Abacus(Manifest.read(engine_dir))
    assert backends_of(options(engine_dir, "auto"), manifest) == {"engine": "auto"}
    both = options(engine_dir, "tensorrt", "onnxruntime")
    assert backends_of(both, manifest) == {"engine:tensorrt": "tensorrt", "engine:onnxruntime": "onnxruntime"}
    assert list(backends_of(options(engine_dir, "all"), manifest))[:2] == ["engine:abacus", "engine:onnxruntime"]


def test_all_leaves_out_what_cannot_be_opened(engine_dir: Path) -> None:
    manifest: Any = Abacus(Manifest.read(engine_dir))
    engines, left_out = open_engines(options(engine_dir, "all"), manifest, "cpu:1")
    assert "engine:onnxruntime" in engines and "backend 'abacus' is unknown" in left_out["abacus"]
    with pytest.raises(BackendError, match="backend 'abacus' is unknown"):
        open_engines(options(engine_dir, "onnxruntime", "abacus"), manifest, "cpu:1")
    with pytest.raises(RequestError, match="none of the engine's backends can be opened on nowhere. abacus: "):
        open_engines(options(engine_dir, "all"), manifest, "nowhere")


def test_beside_a_baseline_there_is_one_precision(
    engine_dir: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with a bfloat16 build, of which ONNX Runtime opens the float32 networks."""
    manifest: Any = Abacus(Manifest.read(engine_dir))
    load = Engine.load

    def as_built(path: Path, backend: str, **more: Any) -> Engine:
        opened = load(path, backend="onnxruntime", networks=(), device="cpu:1")
        opened.backend.name, opened.backend.precision = backend, "bfloat16" if backend == "abacus" else "float32"
        return opened

    monkeypatch.setattr(Engine, "load", as_built)
    engines, left_out = open_engines(options(engine_dir, "all", baseline="naive"), manifest, "cpu:1")
    assert list(engines) == ["engine:abacus"]
    assert "it computes in float32 and another in bfloat16" in left_out["onnxruntime"]
    assert len(open_engines(options(engine_dir, "all"), manifest, "cpu:1")[0]) > 1
    with pytest.raises(RequestError, match="engine:onnxruntime: it computes in float32"):
        open_engines(options(engine_dir, "onnxruntime", "abacus", baseline="naive"), manifest, "cpu:1")


def test_the_networks_of_a_step_are_those_of_the_table() -> None:
    row = {"name": "openpose", "condition": "image", "tokens": "text", "pooled": "per_row"}
    table = (*RealisIDConfig(branch_pooled_text="zeros").table, Branch.from_dict(row, "realisid-v1", "a test"))
    assert loop_parts(table) == (
        "local_branch", "global_branch", "openpose_branch", "unet_encoder", "unet_decoder",
        "controlnet_local", "controlnet_global", "controlnet_openpose", "unet",
    )  # fmt: skip


TEXT_ONLY = RealisIDConfig.from_dict(
    {
        "method": "controlnet",
        "branches": [
            {"name": name, "condition": "image", "tokens": "text", "pooled": "per_row"}
            for name in ("openpose", "depth")
        ],
    }
)


def test_the_options_of_an_engine() -> None:
    """Without persons there is one case; where persons are shown there are two, unless others were asked for."""
    plain, realisid = Options(engine=Path("e")), RealisIDConfig(branch_pooled_text="zeros")
    assert plain.of_engine(TEXT_ONLY).persons == (0,) and plain.of_engine(realisid).persons == (1, 2)
    assert Options(engine=Path("e"), persons=(4,)).of_engine(realisid).persons == (4,)
    assert [branch.name for branch in plain.shown(TEXT_ONLY)] == ["openpose", "depth"]
    assert [branch.name for branch in Options(engine=Path("e"), controls=("depth",)).shown(TEXT_ONLY)] == ["depth"]
    assert plain.shown(realisid) == Options(engine=Path("e"), controls=("none",)).shown(TEXT_ONLY) == ()
    assert can_run(TEXT_ONLY, True) and not can_run(realisid, True) and not can_run(realisid, False)
    zeros = replace(TEXT_ONLY, branches=tuple(replace(branch, pooled="zeros") for branch in TEXT_ONLY.table))
    assert can_run(zeros, False) and not can_run(zeros, True)  # SD 1.5 has no pooled text: `adopt` writes zeros


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"persons": (0, 2)}, "--persons 0 2: no branch of this engine is shown a person. Leave --persons out."),
        ({"baseline": ("naive", "naive-no-delay")}, "--baseline naive-no-delay: without persons diffusers' pipeline"),
        ({"photo": Path("alice.jpg")}, "--photo: this engine has no identities, so it reads no photo."),
        (
            {"controls": ("canny",)},
            "--controls canny: this engine has no such branch that is shown a picture. Give one of: ",
        ),
    ],
)
def test_options_that_an_engine_does_not_have(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=re.escape(message)):
        Options(engine=Path("e"), **options).of_engine(TEXT_ONLY)
