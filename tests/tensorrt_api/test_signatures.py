"""Every TensorRT function that our code calls exists, with these arguments, in 10.16, 11.4 and RTX 1.7. mypy checks it
without any NVIDIA library."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.tensorrt_api.stubs import RELEASES, names_in, read_stub

ROOT = Path(__file__).resolve().parents[2]
MISTAKES = Path(__file__).with_name("mistakes.py")

# Every file that names something of TensorRT's.
FILES = (
    "realisid_trt/backends/tensorrt_flavours.py",
    "realisid_trt/backends/tensorrt.py",
    "export/to_plan.py",
    "export/truth/proof.py",
)

# `tensorrt` is in turn each release, and `tensorrt_rtx` always is RTX's. The skipped packages are large, and have no
# part in this.
SETTINGS = """
[mypy]
strict = true
warn_unused_ignores = false
follow_imports = silent
ignore_missing_imports = true
[mypy-torch.*,diffusers.*,transformers.*,onnx.*,onnxscript.*,onnxruntime.*]
follow_imports = skip
"""

# Where releases differ, or could, as far as our code knows → those that have it.
FEATURES = {
    "IBuilderConfig.set_compute_capability": {"RTX 1.7"},
    "IRuntimeConfig.create_runtime_cache": {"RTX 1.7"},
    "IRuntimeConfig.cuda_graph_strategy": {"RTX 1.7"},
    "IExecutionContext.is_stream_capturable": {"RTX 1.7"},
    "Runtime.get_engine_validity": {"RTX 1.7"},
    "ICudaEngine.unload_weights": {"RTX 1.7"},
    "INetworkDefinition.add_plugin_v3": {"10.16", "11.4"},
    "BuilderFlag.FP16": {"10.16"},
    "IAttention.decomposable": set(RELEASES),
    "ICudaEngine.create_runtime_config": set(RELEASES),
    "BuilderFlag.TF32": set(RELEASES),
}


class Finding(NamedTuple):
    """An error of mypy's: its place, and its text with the code in brackets."""

    file: str
    line: int
    message: str


@pytest.fixture(scope="session")
def stubs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Every release's stub."""
    if sys.version_info[:2] != (3, 11) or sysconfig.get_platform() != "linux-x86_64":
        pytest.skip("the wheels that the signatures are read from are for Python 3.11 on 64-bit Linux")
    if not shutil.which("g++"):
        pytest.skip("no g++ here: TensorRT's modules want libraries to be linked against. apt install g++")
    return {name: read_stub(release, tmp_path_factory.mktemp("release")) for name, release in RELEASES.items()}


@pytest.fixture(scope="session")
def names(stubs: dict[str, str]) -> dict[str, set[str]]:
    """Everything that every release defines."""
    return {name: names_in(stub) for name, stub in stubs.items()}


@pytest.fixture(scope="session")
def findings(stubs: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Finding]]:
    """mypy's errors in FILES, in mistakes.py and in the stubs themselves, by the release that `tensorrt` is."""
    folder = tmp_path_factory.mktemp("mypy")
    (folder / "mypy.ini").write_text(SETTINGS, encoding="utf-8")
    found = {}
    for name, stub in stubs.items():
        for package, content in (("tensorrt", stub), ("tensorrt_rtx", stubs["RTX 1.7"])):
            path = folder / name / package / "__init__.pyi"
            path.parent.mkdir(parents=True)
            path.write_text(content, encoding="utf-8")
        files = [file for file in FILES if (ROOT / file).is_file()]
        finished = subprocess.run(
            [sys.executable, "-m", "mypy", "--config-file", str(folder / "mypy.ini"), "--cache-dir", str(folder / "c")]
            + ["--show-absolute-path", "--no-error-summary", "--no-color-output"]
            + [*files, str(MISTAKES), str(folder / name / "tensorrt/__init__.pyi")],
            env={**os.environ, "MYPYPATH": f"{folder / name}:{ROOT}"},
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert finished.returncode in (0, 1) and not finished.stderr, finished.stdout + finished.stderr
        errors = re.findall(r"^(.+?):(\d+): error: (.+)$", finished.stdout, re.MULTILINE)
        found[name] = [Finding(file, int(line), message) for file, line, message in errors]
    return found


@pytest.mark.parametrize("release", RELEASES)
def test_mistakes_are_found_and_nothing_else(findings: dict[str, list[Finding]], release: str) -> None:
    wrong = set()
    for number, line in enumerate(MISTAKES.read_text(encoding="utf-8").splitlines(), 1):
        if made := re.search(r"# wrong in (.+)$", line):
            assert made[1] == "all" or set(made[1].split(", ")) < set(RELEASES), line
            if made[1] == "all" or release in made[1].split(", "):
                wrong.add(number)
    assert {finding.line for finding in findings[release] if finding.file == str(MISTAKES)} == wrong


@pytest.mark.parametrize("release", RELEASES)
def test_every_type_in_the_stubs_is_one(findings: dict[str, list[Finding]], release: str) -> None:
    """A type that mypy does not know would be Any, which agrees with everything."""
    codes = ("[name-defined]", "[valid-type]", "[syntax]", "[attr-defined]", "[import-not-found]")
    mine = [finding for finding in findings[release] if finding.file.endswith("tensorrt/__init__.pyi")]
    assert mine, "the stub was not looked at: it has errors of other kinds, such as functions without any types"
    assert not [finding for finding in mine if finding.message.endswith(codes)]


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("file", FILES)
def test_our_use_agrees_with(findings: dict[str, list[Finding]], file: str, release: str) -> None:
    assert (ROOT / file).is_file()
    mine = [finding for finding in findings[release] if finding.file == str(ROOT / file)]
    lines = [f"{file}:{finding.line}: {finding.message}" for finding in mine]
    assert not lines, f"with TensorRT {release}:\n" + "\n".join(lines)


def test_no_other_file_names_tensorrt() -> None:
    names_it = re.compile(r"^\s*(import|from) tensorrt", re.MULTILINE)
    sources = [path for folder in ("realisid_trt", "export", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    found = {path.relative_to(ROOT).as_posix() for path in sources if names_it.search(path.read_text(encoding="utf-8"))}
    assert found == set(FILES)


@pytest.mark.parametrize("feature", FEATURES)
def test_feature_is_in(names: dict[str, set[str]], feature: str) -> None:
    assert {release for release in RELEASES if feature in names[release]} == FEATURES[feature]
