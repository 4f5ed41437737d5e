"""Wheels for the Python of a machine without access to a package index: downloaded here, unzipped there."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

from packaging.requirements import Requirement
from packaging.tags import sys_tags
from packaging.utils import parse_wheel_filename

from export.files import disk_errors
from realisid_trt.errors import BuildError

from .index import KitError

# Item → requirements, without their own requirements: numpy, protobuf and the like are wherever torch and onnx are.
WHEELS: dict[str, tuple[str, ...]] = {
    "cuda-python": ("cuda-core>=1.2,<2", "cuda-bindings>=13,<14", "cuda-pathfinder"),
    "diffusers": ("diffusers>=0.42,<0.43",),
    "onnxruntime-gpu": ("onnxruntime-gpu>=1.31,<2",),
}
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (39, 35, 34, 31, 28, 27, 24, 17)] + ["manylinux2014_x86_64"]


def download(item: str, python: str, folder: Path) -> list[Path]:
    """The wheels of an item for that Python on Linux, x86-64. python: such as "3.12".

    pip uses the user's mirrors, proxies and certificates. Raises BuildError if it cannot get them.
    """
    command = [
        *(sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"),
        *("--only-binary=:all:", "--implementation", "cp", "--python-version", python),
        *(word for platform in PLATFORMS for word in ("--platform", platform)),
    ]
    done = subprocess.run([*command, "--dest", str(folder), *WHEELS[item]], capture_output=True, text=True)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or len(wheels) != len(WHEELS[item]):
        lines = done.stderr.strip().splitlines() or ["pip gave no reason."]
        reason = next((line for line in lines if line.startswith("ERROR")), lines[-1])
        raise BuildError(
            f"the wheels of {item} ({', '.join(WHEELS[item])}) for Python {python} cannot be downloaded: {reason} Put "
            "them into a folder and set PIP_FIND_LINKS to it, or leave them out: --items with the others."
        )
    return wheels


def unzip(item: str, wheels: Sequence[Path], site: Path) -> str:
    """Unzips an item's wheels into a folder for PYTHONPATH. Returns the result as a phrase.

    Unzips none if the packages are already installed in versions that WHEELS accepts, since those suit the other
    installed packages. Raises KitError for wheels that this Python cannot import, DiskError.
    """
    installed = {requirement.name: _installed(requirement.name) for requirement in map(Requirement, WHEELS[item])}
    if all(installed[r.name] and r.specifier.contains(installed[r.name] or "") for r in map(Requirement, WHEELS[item])):
        return "installed: " + ", ".join(f"{name} {version}" for name, version in installed.items())
    here = set(sys_tags())
    for wheel in wheels:
        if here.isdisjoint(parse_wheel_filename(wheel.name)[3]):
            python = f"{sys.version_info.major}.{sys.version_info.minor}"
            raise KitError(
                f"{wheel.name} is not for this machine's Python {python}. Prepare the kit again with --python {python}."
            )
        with disk_errors(site), zipfile.ZipFile(wheel) as archive:
            record = next((name for name in archive.namelist() if name.endswith(".dist-info/RECORD")), None)
            if record is None or not (site / record).is_file():  # the last file of a wheel
                archive.extractall(site)
    return f"{', '.join(' '.join(wheel.name.split('-')[:2]) for wheel in wheels)} in {site}"


def _installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
