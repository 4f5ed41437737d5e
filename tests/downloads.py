"""What the README downloads, small: the published names and shapes with random numbers, and a stand-in for `hf`.

No test asks the model hub. The stand-in copies a folder that lies where a download would come from.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from safetensors.torch import load_file, save_file

from export.faces.arcface import ARCHITECTURES
from tests.export.adopt.published import make_bases
from tests.export.adopt.published_idpatch import FOLDER, make_idpatch
from tests.export.faces.random_arcface import random_arcface, save_as_published

ID_PATCH, SDXL = "ByteDance/ID-Patch", "stabilityai/stable-diffusion-xl-base-1.0"
FACE_ENCODER = "recognition_arcface_ir_se50.pth"
STAND_IN = '''\
#!{python}
"""hf download REPO --local-dir DIR: copies the files of hub/REPO that match, as the hub's command does."""
import argparse, fnmatch, pathlib, shutil

parser = argparse.ArgumentParser()
parser.add_argument("command", choices=["download"])
parser.add_argument("repo")
parser.add_argument("--revision")
parser.add_argument("--include", action="append")
parser.add_argument("--local-dir", required=True)
given = parser.parse_args()
hub = pathlib.Path({hub!r}) / given.repo
for file in sorted(path for path in hub.rglob("*") if path.is_file()):
    name = file.relative_to(hub).as_posix()
    if any(fnmatch.fnmatch(name, pattern) for pattern in given.include or ["*"]):
        target = pathlib.Path(given.local_dir) / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)
'''


def make_downloads(folder: Path) -> None:
    """hub/ and bin/hf, which downloads from there, and the weights of the face encoder, of full size."""
    hub = folder / "hub"
    for name in (ID_PATCH, SDXL):
        (hub / name).parent.mkdir(parents=True)
    made = folder / "made"
    make_idpatch(made)
    make_bases(made)
    (made / FOLDER).rename(hub / ID_PATCH)
    (made / "SDXL").rename(hub / SDXL)
    shutil.rmtree(made)
    for file in sorted((hub / SDXL).rglob("*.safetensors")):
        save_file(
            {key: tensor.half() for key, tensor in load_file(file).items()}, file.with_suffix(".fp16.safetensors")
        )
        shutil.copy(file, hub / SDXL / "sd_xl_base_1.0.safetensors")  # the same model in one file, which nothing needs
    [ir_se50] = (architecture for architecture in ARCHITECTURES if architecture.name == "ir_se50")
    save_as_published(random_arcface(ir_se50), folder / FACE_ENCODER, old=True)
    command = folder / "bin" / "hf"
    command.parent.mkdir()
    command.write_text(STAND_IN.format(python=sys.executable, hub=str(hub)), encoding="utf-8")
    command.chmod(0o755)
