"""The options of a build: values that are filled in, and values that are refused before anything is read."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from export.build import build
from export.options import Options, _can_build, architecture, checked
from realisid_trt.backends.tensorrt_flavours import Flavour
from realisid_trt.errors import BackendError, BuildError, CheckpointError, RequestError
from realisid_trt.manifest import MANIFEST


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"only": ("unet",)}, RequestError, "--only unet: no such network. Known: text_encoder, "),
        ({"backends": ("magic",)}, RequestError, "--backend magic is unknown. Known: onnxruntime"),
        ({"backends": ("tensorrt",)}, BackendError, r"pip install 'realisid_trt\[tensorrt\]'"),
        ({"optimization_level": 6}, RequestError, "--optimization-level is 6, expected 0 to 5"),
        ({"workspace": 0.0}, RequestError, "--workspace is 0.0, expected a number of GiB above 0"),
        ({"checkpoint": Path("nowhere")}, CheckpointError, "does not exist, expected a checkpoint's folder"),
        ({"face_parser": Path("nowhere.onnx")}, BuildError, "nowhere.onnx cannot be read"),
        ({"face_landmarker": Path("nowhere.task")}, BuildError, "nowhere.task cannot be read"),
    ],
)
def test_bad_options(own: Options, change: dict[str, Any], error: type[Exception], message: str) -> None:
    assert own.out is not None
    before = (own.out / MANIFEST).read_bytes()
    with pytest.raises(error, match=message):
        build(dataclasses.replace(own, **change))
    assert (own.out / MANIFEST).read_bytes() == before


def test_what_is_not_installed_is_said_at_once(own: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    with monkeypatch.context() as patched:
        patched.setattr(Flavour, "installed", False)
        assert not _can_build(half=False, report=said.append) and not said
        assert not _can_build(half=True, report=said.append)
        assert "pip install 'realisid_trt[tensorrt]' or 'realisid_trt[tensorrt-rtx]'" in said[0]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RequestError, match=r"ONNX Runtime, which is not installed\. pip install"):
        build(own)


def test_which_backends_are_built_for() -> None:
    said: list[str] = []
    targets, options = checked(Options(), said.append)
    assert options.backends == ("onnxruntime", "tensorrt-rtx")  # no GPU here, so nothing for the other flavour
    assert [target.build for target in targets] == ["onnxruntime-opset20-fp32", "tensorrt-rtx-opset23-fp32"]
    targets, options = checked(Options(precision="fp16", backends=("tensorrt-rtx",)), said.append)
    assert [target.build for target in targets] == ["tensorrt-rtx-opset23-fp16"]
    assert options.architectures == ("sm_80", "sm_86", "sm_89", "sm_120", "sm_121")
    assert [architecture(text) for text in ("sm_89", "89", "8.9", "SM120")] == ["sm_89", "sm_89", "sm_89", "sm_120"]
    for wrong, words in {
        "hopper": "--arch hopper: expected a compute capability such as sm_89",
        "9.0": "--arch sm_90: tensorrt-rtx builds for sm_80, .* For others use --backend tensorrt, on that GPU",
        "75": "--arch sm_75: it cannot multiply float32 matrices, and the VAE needs that",
    }.items():
        with pytest.raises(RequestError, match=words):
            checked(Options(backends=("tensorrt-rtx",), architectures=(wrong,)), said.append)
    with pytest.raises(RequestError, match="--arch is for the plans of tensorrt-rtx"):
        checked(Options(backends=("onnxruntime",), architectures=("89",)), said.append)
    with pytest.raises(RequestError, match="--gpu-only: onnxruntime in fp32 is for a CPU. Add --fp16"):
        checked(Options(backends=("onnxruntime",), gpu_only=True), said.append)
    with pytest.raises(BackendError, match=r"pip install 'realisid_trt\[tensorrt\]'"):
        build(Options(backends=("tensorrt",)))
