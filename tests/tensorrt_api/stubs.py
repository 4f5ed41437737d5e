"""Type stubs (.pyi) of TensorRT's real Python modules, made on a machine that has neither TensorRT nor a GPU.

The modules are in wheels of PyPI, apart from the gigabytes of libraries that they are linked against. Empty libraries
of the same names let them be imported, in a process of its own, and pybind11-stubgen lists every class, method,
argument and enum member that it finds there.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from export.wheels import fetch_members

LIBRARIES = Path(__file__).with_name("libraries.cpp")


@dataclass(frozen=True)
class Release:
    """One release of the bindings.

    requirement: the wheel on PyPI.
    members:     {path inside the wheel: SHA-256} of the package's __init__.py and the module, in this order.
    libraries:   that the module is linked against.
    """

    requirement: str
    members: Mapping[str, str]
    libraries: tuple[str, ...]


RELEASES = {
    "10.16": Release(
        "tensorrt_cu12_bindings==10.16.1.11",
        {
            "tensorrt_bindings/__init__.py": "3adc772c6a9cdc28c1967124ab044310c6e740bc4bebb62ee56928ecf41db161",
            "tensorrt_bindings/tensorrt.so": "9bf84a17f9df12e2c907d2f03b57139a8cfc9b034b90f701eec3e495caf8ad15",
        },
        ("libnvinfer.so.10", "libnvinfer_plugin.so.10", "libnvonnxparser.so.10"),
    ),
    "11.4": Release(
        "tensorrt_cu13_bindings==11.4.0.106",
        {
            "tensorrt_bindings/__init__.py": "fbc979f79502a1eeb83a7955f4db2564209689762a460f7e13667ecf2f6730f3",
            "tensorrt_bindings/tensorrt.so": "d07cb6dfd4300c794285e056633c98ffa54c63e06f828b903fdb4abbe2158938",
        },
        ("libnvinfer.so.11", "libnvinfer_plugin.so.11", "libnvonnxparser.so.11"),
    ),
    "RTX 1.7": Release(
        "tensorrt_rtx_cu13_bindings==1.7.1.116",
        {
            "tensorrt_rtx_bindings/__init__.py": "6a9aa0244255136ad5f13ccc0a097d4aa82fabf3911b65b9097e26ec4fdb1101",
            "tensorrt_rtx_bindings/tensorrt_rtx.so": "0b99b614d4108941cd4670142e46959559304ac53c9e9342c3884aca0f17774b",
        },
        ("libtensorrt_rtx.so.1", "libtensorrt_onnxparser_rtx.so.1"),
    ),
}

# (pattern, replacement, why). The errors and gaps of the bindings' own signatures that our code meets.
CORRECTIONS = (
    (r"<\w+\.\w+: -?\d+>", "...", "the default value of an enum, as Python prints it"),
    (r"detail::accessor<.*>", "typing.Any", "a C++ type that Python does not have"),
    (r"\bin: ", "in_: ", "a keyword cannot name an argument"),
    (r"(channel_axis: [\w.]+)\)", r"\1 = ...)", "add_scale_nd: an argument without a default behind some with one"),
    (r"(?<=-> |\w: |\w\w\[|\], )bool\b", "builtins.bool", "the modules define `bool`, a DataType"),
    (r"typing\.SupportsInt\b", "int", "has __int__, as floats have; but those are refused"),
    (r"typing\.SupportsFloat\b", "float", "as above"),
    (r"(\w: )Dims(?=[,)])", r"\1Dims | tuple[int, ...] | list[int]", "these two are converted"),
    (r"(class Dims:\n)", r"\1    def __iter__(self) -> collections.abc.Iterator[int]: ...\n", "by __getitem__"),
    (r"(class IHostMemory:\n)", r"\1    def __buffer__(self, flags: int, /) -> memoryview: ...\n", "as its C type has"),
    (
        r"(def (?:build_serialized_network|deserialize_cuda_engine|create_execution_context)\(.*\) -> \w+):",
        r"\1 | None:",
        "None is how these fail",
    ),
    # The arguments of Python's overrides; the signature is that of the C++ method.
    (r"parent_phase: str", "parent_phase: str | None", "IProgressMonitor.phase_start: None for the outermost phase"),
    (r"data: typing_extensions\.CapsuleType, size: int", "data: bytes", "IStreamWriter.write"),
    (
        r"destination: typing_extensions\.CapsuleType, (num_bytes: int, stream: int\)) -> int",
        r"\1 -> bytes",
        "IStreamReaderV2.read",
    ),
)


def read_stub(release: Release, folder: Path) -> str:
    """The stub of one module; `folder` holds temporary files.

    It lacks the names of the package's own __init__.py (nptype, volume, __version__). Raises BuildError when the
    wheel cannot be had.
    """
    for path, cached in fetch_members(release.requirement, release.members).items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(cached, folder / path)
    subprocess.run(["g++", "-shared", "-fPIC", str(LIBRARIES), "-o", str(folder / "empty.so")], check=True)
    for name in release.libraries:
        shutil.copyfile(folder / "empty.so", folder / name)
    _, module = (Path(path).with_suffix("") for path in release.members)
    finished = subprocess.run(
        [sys.executable, "-m", "pybind11_stubgen", module.parent.name]
        + ["--print-invalid-expressions-as-is", "--output-dir", str(folder / "stubs")],
        env={**os.environ, "PYTHONPATH": str(folder), "LD_LIBRARY_PATH": str(folder)},
        capture_output=True,  # a line for every expression that is not Python
        text=True,
    )
    assert finished.returncode == 0, finished.stderr
    return correct((folder / "stubs" / module).with_suffix(".pyi").read_text(encoding="utf-8"))


def correct(stub: str) -> str:
    """`stub` with its C++ names in Python and CORRECTIONS made."""
    classes = set(re.findall(r"^class (\w+)", stub, re.MULTILINE))

    def python_name(cpp: re.Match[str]) -> str:
        return cpp[1] if cpp[1] in classes else cpp[1].removeprefix("I")  # nvinfer1::IBuilder is Builder

    stub = re.sub(r"\b(?:nvinfer1|nvonnxparser)::(?:v_\d+_\d+::)?(\w+)", python_name, stub)
    for pattern, replacement, _ in CORRECTIONS:
        stub = re.sub(pattern, replacement, stub)
    return stub.replace("import collections.abc\n", "import builtins\nimport collections.abc\n", 1)


def names_in(stub: str) -> set[str]:
    """Everything a stub defines: "Builder", "Builder.create_network", "BuilderFlag.TF32"."""
    names = set()
    for outer in ast.parse(stub).body:
        if isinstance(outer, ast.ClassDef):
            names.add(outer.name)
            for inner in outer.body:
                if isinstance(inner, ast.FunctionDef | ast.ClassDef):
                    names.add(f"{outer.name}.{inner.name}")
                elif isinstance(inner, ast.AnnAssign) and isinstance(inner.target, ast.Name):
                    names.add(f"{outer.name}.{inner.target.id}")
    return names
